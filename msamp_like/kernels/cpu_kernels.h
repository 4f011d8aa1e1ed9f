// Kernels over one range of elements, written once on GCC's vector types and included once per instruction set by
// cpu.cpp, which defines ISA (the namespace) and LANES (floats in one vector). No guard: it is meant to be read again.
//
// Every product, sum, quotient and root is its own FP32 rounding, so that the bytes equal those of reference.py. The
// build must not contract them (-ffp-contract=off) nor flush subnormals (no -ffast-math).

namespace ISA {

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

#define INLINE static inline __attribute__((always_inline))

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
INLINE F code_to_float(I code) {
#if LANES == 16
    return (F)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)(code << 7)));
#elif LANES == 8
    const __m256i halves = _mm256_packus_epi32((__m256i)(code << 7), (__m256i)(code << 7));
    return (F)_mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0xd8)));
#else
    return (F)code;  // not called: this instruction set has no conversion
#endif
}

template <int Type>
INLINE F byte_to_float(const uint8_t* from) {
    const I code = widened_bytes(from);
    if constexpr (Type == UE5M3 && LANES >= 8) return code_to_float(code);
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

// --- random bits ----------------------------------------------------------------------------------------------------

// reference.random_bits before a half is taken: the words of elements `index` of a stream.
INLINE U random_words(U index, const Noise& noise) {
    U word = index * 0x9E3779B9u + noise.key0;
    word = (word ^ word >> 16) * 0x7FEB352Du;
    word = (word ^ word >> 15 ^ noise.key1) * 0x846CA68Bu;
    return word ^ word >> 16;
}

// 16 random bits for each of the elements start ... start + n - 1, in order. Writes whole groups.
static void random_bits(uint16_t* bits, uint64_t start, int64_t n, const Noise& noise) {
    for (int64_t done = 0; done < n; done += GROUP) {
        I halves[4];
        for (int k = 0; k < 4; ++k) {
            const U word = random_words((U)lane_numbers() + (uint32_t)(start + done + k * LANES), noise);
            halves[k] = (I)(noise.lower_half ? word & 0xffff : word >> 16);
        }
        store_halves((uint8_t*)(bits + done), halves);
    }
}

// reference.round_stochastically, then the code of its result: the steps counted from the format's smallest binade.
template <int Type>
INLINE I stochastic_code(F real, const uint16_t* bits) {
    constexpr int mantissa = Spec<Type>::mantissa, smallest = Spec<Type>::stochastic_field;
    constexpr int kept = 23 - mantissa < 16 ? 23 - mantissa : 16;
    const Parts of = parts<Type>(real);
    const F uniform = __builtin_convertvector(widened_halves(bits) >> (16 - kept), F) * floats(1.0f / (1 << kept));
    const I field = larger(of.magnitude >> 23, integers(smallest));
    const F steps_per_unit = (F)((254 + mantissa - field) << 23);
    const F steps = (F)of.magnitude * steps_per_unit + uniform;  // not negative: truncation is floor
    const I whole = __builtin_convertvector(steps, I);
    if constexpr (Type == BF16) {
        const I rounded = (I)(__builtin_convertvector(whole, F) * (F)((field - mantissa) << 23));
        return signed_code<Type>((I)((U)rounded >> 16), of);
    }
    return signed_code<Type>(whole + ((field - smallest) << mantissa), of);
}

template <int Type>
INLINE void encode_stochastically(uint8_t* to, const Group& real, const uint16_t* bits) {
    I codes[4];
    for (int k = 0; k < 4; ++k) codes[k] = stochastic_code<Type>(real[k], bits + k * LANES);
    if constexpr (SIZE[Type] == 2)
        store_halves(to, codes);
    else
        store_bytes(to, codes);
}

// --- runs: contiguous elements under one scale ----------------------------------------------------------------------

enum Mode { PLAIN, NOISY, WITH_AMAX, MODES };

template <int In, int Out, int Mode>
INLINE I encode_group(const uint8_t* x, uint8_t* payload, F scale, const uint16_t* bits, I amax) {
    Group real;
    decode<In>(x, real);
    for (int k = 0; k < 4; ++k) {
        if constexpr (Mode == WITH_AMAX) amax = larger((I)real[k] & 0x7fffffff, amax);
        real[k] = real[k] * scale;
    }
    if constexpr (Mode == NOISY && Out != FP32)
        encode_stochastically<Out>(payload, real, bits);
    else
        encode<Out>(payload, real);
    return amax;
}

// Returns the bits of amax (above INFINITE: the run holds a NaN) in mode WITH_AMAX, else 0. May read `bits` up to the
// end of the last group.
template <int In, int Out, int Mode>
static uint32_t encode_run(const uint8_t* x, uint8_t* payload, int64_t n, float scale, const uint16_t* bits) {
    const F scales = floats(scale);
    I amax = I{};
    int64_t i = 0;
    for (; i + GROUP <= n; i += GROUP)
        amax = encode_group<In, Out, Mode>(x + i * SIZE[In], payload + i * SIZE[Out], scales, bits + i, amax);
    if (i < n) {
        uint8_t from[4 * GROUP] = {0}, to[4 * GROUP];
        memcpy(from, x + i * SIZE[In], (n - i) * SIZE[In]);
        amax = encode_group<In, Out, Mode>(from, to, scales, bits + i, amax);
        memcpy(payload + i * SIZE[Out], to, (n - i) * SIZE[Out]);
    }
    return Mode == WITH_AMAX ? (uint32_t)largest_lane(amax) : 0;
}

template <int In>
static uint32_t amax_run(const uint8_t* x, int64_t n) {
    I amax[4] = {};
    for (int64_t i = 0; i < n; i += GROUP) {
        uint8_t rest[4 * GROUP];
        const uint8_t* from = x + i * SIZE[In];
        if (n - i < GROUP) {
            memset(rest, 0, sizeof(rest));
            memcpy(rest, from, (n - i) * SIZE[In]);
            from = rest;
        }
        Group real;
        decode<In>(from, real);
        for (int k = 0; k < 4; ++k) amax[k] = larger((I)real[k] & 0x7fffffff, amax[k]);
    }
    return (uint32_t)largest_lane(larger(larger(amax[0], amax[1]), larger(amax[2], amax[3])));
}

template <int In, int Out, bool Exact>
static void decode_exactly(const uint8_t* payload, uint8_t* real, int64_t n, F scale_inv) {
    Group values;
    int64_t i = 0;
    for (; i + GROUP <= n; i += GROUP) {
        decode<In>(payload + i * SIZE[In], values);
        for (int k = 0; k < 4; ++k) values[k] = values[k] * scale_inv;
        cast<Out, Exact>(real + i * SIZE[Out], values);
    }
    if (i < n) {
        uint8_t from[4 * GROUP] = {0}, to[4 * GROUP];
        memcpy(from, payload + i * SIZE[In], (n - i) * SIZE[In]);
        decode<In>(from, values);
        for (int k = 0; k < 4; ++k) values[k] = values[k] * scale_inv;
        cast<Out, Exact>(to, values);
        memcpy(real + i * SIZE[Out], to, (n - i) * SIZE[Out]);
    }
}

template <int In, int Out>
static void decode_run(const uint8_t* payload, uint8_t* real, int64_t n, float scale_inv) {
    // 8-bit values have at most 4 significant bits and lie above 2^-17: times a power of two above 2^-100, or a flag,
    // they are BF16 numbers.
    const uint32_t scale_bits = float_bits(scale_inv);
    const bool exact = Out == BF16 && SIZE[In] == 1 && (scale_bits & 0x7fffff) == 0 && scale_bits > (27u << 23);
    if (exact)
        decode_exactly<In, Out, Out == BF16 && SIZE[In] == 1>(payload, real, n, floats(scale_inv));
    else
        decode_exactly<In, Out, false>(payload, real, n, floats(scale_inv));
}

typedef uint32_t (*EncodeRun)(const uint8_t*, uint8_t*, int64_t, float, const uint16_t*);
typedef uint32_t (*AmaxRun)(const uint8_t*, int64_t);
typedef void (*DecodeRun)(const uint8_t*, uint8_t*, int64_t, float);

#define MODES_OF(In, Out) \
    { encode_run<In, Out, PLAIN>, encode_run<In, Out, NOISY>, encode_run<In, Out, WITH_AMAX> }
#define ENCODERS_OF(In) \
    { MODES_OF(In, FP32), MODES_OF(In, BF16), MODES_OF(In, FP16), MODES_OF(In, E4M3), MODES_OF(In, E5M2), \
      MODES_OF(In, UE5M3) }
#define DECODERS_OF(In) \
    { decode_run<In, FP32>, decode_run<In, BF16>, decode_run<In, FP16> }

static const EncodeRun ENCODERS[3][TYPES][MODES] = {ENCODERS_OF(FP32), ENCODERS_OF(BF16), ENCODERS_OF(FP16)};
static const AmaxRun AMAXES[TYPES] = {amax_run<FP32>, amax_run<BF16>, amax_run<FP16>, amax_run<E4M3>, amax_run<E5M2>,
                                       amax_run<UE5M3>};
static const DecodeRun DECODERS[TYPES][3] = {
    DECODERS_OF(FP32), DECODERS_OF(BF16), DECODERS_OF(FP16), DECODERS_OF(E4M3), DECODERS_OF(E5M2), DECODERS_OF(UE5M3)};

#undef MODES_OF
#undef ENCODERS_OF
#undef DECODERS_OF

// --- ranges: elements [low, high) of a tensor, cut into runs --------------------------------------------------------

// quantize one run; the random bits are drawn a piece at a time so that they stay in the first-level cache. `start` is
// the run's place in its tensor, which is what the random stream is indexed by. Returns the bits of amax if it was
// asked for.
static uint32_t quantize_run(int in, const uint8_t* x, int out, uint8_t* payload, int64_t start, int64_t n,
                             float scale_inv, const Noise* noise, bool with_amax) {
    if (!finite(scale_inv)) {
        memset(payload, 0, n * SIZE[out]);
        return with_amax ? AMAXES[in](x, n) : 0;
    }
    const float scale = 1.0f / scale_inv;
    if (!noise) return ENCODERS[in][out][with_amax ? WITH_AMAX : PLAIN](x, payload, n, scale, nullptr);
    uint16_t bits[TILE + GROUP];
    for (int64_t done = 0; done < n; done += TILE) {
        const int64_t count = n - done < TILE ? n - done : TILE;
        random_bits(bits, start + done, count, *noise);
        ENCODERS[in][out][NOISY](x + done * SIZE[in], payload + done * SIZE[out], count, scale, bits);
    }
    return 0;
}

typedef void (*Part)(const Cast&, int64_t, int64_t, uint8_t*);

// Around the caches: a large result would only push out what the next step needs, and a plain store reads its line
// first.
static void stream(uint8_t* to, const uint8_t* from, int64_t bytes) {
    int64_t done = 0;
#if LANES >= 8
    if ((uintptr_t)to % sizeof(F) == 0)
        for (; done + (int64_t)sizeof(F) <= bytes; done += sizeof(F))
#if LANES == 16
            _mm512_stream_si512((__m512i*)(to + done), load<__m512i>(from + done));
#else
            _mm256_stream_si256((__m256i*)(to + done), load<__m256i>(from + done));
#endif
#endif
    memcpy(to + done, from + done, bytes - done);
}

// Calls part(cast, low, high, to), `to` being where element `low` goes: the result itself, or a piece of cache to
// stream.
static void staged(Part part, const Cast& cast, int64_t low, int64_t high) {
    const int64_t size = SIZE[cast.out];
    if (!cast.streams) return part(cast, low, high, cast.to + low * size);
    alignas(64) uint8_t stage[4 * TILE];
    for (int64_t start = low; start < high; start += TILE) {
        const int64_t end = start + TILE < high ? start + TILE : high;
        part(cast, start, end, stage);
        stream(cast.to + start * size, stage, (end - start) * size);
    }
#if LANES >= 8
    _mm_sfence();
#endif
}

static void quantize_part(const Cast& cast, int64_t low, int64_t high, uint8_t* to) {
    for (Run run(cast.grid, low, high); run.start < high; run.next()) {
        const uint32_t amax = quantize_run(cast.in, cast.from + run.start * SIZE[cast.in], cast.out,
                                           to + (run.start - low) * SIZE[cast.out], run.start, run.length(),
                                           cast.scale_inv[run.block], cast.noise, cast.amax != nullptr);
        if (cast.amax) raise_to(cast.amax + run.block, amax);
    }
}

// Whole blocks, each read from memory once: its amax, its scale, then its payload while it is in the cache.
static void quantize_current_part(const Cast& cast, int64_t low, int64_t high, uint8_t* to) {
    for (Run run(cast.grid, low, high); run.start < high; run.next()) {
        const uint8_t* x = cast.from + run.start * SIZE[cast.in];
        cast.amax[run.block] = AMAXES[cast.in](x, run.length());
        cast.scale_inv[run.block] = cast.rule.scale_inv(cast.amax[run.block]);
        quantize_run(cast.in, x, cast.out, to + (run.start - low) * SIZE[cast.out], run.start, run.length(),
                     cast.scale_inv[run.block], cast.noise, false);
    }
}

static void dequantize_part(const Cast& cast, int64_t low, int64_t high, uint8_t* to) {
    for (Run run(cast.grid, low, high); run.start < high; run.next())
        DECODERS[cast.in][cast.out](cast.from + run.start * SIZE[cast.in], to + (run.start - low) * SIZE[cast.out],
                                    run.length(), cast.scale_inv[run.block]);
}

static void amax_range(const Cast& cast, int64_t low, int64_t high) {
    for (Run run(cast.grid, low, high); run.start < high; run.next())
        raise_to(cast.amax + run.block, AMAXES[cast.in](cast.from + run.start * SIZE[cast.in], run.length()));
}

static void quantize_range(const Cast& cast, int64_t low, int64_t high) { staged(quantize_part, cast, low, high); }
static void quantize_current_range(const Cast& cast, int64_t low, int64_t high) {
    staged(quantize_current_part, cast, low, high);
}
static void dequantize_range(const Cast& cast, int64_t low, int64_t high) { staged(dequantize_part, cast, low, high); }

static const Kernels KERNELS = {amax_range, quantize_range, quantize_current_range, dequantize_range};

#undef INLINE
}  // namespace ISA
