// Kernels over one range of elements, written once on GCC's vector types and included once per instruction set by
// cpu.cpp, which defines ISA (the namespace) and LANES (floats in one vector). No guard: it is meant to be read again.
//
// Every product, sum, quotient and root is its own FP32 rounding, so that the bytes equal those of reference.py. The
// build must not contract them (-ffp-contract=off) nor flush subnormals (no -ffast-math).

namespace ISA {

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint64_t Q __attribute__((vector_size(4 * LANES)));
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

INLINE I lane_numbers() {
    I numbers;
    for (int lane = 0; lane < LANES; ++lane) numbers[lane] = lane;
    return numbers;
}

INLINE int32_t largest_lane(I value) {
    int32_t largest = value[0];
    for (int lane = 1; lane < LANES; ++lane) largest = value[lane] > largest ? value[lane] : largest;
    return largest;
}

// --- one vector of elements <-> FP32 --------------------------------------------------------------------------------

template <int Type>
INLINE F decode(const uint8_t* from) {
    if constexpr (Type == FP32) {
        return load<F>(from);
    } else if constexpr (Type == BF16) {
        return (F)(__builtin_convertvector(load<Halves>(from), U) << 16);
    } else if constexpr (Type == FP16) {
#if LANES == 16
        return (F)_mm512_cvtph_ps(load<__m256i>(from));
#elif LANES == 8
        return (F)_mm256_cvtph_ps(load<__m128i>(from));
#else
        const I code = (I)__builtin_convertvector(load<Halves>(from), U);
        const I magnitude = code & 0x7fff;
        const I normal = (magnitude << 13) + (112 << 23);
        const I subnormal = (I)(__builtin_convertvector(magnitude, F) * floats(0x1p-24f));
        I value = magnitude < 0x400 ? subnormal : normal;
        value = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : value;
        return (F)(value | (code & 0x8000) << 16);
#endif
    } else {
        const I code = (I)__builtin_convertvector(load<Bytes>(from), U);
        const I magnitude = code & 0x7f;
        constexpr int mantissa = Spec<Type>::mantissa;
        const I normal = (magnitude << (23 - mantissa)) + ((Spec<Type>::smallest_field - 1) << 23);
        const I subnormal = (I)(__builtin_convertvector(magnitude, F) * floats(Spec<Type>::step));
        I value = magnitude < (1 << mantissa) ? subnormal : normal;
        if constexpr (Type == E5M2)
            value = magnitude >= 0x7c ? (magnitude << 21) | 0x7f800000 : value;
        else
            value = magnitude == 0x7f ? integers(0x7fc00000) : value;
        return (F)(value | (code & 0x80) << 24);
    }
}

// Clamps to the format, then rounds to nearest even; a NaN keeps its sign.
template <int Type>
INLINE void encode(uint8_t* to, F real) {
    const I raw = (I)real;
    const I unclamped = raw & 0x7fffffff;
    const I magnitude = unclamped > Spec<Type>::largest ? integers(Spec<Type>::largest) : unclamped;
    const I is_nan = unclamped > 0x7f800000;
    if constexpr (Type == FP32) {
        store(to, is_nan ? raw : magnitude | (raw ^ unclamped));
    } else if constexpr (Type == BF16) {
        I rounded = (magnitude + 0x7fff + ((magnitude >> 16) & 1)) >> 16;
        rounded = is_nan ? integers(0x7fc0) : rounded;
        rounded |= (I)((U)(raw ^ unclamped) >> 16);
        store(to, __builtin_convertvector((U)rounded, Halves));
    } else {
        constexpr int dropped = 23 - Spec<Type>::mantissa;
        constexpr int sign_shift = Type == FP16 ? 16 : 24;
        constexpr int half = (1 << (dropped - 1)) - 1;
        constexpr int rebias = (Spec<Type>::smallest_field - 1) << Spec<Type>::mantissa;
        // Below the normals, adding a number whose last bit is worth one step lets the adder round.
        constexpr int32_t adder = (Spec<Type>::smallest_field + dropped) << 23;
        const I normal = ((magnitude + half + ((magnitude >> dropped) & 1)) >> dropped) - rebias;
        const I subnormal = (I)((F)magnitude + (F)integers(adder)) - adder;
        I code = magnitude < (Spec<Type>::smallest_field << 23) ? subnormal : normal;
        code = is_nan ? integers(Type == FP16 ? 0x7e00 : 0x7f) : code;
        code |= (I)((U)(raw ^ unclamped) >> sign_shift);
        if constexpr (Type == FP16)
            store(to, __builtin_convertvector((U)code, Halves));
        else
            store(to, __builtin_convertvector((U)code, Bytes));
    }
}

// Rounds to nearest even without a clamp, as a plain cast does: what a dequantized value becomes.
template <int Type>
INLINE void cast(uint8_t* to, F real) {
    if constexpr (Type == FP32) {
        store(to, real);
    } else {
        static_assert(Type == BF16 || Type == FP16, "a value is read back as FP32, BF16 or FP16");
        const I raw = (I)real;
        const I magnitude = raw & 0x7fffffff;
        if constexpr (Type == BF16) {
            I rounded = (magnitude + 0x7fff + ((magnitude >> 16) & 1)) >> 16;
            rounded = magnitude > 0x7f800000 ? integers(0x7fc0) : rounded;
            rounded |= (I)((U)(raw ^ magnitude) >> 16);
            store(to, __builtin_convertvector((U)rounded, Halves));
        } else {
#if LANES == 16
            store(to, _mm512_cvtps_ph((__m512)real, _MM_FROUND_TO_NEAREST_INT));
#elif LANES == 8
            store(to, _mm256_cvtps_ph((__m256)real, _MM_FROUND_TO_NEAREST_INT));
#else
            encode<FP16>(to, real);
            Halves code = load<Halves>(to);
            const I infinite = (magnitude >= 0x477ff000) & (magnitude <= 0x7f800000);
            const I overflow = integers(0x7c00) | (I)((U)(raw ^ magnitude) >> 16);
            const I exact = (I)__builtin_convertvector(code, U);
            store(to, __builtin_convertvector((U)(infinite ? overflow : exact), Halves));
#endif
        }
    }
}

// --- random bits ----------------------------------------------------------------------------------------------------

INLINE Q wide_product(Q words, uint32_t multiplier) {
#if LANES == 16
    return (Q)_mm512_mul_epu32((__m512i)words, (__m512i)(Q{} + multiplier));
#elif LANES == 8
    return (Q)_mm256_mul_epu32((__m256i)words, (__m256i)(Q{} + multiplier));
#else
    return (words & 0xffffffffu) * multiplier;
#endif
}

// 16 random bits for each of the elements 8 * counter ... 8 * (counter + counters) - 1, in order. Writes whole groups of
// LANES / 2 counters: `bits` needs room for 4 * LANES elements past the end.
static void random_bits(uint16_t* bits, uint64_t counter, int64_t counters, const Noise& noise) {
    constexpr int GROUP = LANES / 2;  // counters in one vector, one in each 64-bit lane
    for (int64_t done = 0; done < counters; done += GROUP) {
        Q word0, word1 = Q{} + noise.step, word2 = Q{} + noise.role, word3 = Q{};
        for (int lane = 0; lane < GROUP; ++lane) word0[lane] = counter + done + lane;
        uint32_t key0 = noise.seed, key1 = noise.tensor;
        // The upper halves of the 64-bit lanes hold leftovers; the multiplication reads the lower halves only.
        for (int round = 0; round < 10; ++round) {
            const Q product0 = wide_product(word0, 0xD2511F53u), product1 = wide_product(word2, 0xCD9E8D57u);
            word0 = (product1 >> 32) ^ word1 ^ (Q{} + key0);
            word2 = (product0 >> 32) ^ word3 ^ (Q{} + key1);
            word1 = product1;
            word3 = product0;
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        const Q low = (word0 & 0xffffffffu) | word1 << 32, high = (word2 & 0xffffffffu) | word3 << 32;
        uint64_t* out = (uint64_t*)(bits + 8 * done);
        for (int lane = 0; lane < GROUP; ++lane) {
            memcpy(out + 2 * lane, &low[lane], 8);
            memcpy(out + 2 * lane + 1, &high[lane], 8);
        }
    }
}

// reference.round_stochastically for one vector.
template <int Type>
INLINE F round_stochastically(F real, const uint16_t* bits) {
    constexpr int mantissa = Spec<Type>::mantissa;
    constexpr int kept = 23 - mantissa < 16 ? 23 - mantissa : 16;
    const I random = (I)(__builtin_convertvector(load<Halves>(bits), U) >> (16 - kept));
    const F uniform = __builtin_convertvector(random, F) * floats(1.0f / (1 << kept));
    const I raw = (I)real;
    const I unclamped = raw & 0x7fffffff;
    const I magnitude = unclamped > Spec<Type>::largest ? integers(Spec<Type>::largest) : unclamped;
    I field = magnitude >> 23;
    field = field < Spec<Type>::stochastic_field ? integers(Spec<Type>::stochastic_field) : field;
    const F steps_per_unit = (F)((254 + mantissa - field) << 23);
    const F unit = (F)((field - mantissa) << 23);
    const I steps = __builtin_convertvector((F)magnitude * steps_per_unit + uniform, I);  // not negative: truncation is floor
    const I rounded = (I)(__builtin_convertvector(steps, F) * unit) | (raw ^ unclamped);
    return (F)(unclamped > 0x7f800000 ? raw : rounded);
}

// --- runs: contiguous elements under one scale ----------------------------------------------------------------------

enum Mode { PLAIN, NOISY, WITH_AMAX, MODES };

// Returns the bits of amax (above 0x7f800000: the run holds a NaN) in mode WITH_AMAX, else 0.
template <int In, int Out, int Mode>
static uint32_t encode_run(const uint8_t* x, uint8_t* payload, int64_t n, float scale, const uint16_t* bits) {
    const F scales = floats(scale);
    I amax = I{};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const F real = decode<In>(x + i * SIZE[In]);
        if constexpr (Mode == WITH_AMAX) {
            const I magnitude = (I)real & 0x7fffffff;
            amax = magnitude > amax ? magnitude : amax;
        }
        F scaled = real * scales;
        if constexpr (Mode == NOISY && Out != FP32) scaled = round_stochastically<Out>(scaled, bits + i);
        encode<Out>(payload + i * SIZE[Out], scaled);
    }
    if (i < n) {
        uint8_t from[4 * LANES] = {0}, to[4 * LANES];
        memcpy(from, x + i * SIZE[In], (n - i) * SIZE[In]);
        const F real = decode<In>(from);
        if constexpr (Mode == WITH_AMAX) {
            const I magnitude = (I)real & 0x7fffffff;
            amax = magnitude > amax ? magnitude : amax;
        }
        F scaled = real * scales;
        if constexpr (Mode == NOISY && Out != FP32) scaled = round_stochastically<Out>(scaled, bits + i);
        encode<Out>(to, scaled);
        memcpy(payload + i * SIZE[Out], to, (n - i) * SIZE[Out]);
    }
    return Mode == WITH_AMAX ? (uint32_t)largest_lane(amax) : 0;
}

template <int In>
static uint32_t amax_run(const uint8_t* x, int64_t n) {
    I amax[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int k = 0; k < 4; ++k) {
            const I magnitude = (I)decode<In>(x + (i + k * LANES) * SIZE[In]) & 0x7fffffff;
            amax[k] = magnitude > amax[k] ? magnitude : amax[k];
        }
    for (; i < n; i += LANES) {
        uint8_t from[4 * LANES] = {0};
        memcpy(from, x + i * SIZE[In], (n - i < LANES ? n - i : LANES) * SIZE[In]);
        const I magnitude = (I)decode<In>(from) & 0x7fffffff;
        amax[0] = magnitude > amax[0] ? magnitude : amax[0];
    }
    for (int k = 1; k < 4; ++k) amax[0] = amax[k] > amax[0] ? amax[k] : amax[0];
    return (uint32_t)largest_lane(amax[0]);
}

template <int In, int Out>
static void decode_run(const uint8_t* payload, uint8_t* real, int64_t n, float scale_inv) {
    const F scales = floats(scale_inv);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) cast<Out>(real + i * SIZE[Out], decode<In>(payload + i * SIZE[In]) * scales);
    if (i < n) {
        uint8_t from[4 * LANES] = {0}, to[4 * LANES];
        memcpy(from, payload + i * SIZE[In], (n - i) * SIZE[In]);
        cast<Out>(to, decode<In>(from) * scales);
        memcpy(real + i * SIZE[Out], to, (n - i) * SIZE[Out]);
    }
}

typedef uint32_t (*EncodeRun)(const uint8_t*, uint8_t*, int64_t, float, const uint16_t*);
typedef uint32_t (*AmaxRun)(const uint8_t*, int64_t);
typedef void (*DecodeRun)(const uint8_t*, uint8_t*, int64_t, float);

#define MODES_OF(In, Out) \
    { encode_run<In, Out, PLAIN>, encode_run<In, Out, NOISY>, encode_run<In, Out, WITH_AMAX> }
#define ENCODERS_OF(In) \
    { MODES_OF(In, FP32), MODES_OF(In, BF16), MODES_OF(In, FP16), MODES_OF(In, E4M3), MODES_OF(In, E5M2) }
#define DECODERS_OF(In) \
    { decode_run<In, FP32>, decode_run<In, BF16>, decode_run<In, FP16> }

static const EncodeRun ENCODERS[3][TYPES][MODES] = {ENCODERS_OF(FP32), ENCODERS_OF(BF16), ENCODERS_OF(FP16)};
static const AmaxRun AMAXES[TYPES] = {amax_run<FP32>, amax_run<BF16>, amax_run<FP16>, amax_run<E4M3>, amax_run<E5M2>};
static const DecodeRun DECODERS[TYPES][3] = {
    DECODERS_OF(FP32), DECODERS_OF(BF16), DECODERS_OF(FP16), DECODERS_OF(E4M3), DECODERS_OF(E5M2)};

#undef MODES_OF
#undef ENCODERS_OF
#undef DECODERS_OF

// --- ranges: elements [low, high) of a tensor, cut into runs --------------------------------------------------------

// quantize one run; the random bits are drawn a piece at a time so that they stay in the first-level cache. `start` is the
// run's place in its tensor, which is what the random stream is indexed by. Returns the bits of amax if it was asked for.
static uint32_t quantize_run(int in, const uint8_t* x, int out, uint8_t* payload, int64_t start, int64_t n,
                             float scale_inv, const Noise* noise, bool with_amax) {
    if (!finite(scale_inv)) {
        memset(payload, 0, n * SIZE[out]);
        return with_amax ? AMAXES[in](x, n) : 0;
    }
    const float scale = 1.0f / scale_inv;
    if (!noise) return ENCODERS[in][out][with_amax ? WITH_AMAX : PLAIN](x, payload, n, scale, nullptr);
    uint16_t bits[TILE + 8 + 4 * LANES];
    for (int64_t done = 0; done < n; done += TILE) {
        const int64_t count = n - done < TILE ? n - done : TILE, offset = (start + done) % 8;
        random_bits(bits, (start + done) / 8, (offset + count + 7) / 8, *noise);
        ENCODERS[in][out][NOISY](x + done * SIZE[in], payload + done * SIZE[out], count, scale, bits + offset);
    }
    return 0;
}

static void quantize_range(const Cast& cast, int64_t low, int64_t high) {
    for (int64_t start = low; start < high;) {
        const Run run = cast.grid.run(start, high);
        const uint32_t amax = quantize_run(cast.in, cast.from + start * SIZE[cast.in], cast.out,
                                           cast.to + start * SIZE[cast.out], start, run.end - start,
                                           cast.scale_inv[run.block], cast.noise, cast.amax != nullptr);
        if (cast.amax) raise_to(cast.amax + run.block, amax);
        start = run.end;
    }
}

static void amax_range(const Cast& cast, int64_t low, int64_t high) {
    for (int64_t start = low; start < high;) {
        const Run run = cast.grid.run(start, high);
        raise_to(cast.amax + run.block, AMAXES[cast.in](cast.from + start * SIZE[cast.in], run.end - start));
        start = run.end;
    }
}

// Whole blocks, each read from memory once: its amax, its scale, then its payload while it is in the cache.
static void quantize_current_range(const Cast& cast, int64_t low, int64_t high) {
    for (int64_t start = low; start < high;) {
        const Run run = cast.grid.run(start, high);
        const int64_t n = run.end - start;
        const uint8_t* x = cast.from + start * SIZE[cast.in];
        cast.amax[run.block] = AMAXES[cast.in](x, n);
        cast.scale_inv[run.block] = cast.rule.scale_inv(cast.amax[run.block]);
        quantize_run(cast.in, x, cast.out, cast.to + start * SIZE[cast.out], start, n, cast.scale_inv[run.block],
                     cast.noise, false);
        start = run.end;
    }
}

static void dequantize_range(const Cast& cast, int64_t low, int64_t high) {
    for (int64_t start = low; start < high;) {
        const Run run = cast.grid.run(start, high);
        DECODERS[cast.in][cast.out](cast.from + start * SIZE[cast.in], cast.to + start * SIZE[cast.out],
                                    run.end - start, cast.scale_inv[run.block]);
        start = run.end;
    }
}

// --- Adam -----------------------------------------------------------------------------------------------------------

struct Values {  // one tile of the four operands in FP32; after update() the new values
    alignas(64) float param[TILE], grad[TILE], first[TILE], second[TILE];
    uint32_t amax[3];  // bits, of param, first, second
};

INLINE I magnitude_below(F value, I lanes, int64_t count) {
    const I magnitude = (I)value & 0x7fffffff;
    return count >= LANES ? magnitude : (lanes < (int32_t)count ? magnitude : I{});
}

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

// reference.adam_update on `n` elements; the vectors past n hold whatever was there and are not counted.
template <bool Decoupled>
static void update(Values& values, int64_t n, const AdamScalars& s) {
    const F shrink = floats(s.shrink), decay = floats(s.weight_decay), beta1 = floats(s.beta1), rest1 = floats(s.rest1);
    const F beta2 = floats(s.beta2), rest2 = floats(s.rest2), correction2 = floats(s.correction2);
    const F eps = floats(s.eps), rate = floats(s.rate);
    const I lanes = lane_numbers();
    I amax_param = I{}, amax_first = I{}, amax_second = I{};
    for (int64_t i = 0; i < n; i += LANES) {
        F param = load<F>(values.param + i), grad = load<F>(values.grad + i);
        F first = load<F>(values.first + i), second = load<F>(values.second + i);
        if (s.weight_decay != 0) {
            if constexpr (Decoupled)
                param = param * shrink;
            else
                grad = grad + param * decay;
        }
        first = first * beta1 + grad * rest1;
        second = second * beta2 + (grad * grad) * rest2;
        const F denominator = square_root(second) / correction2 + eps;
        param = param - (first / denominator) * rate;
        store(values.param + i, param);
        store(values.first + i, first);
        store(values.second + i, second);
        const I new_param = magnitude_below(param, lanes, n - i), new_first = magnitude_below(first, lanes, n - i);
        const I new_second = magnitude_below(second, lanes, n - i);
        amax_param = new_param > amax_param ? new_param : amax_param;
        amax_first = new_first > amax_first ? new_first : amax_first;
        amax_second = new_second > amax_second ? new_second : amax_second;
    }
    values.amax[0] = largest_lane(amax_param);
    values.amax[1] = largest_lane(amax_first);
    values.amax[2] = largest_lane(amax_second);
}

static void read_values(Values& values, const Adam& adam, int64_t start, int64_t n, int64_t block) {
    float* const targets[4] = {values.param, values.first, values.second, values.grad};
    for (int k = 0; k < 4; ++k) {
        const Stored& stored = adam.stored[k];
        DECODERS[stored.type][FP32](stored.payload + start * SIZE[stored.type], (uint8_t*)targets[k], n,
                                    stored.scale_inv[stored.per_tile ? block : 0]);
    }
}

static void write_values(const Values& values, const Adam& adam, int64_t start, int64_t n, int64_t block) {
    const float* const sources[3] = {values.param, values.first, values.second};
    for (int k = 0; k < 3; ++k) {
        const Stored& stored = adam.stored[k];
        float scale_inv = stored.next_scale_inv;
        if (stored.per_tile) scale_inv = stored.scale_inv[block] = Rule{stored.type}.scale_inv(values.amax[k]);
        quantize_run(FP32, (const uint8_t*)sources[k], stored.type, stored.payload + start * SIZE[stored.type], start, n,
                     scale_inv, stored.noise, false);
    }
}

// `write` false: only finds the largest new values, for operands whose one scale must be known before any is written.
static void adam_range(Adam& adam, int64_t low, int64_t high, bool write) {
    Values values = {};
    uint32_t amax[3] = {0, 0, 0};
    for (int64_t start = low; start < high;) {
        const Run run = adam.grid.run(start, high);
        const int64_t n = run.end - start;
        read_values(values, adam, start, n, run.block);
        if (adam.scalars.decoupled)
            update<true>(values, n, adam.scalars);
        else
            update<false>(values, n, adam.scalars);
        for (int k = 0; k < 3; ++k) amax[k] = values.amax[k] > amax[k] ? values.amax[k] : amax[k];
        if (write) write_values(values, adam, start, n, run.block);
        start = run.end;
    }
    for (int k = 0; k < 3; ++k) raise_to(&adam.stored[k].amax, amax[k]);
}

static const Kernels KERNELS = {amax_range, quantize_range, quantize_current_range, dequantize_range, adam_range};

#undef INLINE
}  // namespace ISA
