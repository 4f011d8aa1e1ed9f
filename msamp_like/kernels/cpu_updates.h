// Fused steps of an optimizer over ranges of a parameter: one read and one write of each byte. Part of cpu_kernels.h.

// --- Adam on FP32 ---------------------------------------------------------------------------------------------------

struct Coefficients {
    F shrink, decay, beta1, rest1, beta2, rest2, rate, eps, ratio;
    bool adds, clamps;

    Coefficients(const Row& row, const AdamScalars& s)
        : shrink(floats(s.decoupled ? s.shrink : 1.0f)), decay(floats(s.weight_decay)), beta1(floats(s.beta1)),
          rest1(floats(s.rest1)), beta2(floats(s.beta2)), rest2(floats(s.rest2)), rate(floats(row.rate)),
          eps(floats(row.eps)), ratio(floats(row.ratio)), adds(s.weight_decay != 0 && !s.decoupled),
          clamps(row.residual) {}
};

INLINE F square_root(F value) {
#if LANES == 16
    return (F)_mm512_sqrt_ps((__m512)value);
#elif LANES == 8
    return (F)_mm256_sqrt_ps((__m256)value);
#else
    for (int lane = 0; lane < LANES; ++lane) value[lane] = __builtin_sqrtf(value[lane]);
    return value;
#endif
}

// Within [-limit, limit]; a NaN stays.
INLINE F clamped(F value, F limit) {
#if LANES == 16
    return (F)_mm512_max_ps(-limit, _mm512_min_ps(limit, value));  // of two operands, the second where one is a NaN
#endif
    value = value > limit ? limit : value;
    return value < -limit ? -limit : value;
}

// reference_updates.adam_update
template <bool Clamps>
INLINE void adam(F& param, F& first, F& second, F grad, const Coefficients& c) {
    if (c.adds) grad = grad + param * c.decay;
    param = param * c.shrink;
    first = first * c.beta1 + grad * c.rest1;
    second = second * c.beta2 + (grad * grad) * c.rest2;
    F quotient = first / (square_root(second) + c.eps);
    if constexpr (Clamps) quotient = clamped(quotient, c.ratio);
    param = param - quotient * c.rate;
}

// What differs from update to update: how many states it keeps, and what it does to a vector of each.
struct Adam {
    static constexpr int STATES = 2;
    const Coefficients c;

    Adam(const Row& row, const AdamScalars& scalars) : c(row, scalars) {}

    INLINE_MEMBER void operator()(F& param, F& first, F& second, F grad) const {
        c.clamps ? adam<true>(param, first, second, grad, c) : adam<false>(param, first, second, grad, c);
    }
};

// --- blocks of 128 in the formats of the levels: everything in registers and the first-level cache --------------------

constexpr int BLOCK = 128;
constexpr int VECTORS = BLOCK / LANES;

// The largest lane of each of three vectors, in the first three of four lanes.
typedef uint32_t Four __attribute__((vector_size(16)));

INLINE Four largest_lanes(const I (&values)[3]) {
#if LANES == 16
    __m128i parts[3];
    for (int k = 0; k < 3; ++k) {
        const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256((__m512i)values[k]),
                                              _mm512_extracti64x4_epi64((__m512i)values[k], 1));
        parts[k] = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    }
    const __m128i low = _mm_max_epi32(_mm_unpacklo_epi32(parts[0], parts[1]), _mm_unpackhi_epi32(parts[0], parts[1]));
    const __m128i high = _mm_max_epi32(_mm_unpacklo_epi32(parts[2], parts[2]), _mm_unpackhi_epi32(parts[2], parts[2]));
    return (Four)_mm_max_epi32(_mm_unpacklo_epi64(low, high), _mm_unpackhi_epi64(low, high));
#else
    return Four{(uint32_t)largest_lane(values[0]), (uint32_t)largest_lane(values[1]), (uint32_t)largest_lane(values[2]), 0};
#endif
}

// Exponents of the scales Rule{type}.scale_inv of finite amaxes, in the place of FP32's: (127 + exponent) << 23.
INLINE Four scales_of(Four amax, Four limit) {
    typedef int32_t Signed __attribute__((vector_size(16)));
    const Signed above = (Signed)(amax & 0x7fffff) > (Signed)(limit & 0x7fffff);  // -1 where it holds
    Signed exponent = (Signed)(limit >> 23) - (Signed)(amax >> 23) + above;
    exponent = exponent > 126 ? Signed{} + 126 : exponent;  // no finite amax asks for less than -126
    exponent = amax == 0 ? Signed{} : exponent;
    return (Four)((exponent + 127) << 23);
}

// What is stored now, encoded once more with the copy's scale; returns the largest magnitude so far.
template <int Param, int Copy>
INLINE I write_copy(const Row& row, int64_t block, F copy_scale, I largest) {
    const Stored& param = row.stored[0];
    const F scale_inv = floats(param.per_tile ? param.scale_inv[block] : param.next_scale_inv);
#if LANES == 16
    if constexpr (Param == FP16 && Copy == E4M3) {
        const int64_t place = block * BLOCK;
        const int factor = ((float_bits(param.scale_inv[block]) - float_bits(row.copy.next_scale_inv)) >> 23);
        if (copy_halves_as_e4m3(param.payload + 2 * place, row.copy.payload + place, factor, scale_inv, largest))
            return largest;
    }
#endif
    for (int64_t place = block * BLOCK; place < (block + 1) * BLOCK; place += GROUP) {
        Group real;
        decode<Param>(param.payload + place * SIZE[Param], real);
        for (int k = 0; k < 4; ++k) {
            real[k] = real[k] * scale_inv;
            largest = larger(magnitude_of(real[k]), largest);
            real[k] = real[k] * copy_scale;
        }
        encode<Copy>(row.copy.payload + place * SIZE[Copy], real);
    }
    return largest;
}

// --- an E4M3 weight and its residual: one number of 16 bits, sign, 4 and 11 -------------------------------------------

constexpr float TINY = 0x1p-120f;  // makes E4M3's smallest normal number FP32's
constexpr int SPLIT_DROPPED = 12;  // mantissa bits of FP32 that the 16 do not keep

INLINE void decode_split(const uint8_t* weight, const uint8_t* residual, Group& real) {
    for (int k = 0; k < 4; ++k) {
#if LANES == 16
        const __m256i code = _mm256_cvtepu8_epi16(load<__m128i>(weight + k * LANES));
        const __m256i rest = _mm256_cvtepi8_epi16(load<__m128i>(residual + k * LANES));
        const I number = (I)_mm512_cvtepi16_epi32(_mm256_add_epi16(_mm256_slli_epi16(code, 8), rest)) << SPLIT_DROPPED;
#else
        const I rest = (widened_bytes(residual + k * LANES) ^ 0x80) - 0x80;
        I number = widened_bytes(weight + k * LANES) << 8;
        number = (((number << 16) >> 16) + rest) << SPLIT_DROPPED;
#endif
        // the number's sign, spread over the upper bits, leaves the first of them to FP32
        real[k] = (F)(number & (I{} + (int32_t)0x87ffffff)) * floats(1 / TINY);
    }
}

// reference_updates.quantize_with_residual
template <bool Noisy>
INLINE void encode_split(uint8_t* weight, uint8_t* residual, const F* values, F scale, const U* words) {
    I numbers[4], signs[4];
    for (int k = 0; k < 4; ++k) {
        const F real = values[k] * scale;
        const I bits = (I)((F)magnitude_of(real) * floats(TINY));
        signs[k] = (I)real;
        if constexpr (Noisy)
            numbers[k] = bits + (I)(words[k] >> (32 - SPLIT_DROPPED));
        else
            numbers[k] = bits + ((1 << (SPLIT_DROPPED - 1)) - 1) + (bits >> SPLIT_DROPPED & 1);
        const I number = numbers[k] >> SPLIT_DROPPED, top = integers(0x7e7f);
        numbers[k] = (number > top ? top : number) + 128;
    }
#if LANES == 16
    alignas(64) static constexpr LowBytes LOW;
    const __m512i low = load<__m512i>(LOW.index), second = _mm512_add_epi8(low, _mm512_set1_epi8(1));
    const __m512i last = _mm512_add_epi8(low, _mm512_set1_epi8(3)), sign_bit = _mm512_set1_epi8((char)0x80);
    const __m512i code = gathered((__m512i)numbers[0], (__m512i)numbers[1], (__m512i)numbers[2], (__m512i)numbers[3], second);
    const __m512i sign = gathered((__m512i)signs[0], (__m512i)signs[1], (__m512i)signs[2], (__m512i)signs[3], last);
    store(weight, _mm512_ternarylogic_epi64(code, sign, sign_bit, 0xf8));  // code | (sign & 0x80)
    store(residual, _mm512_xor_si512(packed_bytes(numbers), sign_bit));
#else
    I codes[4], rest[4];
    for (int k = 0; k < 4; ++k) {
        codes[k] = numbers[k] >> 8 | ((I)((U)signs[k] >> 24) & 0x80);
        rest[k] = (numbers[k] & 0xff) ^ 0x80;
    }
    store_bytes(weight, codes);
    store_bytes(residual, rest);
#endif
}

// --- blocks of the levels ------------------------------------------------------------------------------------------

// Which of param, first and second moment (bits 0, 1, 2) are rounded stochastically.
enum { NEAREST = 0, SLOW_STATES = 5, ALL_STATES = 7 };

// One block between its update and its encoding.
struct Staged {
    F values[3][VECTORS];  // new, of param, first and second moment
    F scales[3];
    bool flagged[3];
};

// The steps of a row's blocks [low, high). A block is encoded, integer arithmetic, while the next is updated, where the
// divider binds: a group of the one after a group of the other, near enough for the processor to overlap them.
template <int Param, int First, int Second, int Grad, int Noisy, int Copy>
struct Blocks {
    Row& row;
    uint8_t *const payloads[4], *const residual;  // a store of bytes might change what `row` says of them
    float* const scale_invs[4];
    const bool grad_blocks;
    const Coefficients c;
    const F weight_scale, copy_scale;
    const Noise noises[2];  // of the parameter, whose words the second moment shares, and of the first moment
    const U lanes[2];
    I whole[4] = {};  // largest magnitudes, of param, moments and copy

    Blocks(Row& row, const AdamScalars& scalars)
        : row(row), payloads{row.stored[0].payload, row.stored[1].payload, row.stored[2].payload, row.stored[3].payload},
          residual((uint8_t*)row.residual), scale_invs{row.stored[0].scale_inv, row.stored[1].scale_inv,
                                                       row.stored[2].scale_inv, row.stored[3].scale_inv},
          grad_blocks(row.stored[3].per_tile), c(row, scalars), weight_scale(floats(1.0f / row.stored[0].next_scale_inv)),
          copy_scale(floats(1.0f / row.copy.next_scale_inv)), noises{row.stored[0].noise, row.stored[1].noise},
          lanes{weyl_lanes(noises[0]), weyl_lanes(noises[1])} {}

    template <int Type>
    INLINE_MEMBER F scale_of(int operand, int64_t block) const {
        // states in a format with a scale have one a block
        const bool blocks = operand == 3 ? grad_blocks : Type != FP32 && Type != BF16 && Type != SPLIT;
        return floats(scale_invs[operand][blocks ? block : 0]);
    }

    INLINE_MEMBER void update(int64_t place, int i, const F (&scales)[4], Staged& to, I (&largest)[3]) const {
        Group param, first, second, grad;
        if constexpr (Param == SPLIT)
            decode_split(payloads[0] + place, residual + place, param);
        else
            decode<Param>(payloads[0] + place * SIZE[Param], param);
        decode<First>(payloads[1] + place * SIZE[First], first);
        decode<Second>(payloads[2] + place * SIZE[Second], second);
        decode<Grad>(payloads[3] + place * SIZE[Grad], grad);
        for (int k = 0; k < 4; ++k) {
            F values[3] = {param[k] * scales[0], first[k] * scales[1], second[k] * scales[2]};
            adam<Param == SPLIT>(values[0], values[1], values[2], grad[k] * scales[3], c);
            for (int v = 0; v < 3; ++v) {
                to.values[v][i + k] = values[v];
                largest[v] = larger(magnitude_of(values[v]), largest[v]);
            }
        }
    }

    // New scales of a block, from the largest magnitudes of its new values.
    INLINE_MEMBER void scale(int64_t block, const I (&largest)[3], Staged& to) {
        constexpr int types[3] = {Param, First, Second};
        const Four amax = largest_lanes(largest);
        const Four limit = {(uint32_t)largest_bits(Param == SPLIT ? E4M3 : Param), (uint32_t)largest_bits(First),
                            (uint32_t)largest_bits(Second), 0};
        const Four scales = scales_of(amax, limit), inverses = (254u << 23) - scales;
        for (int k = 0; k < 3; ++k) {
            whole[k] = larger(largest[k], whole[k]);
            to.flagged[k] = false;
            if (types[k] == FP32 || types[k] == BF16 || types[k] == SPLIT) continue;
            to.flagged[k] = amax[k] >= (uint32_t)INFINITE;
            to.scales[k] = floats(float_of(scales[k]));
            scale_invs[k][block] = float_of(to.flagged[k] ? (uint32_t)INFINITE : inverses[k]);
        }
    }

    template <int Operand, int Type, int Half>
    INLINE_MEMBER void write(int64_t place, int i, const Staged& from, const U* words) const {
        uint8_t* payload = payloads[Operand] + place * SIZE[Type];
        if (__builtin_expect(from.flagged[Operand], 0)) {
            memset(payload, 0, GROUP * SIZE[Type]);
            return;
        }
        Group real;
        for (int k = 0; k < 4; ++k) {
            real[k] = from.values[Operand][i + k];
            if constexpr (Type != FP32 && Type != BF16) real[k] = real[k] * from.scales[Operand];
        }
        if constexpr ((Noisy >> Operand & 1) != 0 && Type != FP32)
            encode_scaled_stochastically<Type, Half>(payload, real, words);
        else
            encode_scaled<Type>(payload, real);
    }

    INLINE_MEMBER void encode(int64_t place, int i, const Staged& from) const {
        U words[4], others[4];
        for (int k = 0; k < 4 && Noisy; ++k) {
            words[k] = random_words(lanes[0], place + k * LANES, noises[0]);
            if constexpr ((Noisy & 2) != 0) others[k] = random_words(lanes[1], place + k * LANES, noises[1]);
        }
        if constexpr (Param == SPLIT)
            encode_split<(Noisy & 1) != 0>(payloads[0] + place, residual + place, from.values[0] + i, weight_scale,
                                           words);
        else
            write<0, Param, UPPER>(place, i, from, words);
        write<1, First, UPPER>(place, i, from, others);
        write<2, Second, LOWER>(place, i, from, words);
    }

    void run(int64_t low, int64_t high) {
        Staged staged[2];
        for (int64_t block = low; block <= high; ++block) {
            Staged &fresh = staged[block & 1], &ready = staged[~block & 1];
            const bool updates = block < high, encodes = block > low;
            const int64_t known = updates ? block : low;
            const F scales[4] = {scale_of<Param>(0, known), scale_of<First>(1, known), scale_of<Second>(2, known),
                                 scale_of<Grad>(3, known)};
            I largest[3] = {};
            for (int i = 0; i < VECTORS; i += 4) {
                const int64_t place = block * BLOCK + i * LANES;
                if (updates) update(place, i, scales, fresh, largest);
                if (encodes) encode(place - BLOCK, i, ready);
            }
            if (updates) {
                scale(block, largest, fresh);
            }
            if constexpr (Copy != TYPES)
                if (encodes) whole[3] = write_copy<Param, Copy>(row, block - 1, copy_scale, whole[3]);
        }
        for (int k = 0; k < 3; ++k) raise_to(&row.stored[k].amax, largest_lane(whole[k]));
        if constexpr (Copy != TYPES) raise_to(&row.copy.amax, largest_lane(whole[3]));
    }
};

template <int Param, int First, int Second, int Grad, int Noisy, int Copy>
static void step_blocks(Row& row, const AdamScalars& scalars, int64_t low, int64_t high) {
    Blocks<Param, First, Second, Grad, Noisy, Copy>(row, scalars).run(low, high);
}

typedef void (*StepBlocks)(Row&, const AdamScalars&, int64_t, int64_t);

#define STEPS_OF(Param, First, Second, Grad, Copy)                                  \
    {{Param, First, Second, Grad, Copy, NEAREST}, step_blocks<Param, First, Second, Grad, NEAREST, Copy>}, \
    {{Param, First, Second, Grad, Copy, SLOW_STATES}, step_blocks<Param, First, Second, Grad, SLOW_STATES, Copy>}, \
    {{Param, First, Second, Grad, Copy, ALL_STATES}, step_blocks<Param, First, Second, Grad, ALL_STATES, Copy>}

// The step that keeps a row's blocks in registers, for the formats that the levels store in; null for any other.
static StepBlocks blocks_of(const Row& row) {
    static const struct {
        int key[6];
        StepBlocks step;
    } KNOWN[] = {
        STEPS_OF(FP16, E4M3, FP16, E4M3, TYPES),  // O2
        STEPS_OF(FP16, E4M3, FP16, E4M3, E4M3),
        STEPS_OF(FP16, E4M3, FP16, BF16, E4M3),
        STEPS_OF(SPLIT, E4M3, UE5M3, E4M3, TYPES),  // lean
        STEPS_OF(SPLIT, E4M3, UE5M3, BF16, TYPES),
        STEPS_OF(FP32, FP32, FP32, FP32, TYPES),  // norms and biases
        STEPS_OF(FP32, FP32, FP32, BF16, BF16),   // O0
    };
    if (row.columns % BLOCK != 0 || row.tile != BLOCK) return nullptr;
    int key[6] = {row.residual ? SPLIT : row.stored[0].type, row.stored[1].type, row.stored[2].type,
                  row.stored[3].type, row.copy.payload ? row.copy.type : TYPES, 0};
    for (int k = 0; k < 3; ++k) {
        const Stored& stored = row.stored[k];
        if (stored.scale_unknown() && !(k == 0 && row.residual)) return nullptr;
        if (stored.noisy && stored.type != FP32) key[5] |= 1 << k;
    }
    if (row.copy.payload && row.copy.per_tile) return nullptr;
    // the roles of a master and a second moment: the two halves of one word
    const Noise &param = row.stored[0].noise, &second = row.stored[2].noise;
    const bool halves = param.lower_half || row.stored[1].noise.lower_half || !second.lower_half;
    if (key[5] != 0 && (halves || param.key0 != second.key0 || param.key1 != second.key1)) return nullptr;
    for (const auto& known : KNOWN)
        if (memcmp(known.key, key, sizeof(key)) == 0) return known.step;
    return nullptr;
}

#undef STEPS_OF
