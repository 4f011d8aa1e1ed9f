// Vectors of one instruction set, and groups of four of them to and from what is stored. Part of cpu_kernels.h.

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

template <typename V>
INLINE V load(const void* from) {
    V value;
    memcpy(&value, from, sizeof(V));
    return value;
}

template <typename V>
INLINE void store(void* to, V value) {
    memcpy(to, &value, sizeof(V));
}

INLINE I integers(int32_t value) { return I{} + value; }
INLINE F floats(float value) { return (F)integers(float_bits(value)); }

INLINE I magnitude_of(F value) { return (I)value & 0x7fffffff; }
INLINE I larger(I a, I b) { return a > b ? a : b; }

INLINE I lane_numbers() {
    I numbers;
    for (int lane = 0; lane < LANES; ++lane) numbers[lane] = lane;
    return numbers;
}

INLINE int32_t largest_lane(I value) {
#if LANES == 16
    return _mm512_reduce_max_epi32((__m512i)value);
#else
    int32_t largest = value[0];
    for (int lane = 1; lane < LANES; ++lane) largest = value[lane] > largest ? value[lane] : largest;
    return largest;
#endif
}

INLINE I widened_bytes(const uint8_t* from) {
#if LANES == 16
    return (I)_mm512_cvtepu8_epi32(load<__m128i>(from));
#elif LANES == 8
    return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    return (I)__builtin_convertvector(load<Bytes>(from), U);
#endif
}

INLINE I widened_halves(const void* from) {
#if LANES == 16
    return (I)_mm512_cvtepu16_epi32(load<__m256i>(from));
#elif LANES == 8
    return (I)_mm256_cvtepu16_epi32(load<__m128i>(from));
#else
    return (I)__builtin_convertvector(load<Halves>(from), U);
#endif
}

// --- a group of four vectors of elements <-> FP32 -------------------------------------------------------------------

constexpr int GROUP = 4 * LANES;
typedef F Group[4];

// Four vectors of numbers under 2^8, as bytes.
INLINE void store_bytes(uint8_t* to, const I (&codes)[4]) {
#if LANES == 16
    const __m512i low = _mm512_packus_epi32((__m512i)codes[0], (__m512i)codes[1]);
    const __m512i high = _mm512_packus_epi32((__m512i)codes[2], (__m512i)codes[3]);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    store(to, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
#elif LANES == 8
    const __m256i low = _mm256_packus_epi32((__m256i)codes[0], (__m256i)codes[1]);
    const __m256i high = _mm256_packus_epi32((__m256i)codes[2], (__m256i)codes[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    store(to, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
#else
    for (int k = 0; k < 4; ++k) store(to + k * LANES, __builtin_convertvector((U)codes[k], Bytes));
#endif
}

// Four vectors of numbers under 2^16, as 16-bit elements.
INLINE void store_halves(uint8_t* to, const I (&codes)[4]) {
    for (int k = 0; k < 4; k += 2) {
#if LANES == 16
        const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        const __m512i packed = _mm512_packus_epi32((__m512i)codes[k], (__m512i)codes[k + 1]);
        store(to + 2 * k * LANES, _mm512_permutexvar_epi64(order, packed));
#elif LANES == 8
        const __m256i packed = _mm256_packus_epi32((__m256i)codes[k], (__m256i)codes[k + 1]);
        store(to + 2 * k * LANES, _mm256_permute4x64_epi64(packed, 0xd8));
#else
        for (int half = k; half < k + 2; ++half)
            store(to + 2 * half * LANES, __builtin_convertvector((U)codes[half], Halves));
#endif
    }
}

#if LANES == 16
// 64 8-bit codes: every value is exact in BF16, so two lookups by magnitude give the two upper bytes of the FP32
// number.
template <int Type>
INLINE void decode_by_table(const uint8_t* from, Group& real) {
    alignas(64) static constexpr ByteTables<Type> TABLES;
    // Byte and word interleaving stay within 128 bits: dword k of lane j must be the codes that vector k wants there.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i codes = _mm512_permutexvar_epi32(order, load<__m512i>(from));
    const __m512i low =
        _mm512_permutex2var_epi8(load<__m512i>(TABLES.low), codes, load<__m512i>(TABLES.low + 64));
    __m512i high = _mm512_permutex2var_epi8(load<__m512i>(TABLES.high), codes, load<__m512i>(TABLES.high + 64));
    high = _mm512_ternarylogic_epi64(high, codes, _mm512_set1_epi8((char)0x80), 0xf8);  // high | (codes & 0x80)
    const __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    const __m512i zero = _mm512_setzero_si512();
    real[0] = (F)_mm512_unpacklo_epi16(zero, first);
    real[1] = (F)_mm512_unpackhi_epi16(zero, first);
    real[2] = (F)_mm512_unpacklo_epi16(zero, second);
    real[3] = (F)_mm512_unpackhi_epi16(zero, second);
}
#endif

INLINE F half_to_float(const uint8_t* from) {
#if LANES == 16
    return (F)_mm512_cvtph_ps(load<__m256i>(from));
#elif LANES == 8
    return (F)_mm256_cvtph_ps(load<__m128i>(from));
#else
    const I code = widened_halves(from);
    const I magnitude = code & 0x7fff;
    const I normal = (magnitude << 13) + (112 << 23);
    const I subnormal = (I)(__builtin_convertvector(magnitude, F) * floats(0x1p-24f));
    I value = magnitude < 0x400 ? subnormal : normal;
    value = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : value;
    return (F)(value | (code & 0x8000) << 16);
#endif
}

// A UE5M3 code is the upper byte of a half without its sign.
INLINE F widened_code(const uint8_t* from) {
#if LANES == 16
    return (F)_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(load<__m128i>(from)), 7));
#elif LANES == 8
    return (F)_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)from)), 7));
#else
    return F{} + (float)*from;  // not called: this instruction set has no conversion
#endif
}

template <int Type>
INLINE F byte_to_float(const uint8_t* from) {
    if constexpr (Type == UE5M3 && LANES >= 8) return widened_code(from);
    const I code = widened_bytes(from);
    const I magnitude = Spec<Type>::has_sign ? code & 0x7f : code;
    constexpr int mantissa = Spec<Type>::mantissa;
    const I normal = (magnitude << (23 - mantissa)) + ((Spec<Type>::smallest_field - 1) << 23);
    const I subnormal = (I)(__builtin_convertvector(magnitude, F) * floats(Spec<Type>::step));
    I value = magnitude < (1 << mantissa) ? subnormal : normal;
    if constexpr (Type == E4M3)
        value = magnitude == 0x7f ? integers(0x7fc00000) : value;
    else
        value = magnitude >= (0x1f << mantissa) ? (magnitude << (23 - mantissa)) | 0x7f800000 : value;
    return (F)(Spec<Type>::has_sign ? value | (code & 0x80) << 24 : value);
}

template <int Type>
INLINE void decode(const uint8_t* from, Group& real) {
#if LANES == 16
    if constexpr (Type == E4M3 || Type == E5M2) return decode_by_table<Type>(from, real);
#endif
    for (int k = 0; k < 4; ++k) {
        const uint8_t* part = from + k * LANES * SIZE[Type];
        if constexpr (Type == FP32)
            real[k] = load<F>(part);
        else if constexpr (Type == BF16)
            real[k] = (F)(widened_halves(part) << 16);
        else if constexpr (Type == FP16)
            real[k] = half_to_float(part);
        else
            real[k] = byte_to_float<Type>(part);
    }
}

struct Parts {
    I raw, unclamped, magnitude, is_nan;  // magnitude: clamped to the format
};

template <int Type>
INLINE Parts parts(F real) {
    const I raw = (I)real, unclamped = raw & 0x7fffffff, largest = integers(Spec<Type>::largest);
    if constexpr (!Spec<Type>::has_sign)
        return {raw, unclamped, raw < 0 ? I{} : unclamped < largest ? unclamped : largest, unclamped > INFINITE};
    return {raw, unclamped, unclamped < largest ? unclamped : largest, unclamped > INFINITE};
}

// Puts the sign, and NaN where there was one, back on the code of a magnitude.
template <int Type>
INLINE I signed_code(I code, const Parts& of) {
    constexpr int shift = 32 - 8 * SIZE[Type];
    constexpr int nan = Type == FP16 ? 0x7e00 : Type == BF16 ? 0x7fc0 : Type == UE5M3 ? 0xfc : 0x7f;
    code = of.is_nan ? integers(nan) : code;
    if constexpr (!Spec<Type>::has_sign) return code;
    return code | ((I)((U)of.raw >> shift) & (0x80 << (8 * SIZE[Type] - 8)));
}

// The code of a value clamped to the format and rounded to nearest even; a NaN keeps its sign.
template <int Type>
INLINE I code_of(F real) {
    const Parts of = parts<Type>(real);
    constexpr int dropped = 23 - Spec<Type>::mantissa;
    constexpr int half = (1 << (dropped - 1)) - 1;
    const I normal = (of.magnitude + half + ((of.magnitude >> dropped) & 1)) >> dropped;
    if constexpr (Type == BF16) return signed_code<Type>(normal, of);
    // Below the normals, adding a number whose last bit is worth one step lets the adder round.
    constexpr int32_t adder = (Spec<Type>::smallest_field + dropped) << 23;
    constexpr int rebias = (Spec<Type>::smallest_field - 1) << Spec<Type>::mantissa;
    const I subnormal = (I)((F)of.magnitude + (F)integers(adder)) - adder;
    return signed_code<Type>(of.magnitude < (Spec<Type>::smallest_field << 23) ? subnormal : normal - rebias, of);
}

#if LANES == 16
INLINE __m512i gathered(__m512i a, __m512i b, __m512i c, __m512i d, __m512i index) {
    const __m256i first = _mm512_castsi512_si256(_mm512_permutex2var_epi8(a, index, b));
    const __m256i second = _mm512_castsi512_si256(_mm512_permutex2var_epi8(c, index, d));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// The same as code_of for the 8-bit formats, in fewer operations. A number whose last bit is worth one step of the
// value's binade is added, so that the adder rounds; its exponent gives the exponent of the code. Everything above the
// low byte of a lane is ignored, and signs are put in for 64 elements at once.
template <int Type>
INLINE void encode_bytes(uint8_t* to, const Group& real) {
    constexpr int dropped = 23 - Spec<Type>::mantissa;
    constexpr uint8_t excess = (uint8_t)((Spec<Type>::smallest_field + dropped) << Spec<Type>::mantissa);
    __m512i codes[4];
    for (int k = 0; k < 4; ++k) {
        const F limit = floats(float_of(Spec<Type>::largest));
        const F magnitude = (F)((I)real[k] & 0x7fffffff);
        const I clamped = (I)_mm512_min_ps(limit, magnitude);  // a NaN stays, as the second of two operands
        const I field = larger(clamped & 0x7f800000, integers(Spec<Type>::smallest_field << 23));
        const I adder = field + (dropped << 23);
        const I sum = (I)((F)clamped + (F)adder);
        const I code = sum - adder + (I)((U)adder >> dropped);
        const __mmask16 is_nan = _mm512_cmp_ps_mask(magnitude, magnitude, _CMP_UNORD_Q);
        codes[k] = _mm512_mask_mov_epi32((__m512i)code, is_nan, _mm512_set1_epi32(0x7f + excess));
    }
    alignas(64) static constexpr LowBytes LOW;  // the first byte of each of 32 lanes
    const __m512i low = load<__m512i>(LOW.index), top = _mm512_add_epi8(low, _mm512_set1_epi8(3));
    const __m512i code = _mm512_sub_epi8(gathered(codes[0], codes[1], codes[2], codes[3], low),
                                         _mm512_set1_epi8((char)excess));
    const __m512i sign = gathered((__m512i)real[0], (__m512i)real[1], (__m512i)real[2], (__m512i)real[3], top);
    store(to, _mm512_ternarylogic_epi64(code, sign, _mm512_set1_epi8((char)0x80), 0xf8));  // code | (sign & 0x80)
}
#endif

template <int Type>
INLINE void encode(uint8_t* to, const Group& real) {
    if constexpr (Type == FP32) {
        for (int k = 0; k < 4; ++k) {
            const Parts of = parts<Type>(real[k]);
            store(to + 4 * k * LANES, of.is_nan ? of.raw : of.magnitude | (of.raw ^ of.unclamped));
        }
        return;
    }
#if LANES == 16
    if constexpr (Type == E4M3 || Type == E5M2) return encode_bytes<Type>(to, real);
#endif
#if LANES >= 8
    if constexpr (Type == FP16) {
        for (int k = 0; k < 4; ++k) {
            const F limit = floats(65504.0f);  // of two operands, the second is returned where one is a NaN
#if LANES == 16
            const __m512 clamped = _mm512_max_ps(-limit, _mm512_min_ps(limit, real[k]));
            store(to + 2 * k * LANES, _mm512_cvtps_ph(clamped, _MM_FROUND_TO_NEAREST_INT));
#else
            const __m256 clamped = _mm256_max_ps(-limit, _mm256_min_ps(limit, real[k]));
            store(to + 2 * k * LANES, _mm256_cvtps_ph(clamped, _MM_FROUND_TO_NEAREST_INT));
#endif
        }
        return;
    }
#endif
    if constexpr (Type != FP32) {
        const I codes[4] = {code_of<Type>(real[0]), code_of<Type>(real[1]), code_of<Type>(real[2]),
                            code_of<Type>(real[3])};
        if constexpr (SIZE[Type] == 2)
            store_halves(to, codes);
        else
            store_bytes(to, codes);
    }
}

// Rounds to nearest even without a clamp, as a plain cast does: what a dequantized value becomes. `Exact` promises that
// BF16 holds every value.
template <int Type, bool Exact>
INLINE void cast(uint8_t* to, const Group& real) {
    static_assert(Type == FP32 || Type == BF16 || Type == FP16, "a value is read back as FP32, BF16 or FP16");
    I codes[4];
    for (int k = 0; k < 4; ++k) {
        const I raw = (I)real[k], magnitude = raw & 0x7fffffff, sign = (I)((U)raw >> 16) & 0x8000;
        if constexpr (Type == FP32) {
            store(to + 4 * k * LANES, real[k]);
        } else if constexpr (Type == BF16 && Exact) {
            codes[k] = (I)((U)raw >> 16);
        } else if constexpr (Type == BF16) {
            const I rounded = (magnitude + 0x7fff + ((magnitude >> 16) & 1)) >> 16;
            codes[k] = (magnitude > INFINITE ? integers(0x7fc0) : rounded) | sign;
        } else {
#if LANES == 16
            store(to + 2 * k * LANES, _mm512_cvtps_ph((__m512)real[k], _MM_FROUND_TO_NEAREST_INT));
#elif LANES == 8
            store(to + 2 * k * LANES, _mm256_cvtps_ph((__m256)real[k], _MM_FROUND_TO_NEAREST_INT));
#else
            const I infinite = (magnitude >= 0x477ff000) & (magnitude <= INFINITE);
            codes[k] = infinite ? sign | 0x7c00 : code_of<FP16>(real[k]);
#endif
        }
    }
    if constexpr (Type == BF16 || (Type == FP16 && LANES == 4)) store_halves(to, codes);
}
