// Casts and amaxes over ranges of a tensor. Part of cpu_kernels.h.

// --- runs: contiguous elements under one scale ----------------------------------------------------------------------

enum Mode { PLAIN, NOISY, WITH_AMAX, MODES };

template <int In, int Out, int Mode>
INLINE I encode_group(const uint8_t* x, uint8_t* payload, F scale, int64_t start, const Noise* noise, I amax) {
    Group real;
    decode<In>(x, real);
    for (int k = 0; k < 4; ++k) {
        if constexpr (Mode == WITH_AMAX) amax = larger((I)real[k] & 0x7fffffff, amax);
        real[k] = real[k] * scale;
    }
    if constexpr (Mode == NOISY && Out != FP32) {
        I bits[4];
        random_bits(bits, start, *noise);
        encode_stochastically<Out>(payload, real, bits);
    } else {
        encode<Out>(payload, real);
    }
    return amax;
}

// `start` is the run's place in its tensor, which is what the random stream is indexed by. Returns the bits of amax
// (above INFINITE: the run holds a NaN) in mode WITH_AMAX, else 0.
template <int In, int Out, int Mode>
static uint32_t encode_run(const uint8_t* x, uint8_t* payload, int64_t n, float scale, int64_t start,
                           const Noise* noise) {
    const F scales = floats(scale);
    I amax = I{};
    int64_t i = 0;
    for (; i + GROUP <= n; i += GROUP)
        amax = encode_group<In, Out, Mode>(x + i * SIZE[In], payload + i * SIZE[Out], scales, start + i, noise, amax);
    if (i < n) {
        uint8_t from[4 * GROUP] = {0}, to[4 * GROUP];
        memcpy(from, x + i * SIZE[In], (n - i) * SIZE[In]);
        amax = encode_group<In, Out, Mode>(from, to, scales, start + i, noise, amax);
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

typedef uint32_t (*EncodeRun)(const uint8_t*, uint8_t*, int64_t, float, int64_t, const Noise*);
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

// quantize one run, `start` being its place in its tensor. Returns the bits of amax if it was asked for.
static uint32_t quantize_run(int in, const uint8_t* x, int out, uint8_t* payload, int64_t start, int64_t n,
                             float scale_inv, const Noise* noise, bool with_amax) {
    if (!finite(scale_inv)) {
        memset(payload, 0, n * SIZE[out]);
        return with_amax ? AMAXES[in](x, n) : 0;
    }
    const Mode mode = noise ? NOISY : with_amax ? WITH_AMAX : PLAIN;
    return ENCODERS[in][out][mode](x, payload, n, 1.0f / scale_inv, start, noise);
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
