// Codes of values scaled by their own amax, so known to be finite and within the format: cheaper than cpu_vectors.h and
// cpu_noise.h, to which the other instruction sets go. Part of cpu_kernels.h.

enum Half { UPPER, LOWER };  // of a random word

template <int Half>
INLINE I half_of(U word) {
    return Half == UPPER ? (I)(word >> 16) : (I)(word & 0xffff);
}

#if LANES == 16
// Four vectors whose lowest bytes are the codes' magnitudes plus an excess, and the values that give the signs.
INLINE __m512i packed_bytes(const I (&codes)[4]) {
    alignas(64) static constexpr LowBytes LOW;
    const __m512i low = load<__m512i>(LOW.index);
    return gathered((__m512i)codes[0], (__m512i)codes[1], (__m512i)codes[2], (__m512i)codes[3], low);
}

// Those bytes with the excess taken away and the signs of `signs` put in.
INLINE __m512i signed_bytes(__m512i bytes, const I (&signs)[4], int excess) {
    alignas(64) static constexpr LowBytes LOW;
    const __m512i top = _mm512_add_epi8(load<__m512i>(LOW.index), _mm512_set1_epi8(3));
    const __m512i sign = gathered((__m512i)signs[0], (__m512i)signs[1], (__m512i)signs[2], (__m512i)signs[3], top);
    const __m512i code = _mm512_sub_epi8(bytes, _mm512_set1_epi8((char)excess));
    return _mm512_ternarylogic_epi64(code, sign, _mm512_set1_epi8((char)0x80), 0xf8);  // code | (sign & 0x80)
}

// To nearest even. The adder's last bit is worth one step of the value's binade, so that the sum's lowest bits count
// the steps; the rest of the code is the adder's exponent.
template <int Type>
INLINE void encode_scaled_bytes(uint8_t* to, const Group& real) {
    constexpr int dropped = 23 - Spec<Type>::mantissa;
    I codes[4], signs[4];
    for (int k = 0; k < 4; ++k) {
        signs[k] = (I)real[k];
        const I field = larger(signs[k] & 0x7f800000, integers(Spec<Type>::smallest_field << 23));
        const I adder = (field + (dropped << 23)) | (signs[k] & (1 << 31));
        codes[k] = (I)(real[k] + (F)adder) + (I)((U)adder >> dropped);
    }
    constexpr int excess = (Spec<Type>::smallest_field + dropped) << Spec<Type>::mantissa;
    store(to, signed_bytes(packed_bytes(codes), signs, excess));
}

// Whether one of the values, none of them a NaN, is below the normal numbers (or, without a sign, negative).
template <int Type>
INLINE bool any_below_normal(const Group& real) {
    constexpr int least = Spec<Type>::has_sign ? 0x0a : 0x00;  // the smaller magnitude, or the smaller number
    const __m512 pairs[2] = {_mm512_range_ps((__m512)real[0], (__m512)real[1], least),
                             _mm512_range_ps((__m512)real[2], (__m512)real[3], least)};
    const F smallest = floats(float_of((uint32_t)Spec<Type>::smallest_field << 23));
    const __m512 all = _mm512_range_ps(pairs[0], pairs[1], least);
    return !_mm512_kortestz(_mm512_cmp_ps_mask(all, (__m512)smallest, _CMP_LT_OQ), 0);
}
#endif

// To nearest even.
template <int Type>
INLINE void encode_scaled(uint8_t* to, const Group& real) {
    if constexpr (Type == FP32) {
        for (int k = 0; k < 4; ++k) store(to + 4 * k * LANES, real[k]);
        return;
    }
#if LANES == 16
    if constexpr (Type == E4M3 || Type == E5M2) return encode_scaled_bytes<Type>(to, real);
    if constexpr (Type == FP16) {
        for (int k = 0; k < 4; ++k)
            store(to + 2 * k * LANES, _mm512_cvtps_ph((__m512)real[k], _MM_FROUND_TO_NEAREST_INT));
        return;
    }
#endif
    encode<Type>(to, real);
}

// Stochastically: a normal number's bits plus random ones below those that are kept, then cut off. Groups with a smaller
// number, whose steps are not those of its binade, take the general way.
template <int Type, int Half>
INLINE void encode_scaled_stochastically(uint8_t* to, const Group& real, const U* words) {
#if LANES == 16
    if constexpr (Type == FP16 || Type == UE5M3 || Type == E4M3) {
        if (__builtin_expect(!any_below_normal<Type>(real), 1)) {
            I codes[4], signs[4];
            for (int k = 0; k < 4; ++k) {
                if constexpr (Type == E4M3) {
                    signs[k] = (I)real[k];
                    codes[k] = ((signs[k] & 0x7fffffff) + (half_of<Half>(words[k]) << 4)) >> 20;
                } else if constexpr (Type == FP16) {
                    const I random = Half == UPPER ? (I)(words[k] >> 19) : (I)(words[k] >> 3 & 0x1fff);
                    store(to + 2 * k * LANES, _mm512_cvtps_ph((__m512)((I)real[k] + random), _MM_FROUND_TO_ZERO));
                } else {
                    const I random = Half == UPPER ? (I)(words[k] >> 12 & 0xffff0) : (I)(words[k] << 4 & 0xffff0);
                    codes[k] = (I)((U)((I)real[k] + random) >> 20);  // the excess is a multiple of 2^8
                }
            }
            static_assert(((Spec<UE5M3>::smallest_field - 1) << 3 & 0xff) == 0x80, "the excess of a byte");
            if constexpr (Type == UE5M3)
                store(to, _mm512_xor_si512(packed_bytes(codes), _mm512_set1_epi8((char)0x80)));
            if constexpr (Type == E4M3)
                store(to, signed_bytes(packed_bytes(codes), signs, (Spec<E4M3>::smallest_field - 1) << 3));
            return;
        }
    }
#endif
    I bits[4];
    for (int k = 0; k < 4; ++k) bits[k] = half_of<Half>(words[k]);
    encode_stochastically<Type>(to, real, bits);
}

#if LANES == 16
// A block of 128 FP16 codes as E4M3, as long as all become normal numbers; false: some do not, and nothing is said of
// what was written. `factor` is the power of two between the two scales. Raises `largest` to the values' magnitudes.
INLINE bool copy_halves_as_e4m3(const uint8_t* from, uint8_t* to, int factor, F scale_inv, I& largest) {
    if (factor < -20 || factor > 0) return false;  // FP16 is scaled to 65504, E4M3 to 448: less is below the normals
    const __m512i magnitudes = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1);
    const __m512i rebias = _mm512_set1_epi16((short)((factor - 8) * 1024)), half = _mm512_set1_epi16(63);
    const __m512i smallest = _mm512_set1_epi16(0x400), sign_bit = _mm512_set1_epi16(0x80);
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    __m512i top = _mm512_setzero_si512();
    __mmask32 small = 0;
    for (int part = 0; part < 2; ++part) {
        __m512i codes[2];
        for (int k = 0; k < 2; ++k) {
            const __m512i value = load<__m512i>(from + 128 * part + 64 * k);
            const __m512i magnitude = _mm512_and_si512(value, magnitudes);
            top = _mm512_max_epu16(top, magnitude);
            const __m512i moved = _mm512_add_epi16(magnitude, rebias);
            small |= _mm512_cmplt_epi16_mask(moved, smallest);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(moved, 7), one);
            const __m512i code = _mm512_srli_epi16(_mm512_add_epi16(_mm512_add_epi16(moved, half), odd), 7);
            codes[k] = _mm512_ternarylogic_epi64(code, _mm512_srli_epi16(value, 8), sign_bit, 0xf8);
        }
        store(to + 64 * part, _mm512_permutexvar_epi64(order, _mm512_packus_epi16(codes[0], codes[1])));
    }
    largest = larger((I)((F)_mm512_cvtph_ps(_mm512_castsi512_si256(top)) * scale_inv), largest);
    largest = larger((I)((F)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(top, 1)) * scale_inv), largest);
    return small == 0;
}
#endif
