// The CPU twin of reference.py: the same bytes, at the speed of memory.
//
// A plain C interface, loaded by cpu.py through ctypes. The kernels stand in cpu_kernels.h and are compiled three
// times: AVX-512, AVX2 with F16C, and whatever the compiler's baseline is; the processor picks one when the library is
// loaded. OpenMP is used but not linked: cpu.py makes the runtime that torch already brought visible first, so that one
// pool of threads serves both.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum Type { FP32, BF16, FP16, E4M3, E5M2, UE5M3, TYPES };
constexpr int64_t SIZE[TYPES] = {4, 2, 2, 1, 1, 1};
constexpr int64_t TILE = 2048;                   // elements worked on at a time where values are staged in the L1 cache
constexpr int64_t ELEMENTS_PER_THREAD = 32768;   // below that, waking a thread costs more than it saves
constexpr int64_t STREAMED_BYTES = 16 << 20;    // results of this size would fill a last-level cache
constexpr int32_t INFINITE = 0x7f800000;  // bits of FP32, as are those a NaN lies above

constexpr int32_t largest_bits(int type) {
    constexpr int32_t bits[TYPES] = {0x7f7fffff, 0x7f7f0000, 0x477fe000, 0x43e00000, 0x47600000, 0x47700000};
    return bits[type];
}

template <int Format>
struct Spec {
    static constexpr int32_t largest = largest_bits(Format);
    static constexpr int mantissa =
        Format == FP32 ? 23 : Format == BF16 ? 7 : Format == FP16 ? 10 : Format == E5M2 ? 2 : 3;
    static constexpr int smallest_field = Format == E4M3 ? 121 : Format == FP32 || Format == BF16 ? 1 : 113;
    // of the subnormals of the 8-bit formats
    static constexpr float step = Format == E4M3 ? 0x1p-9f : Format == E5M2 ? 0x1p-16f : 0x1p-17f;
    static constexpr bool has_sign = Format != UE5M3;
    // Below this exponent field, 2^-(bits of a step) would leave FP32: BF16 values under 2^-119 share one step.
    static constexpr int stochastic_field = smallest_field > mantissa ? smallest_field : mantissa + 1;
};

inline int32_t float_bits(float value) {
    int32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline double exp2_of(int exponent) {
    const uint64_t bits = (uint64_t)(1023 + exponent) << 52;
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

inline bool finite(float value) { return (float_bits(value) & 0x7fffffff) < INFINITE; }

// Magnitudes compare as their bits do, and a NaN compares above infinity: so a maximum of bits cannot lose one.
inline void raise_to(uint32_t* target, uint32_t value) {
    uint32_t current = __atomic_load_n(target, __ATOMIC_RELAXED);
    while (value > current &&
           !__atomic_compare_exchange_n(target, &current, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

// A tensor's blocks. Where one block spans the columns its rows are contiguous, so it is seen as a single long row.
struct Grid {
    int64_t numel, columns, block_rows, block_columns, grid_columns;

    Grid(int64_t rows, int64_t columns, int64_t block_rows, int64_t block_columns)
        : numel(rows * columns), columns(columns), block_rows(block_rows), block_columns(block_columns) {
        grid_columns = (columns + block_columns - 1) / block_columns;
        if (grid_columns == 1) {
            this->columns = this->block_columns = columns * block_rows;
            this->block_rows = 1;
        }
    }

    int64_t blocks() const {
        const int64_t rows = (numel + columns - 1) / columns;
        return (rows + block_rows - 1) / block_rows * grid_columns;
    }

    // Where a block starts, if blocks are runs (block_rows 1).
    int64_t start(int64_t block) const {
        const int64_t row = block / grid_columns, first = row * columns + (block - row * grid_columns) * block_columns;
        return first < numel ? first : numel;
    }
};

// Goes through elements [low, high): from `start` to `end` they are contiguous and in one block.
struct Run {
    const Grid& grid;
    int64_t start, end, high, block;
    int64_t row_end, row_in_block, column_block, first_block;  // first_block: of the row of blocks

    Run(const Grid& grid, int64_t low, int64_t high) : grid(grid), start(low), high(high) {
        const int64_t row = low / grid.columns, column = low - row * grid.columns;
        row_end = (row + 1) * grid.columns;
        row_in_block = row % grid.block_rows;
        first_block = row / grid.block_rows * grid.grid_columns;
        column_block = column / grid.block_columns;
        find_end();
    }

    int64_t length() const { return end - start; }

    void next() {
        start = end;
        ++column_block;
        if (start == row_end) {
            row_end += grid.columns;
            column_block = 0;
            if (++row_in_block == grid.block_rows) {
                row_in_block = 0;
                first_block += grid.grid_columns;
            }
        }
        find_end();
    }

    void find_end() {
        end = row_end - grid.columns + (column_block + 1) * grid.block_columns;
        end = end < row_end ? end : row_end;
        end = end < high ? end : high;
        block = first_block + column_block;
    }
};

// reference.scale_inv_from_amax
struct Rule {
    int format, margin = 0;
    bool power_of_two = true;

    float scale_inv(uint32_t amax) const {
        if (amax >= (uint32_t)INFINITE) return float_of(INFINITE);
        if (format == FP32 || format == BF16 || amax == 0) return 1.0f;
        const uint32_t limit = largest_bits(format);
        if (power_of_two) {
            int exponent = (int)(limit >> 23) - (int)(amax >> 23) - margin - ((amax & 0x7fffff) > (limit & 0x7fffff));
            exponent = exponent > 126 ? 126 : exponent < -126 ? -126 : exponent;
            return float_of((uint32_t)(127 - exponent) << 23);
        }
        const float ratio = float_of(amax) / (float)((double)float_of(limit) / exp2_of(margin));
        return ratio < 0x1p-126f ? 0x1p-126f : ratio > 0x1p126f ? 0x1p126f : ratio;
    }
};

// The two upper bytes of the FP32 (so both bytes of the BF16) number that each magnitude of an 8-bit format stands for.
template <int Format>
struct ByteTables {
    uint8_t low[128] = {}, high[128] = {};

    constexpr ByteTables() {
        constexpr int mantissa = Spec<Format>::mantissa;
        for (int code = 0; code < 128; ++code) {
            int bits = (code << (7 - mantissa)) + ((Spec<Format>::smallest_field - 1) << 7);
            if (code < (1 << mantissa)) {  // subnormal: shift the leading bit up to where a normal number has it
                int field = Spec<Format>::smallest_field, steps = code;
                for (; steps != 0 && steps < (1 << mantissa); --field) steps <<= 1;
                bits = steps == 0 ? 0 : (field << 7) + ((steps - (1 << mantissa)) << (7 - mantissa));
            }
            if (Format == E5M2 && code >= 0x7c) bits = code == 0x7c ? 0x7f80 : 0x7fc0;
            if (Format == E4M3 && code == 0x7f) bits = 0x7fc0;
            low[code] = (uint8_t)bits;
            high[code] = (uint8_t)(bits >> 8);
        }
    }
};

// Index of the lowest byte of each of 32 lanes of 32 bits.
struct LowBytes {
    uint8_t index[64] = {};

    constexpr LowBytes() {
        for (int lane = 0; lane < 32; ++lane) index[lane] = (uint8_t)(4 * lane);
    }
};

struct Noise {
    uint32_t key0, key1, lower_half;  // reference.noise_keys, and which half of a word a role takes
};

struct Cast {
    Grid grid;
    int in, out;
    const uint8_t* from;
    uint8_t* to;
    float* scale_inv;
    uint32_t* amax;      // bits of FP32; null if not asked for
    const Noise* noise;  // null: to nearest even
    Rule rule;
    bool streams = false;  // the result is too large for the caches
};

struct Kernels {
    void (*amax)(const Cast&, int64_t, int64_t);
    void (*quantize)(const Cast&, int64_t, int64_t);
    void (*quantize_current)(const Cast&, int64_t, int64_t);
    void (*dequantize)(const Cast&, int64_t, int64_t);
};

#include "cpu_fused_types.h"

#define ISA baseline
#define LANES 4
#include "cpu_kernels.h"
#include "cpu_fused.h"
#undef ISA
#undef LANES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_VARIANTS 1
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#define ISA avx2
#define LANES 8
#include "cpu_kernels.h"
#include "cpu_fused.h"
#undef ISA
#undef LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,prefer-vector-width=512")
#define ISA avx512
#define LANES 16
#include "cpu_kernels.h"
#include "cpu_fused.h"
#undef ISA
#undef LANES
#pragma GCC pop_options
#endif

enum Simd { SIMD_BASELINE, SIMD_AVX2, SIMD_AVX512 };

int best_simd() {
#ifdef HAS_VARIANTS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi"))
        return SIMD_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return SIMD_AVX2;
#endif
    return SIMD_BASELINE;
}

const Kernels& kernels(int simd) {
#ifdef HAS_VARIANTS
    if (simd == SIMD_AVX512) return avx512::KERNELS;
    if (simd == SIMD_AVX2) return avx2::KERNELS;
#endif
    (void)simd;
    return baseline::KERNELS;
}

// Calls body(low, high) on `threads` parts of [0, total), cut at multiples of `unit`.
template <typename Body>
void in_parallel(int64_t total, int64_t numel, int64_t unit, int threads, const Body& body) {
    const int64_t useful = 1 + numel / ELEMENTS_PER_THREAD;
    const int parts = (int)(useful < threads ? useful : threads);
    if (parts <= 1) return body(0, total);
    const int64_t units = (total + unit - 1) / unit;
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int part = 0; part < parts; ++part) {
        const int64_t low = units * part / parts * unit, high = units * (part + 1) / parts * unit;
        body(low, high < total ? high : total);
    }
}

template <typename Kernel>
void cast_all(const Cast& cast, Kernel kernel, int threads) {
    in_parallel(cast.grid.numel, cast.grid.numel, 128, threads,
                [&](int64_t low, int64_t high) { kernel(cast, low, high); });
}

bool is_large(const Cast& cast) { return cast.grid.numel * SIZE[cast.out] >= STREAMED_BYTES; }

// The same, never cutting a block.
template <typename Body>
void over_blocks(const Grid& grid, int threads, const Body& body) {
    in_parallel(grid.blocks(), grid.numel, 1, threads, [&](int64_t low, int64_t high) {
        body(grid.start(low), high == grid.blocks() ? grid.numel : grid.start(high));
    });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// 0 baseline, 1 AVX2, 2 AVX-512: what this processor runs; every function below takes one of these up to that.
EXPORT int msamp_simd() { return best_simd(); }

EXPORT void msamp_amax(const uint8_t* x, int in, uint32_t* amax, int64_t rows, int64_t columns, int64_t block_rows,
                       int64_t block_columns, int simd, int threads) {
    Cast cast{{rows, columns, block_rows, block_columns}, in, FP32, x, nullptr, nullptr, amax, nullptr, {FP32}};
    memset(amax, 0, cast.grid.blocks() * 4);
    cast_all(cast, kernels(simd).amax, threads);
}

EXPORT void msamp_scale_inv(const uint32_t* amax, float* scale_inv, int64_t blocks, int format, int margin,
                            int power_of_two) {
    const Rule rule{format, margin, power_of_two != 0};
    for (int64_t block = 0; block < blocks; ++block) scale_inv[block] = rule.scale_inv(amax[block] & 0x7fffffff);
}

// 1 if every scale is a power of two or a flag.
EXPORT int msamp_powers_of_two(const uint32_t* scale_inv, int64_t blocks) {
    uint32_t mantissas = 0;
    for (int64_t block = 0; block < blocks; ++block) mantissas |= scale_inv[block] & 0x7fffff;
    return mantissas == 0;
}

// quantize, or quantize_amax where `amax` is not null.
EXPORT void msamp_quantize(const uint8_t* x, int in, float* scale_inv, uint8_t* payload, int out, uint32_t* amax,
                           const Noise* noise, int64_t rows, int64_t columns, int64_t block_rows, int64_t block_columns,
                           int simd, int threads) {
    Cast cast{{rows, columns, block_rows, block_columns}, in, out, x, payload, scale_inv, amax, noise, {out}};
    cast.streams = is_large(cast);
    if (amax) memset(amax, 0, cast.grid.blocks() * 4);
    cast_all(cast, kernels(simd).quantize, threads);
}

EXPORT void msamp_quantize_current(const uint8_t* x, int in, float* scale_inv, uint8_t* payload, int out,
                                   uint32_t* amax, const Noise* noise, int margin, int power_of_two, int64_t rows, int64_t columns,
                                   int64_t block_rows, int64_t block_columns, int simd, int threads) {
    Cast cast{{rows, columns, block_rows, block_columns}, in, out, x, payload, scale_inv, amax, noise,
              {out, margin, power_of_two != 0}};
    const Kernels& chosen = kernels(simd);
    if (cast.grid.block_rows == 1 && cast.grid.block_columns <= 2 * TILE) {
        // Results are staged TILE elements at a time, which must not cut a block.
        const int64_t width = cast.grid.block_columns;
        cast.streams = is_large(cast) && TILE % width == 0 && cast.grid.columns % width == 0;
        over_blocks(cast.grid, threads, [&](int64_t low, int64_t high) { chosen.quantize_current(cast, low, high); });
        return;
    }
    const int64_t blocks = cast.grid.blocks();
    memset(amax, 0, blocks * 4);
    cast_all(cast, chosen.amax, threads);
    for (int64_t block = 0; block < blocks; ++block) scale_inv[block] = cast.rule.scale_inv(amax[block]);
    cast.amax = nullptr;
    cast.streams = is_large(cast);
    cast_all(cast, chosen.quantize, threads);
}

EXPORT void msamp_dequantize(const uint8_t* payload, int in, float* scale_inv, uint8_t* real, int out, int64_t rows,
                             int64_t columns, int64_t block_rows, int64_t block_columns, int simd, int threads) {
    Cast cast{{rows, columns, block_rows, block_columns}, in, out, payload, real, scale_inv, nullptr, nullptr, {out}};
    cast.streams = is_large(cast);
    cast_all(cast, kernels(simd).dequantize, threads);
}

#include "cpu_fused_exports.h"
