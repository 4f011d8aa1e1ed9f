// The CPU twin of reference.py: the same bytes, at the speed of memory.
//
// A plain C interface, loaded by cpu.py through ctypes. The kernels stand in cpu_kernels.h and are compiled three
// times: AVX-512, AVX2 with F16C, and whatever the compiler's baseline is; the processor picks one when the library is
// loaded. OpenMP is used but not linked: cpu.py makes the runtime that torch already brought visible first, so that one
// pool of threads serves both.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#include "cpu_types.h"

struct Kernels {
    void (*amax)(const Cast&, int64_t, int64_t);
    void (*quantize)(const Cast&, int64_t, int64_t);
    void (*quantize_current)(const Cast&, int64_t, int64_t);
    void (*dequantize)(const Cast&, int64_t, int64_t);
    void (*adam)(Row&, const AdamScalars&, int64_t, int64_t, bool);
    void (*lion)(Row&, const LionScalars&, int64_t, int64_t, bool);
    void (*sgd)(Row&, const SgdScalars&, int64_t, int64_t, bool);
    void (*copy)(Row&, int64_t, int64_t);
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

// Calls body(row, low, high) on chunks of the rows that `takes` names, shared out to the threads as they come free: a
// small tensor costs no parallel region of its own, and a large one keeps all threads busy. No chunk cuts a tile.
template <typename Takes, typename Body>
void over_rows(Row* rows, int64_t count, int threads, const Takes& takes, const Body& body) {
    const auto tiles = [](const Row& row) { return row.grid().blocks(); };
    const auto chunk = [](const Row& row) { return CHUNK / row.tile > 1 ? CHUNK / row.tile : 1; };
    std::vector<int64_t> ends(count);  // chunks up to the end of each row
    int64_t chunks = 0, elements = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (takes(rows[i])) {
            chunks += (tiles(rows[i]) + chunk(rows[i]) - 1) / chunk(rows[i]);
            elements += rows[i].numel();
        }
        ends[i] = chunks;
    }
    const int64_t useful = 1 + elements / ELEMENTS_PER_THREAD;
    const int parts = (int)(useful < threads ? useful : threads);
#pragma omp parallel for num_threads(parts) schedule(dynamic, 1) if (parts > 1)
    for (int64_t i = 0; i < chunks; ++i) {
        const int64_t number = std::upper_bound(ends.begin(), ends.end(), i) - ends.begin();
        Row& row = rows[number];
        const Grid grid = row.grid();
        const int64_t before = number ? ends[number - 1] : 0, low = (i - before) * chunk(row), high = low + chunk(row);
        body(row, grid.start(low), high >= grid.blocks() ? grid.numel : grid.start(high));
    }
}

bool finite(uint32_t amax) { return amax < (uint32_t)INFINITE; }

// What has to be known of a row before it is written.
void prepare(Row& row) {
    for (Stored& stored : row.stored) {
        stored.next_scale_inv = 1.0f;
        stored.amax = 0;
    }
    if (row.residual && row.growth > 0) {
        const float largest = *row.residual_amax * row.growth + row.increase;
        row.stored[0].next_scale_inv = Rule{E4M3}.scale_inv((uint32_t)float_bits(largest) & 0x7fffffff);
    }
    row.copy.amax = 0;
    // a guess: the last copy's, if that is one of ours
    const float last = row.copy.payload ? *row.copy.scale_inv : 1.0f;
    row.copy.next_scale_inv = last >= 0x1p-126f && last <= 0x1p126f && !(float_bits(last) & 0x7fffff) ? last : 1.0f;
}

bool needs_scales(const Row& row) {
    return row.scale_unknown(0) || row.scale_unknown(1) || row.scale_unknown(2);
}

// Scales of operands that have one, now that all is written; flags those that took a value that is not finite.
void settle(Row& row) {
    for (int k = 0; k < 3; ++k) {
        Stored& stored = row.stored[k];
        if (stored.per_tile) continue;
        *stored.scale_inv = finite(stored.amax) ? stored.next_scale_inv : float_of(INFINITE);
        if (finite(stored.amax)) continue;
        memset(stored.payload, 0, row.numel() * SIZE[stored.type]);
        if (k == 0 && row.residual) memset(row.residual, 0, row.numel());
        if (k == 0) row.copy.amax = INFINITE;
    }
    if (row.residual) *row.residual_amax = float_of(row.stored[0].amax);
}

// One step of every row. Copies are written with the scale of the last step's, and once more where it turned out to be
// another: the largest value crossed a binade.
template <typename Scalars, typename Step, typename Copy>
void step_rows(Row* rows, int64_t count, const Scalars& scalars, Step step, Copy copy, int threads) {
    const auto all = [](const Row&) { return true; };
    for (int64_t i = 0; i < count; ++i) prepare(rows[i]);
    over_rows(rows, count, threads, needs_scales,
              [&](Row& row, int64_t low, int64_t high) { step(row, scalars, low, high, false); });
    for (int64_t i = 0; i < count; ++i) {
        if (!needs_scales(rows[i])) continue;
        for (int k = 0; k < 3; ++k) {
            Stored& stored = rows[i].stored[k];
            if (rows[i].scale_unknown(k)) stored.next_scale_inv = Rule{stored.type}.scale_inv(stored.amax);
            stored.amax = 0;
        }
    }
    over_rows(rows, count, threads, all,
              [&](Row& row, int64_t low, int64_t high) { step(row, scalars, low, high, true); });
    for (int64_t i = 0; i < count; ++i) {
        settle(rows[i]);
        Stored& made = rows[i].copy;
        if (!made.payload) continue;
        const float scale_inv = Rule{made.type}.scale_inv(made.amax);
        made.per_tile = scale_inv != made.next_scale_inv;  // not this step's: to be written again
        *made.scale_inv = made.next_scale_inv = scale_inv;
    }
    over_rows(rows, count, threads, [](const Row& row) { return row.copy.payload && row.copy.per_tile; }, copy);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Of the sources that this was built from.
EXPORT uint32_t msamp_digest() { return MSAMP_DIGEST; }

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

EXPORT void msamp_adam(Row* rows, int64_t count, const AdamScalars* scalars, int simd, int threads) {
    step_rows(rows, count, *scalars, kernels(simd).adam, kernels(simd).copy, threads);
}

EXPORT void msamp_lion(Row* rows, int64_t count, const LionScalars* scalars, int simd, int threads) {
    step_rows(rows, count, *scalars, kernels(simd).lion, kernels(simd).copy, threads);
}

EXPORT void msamp_sgd(Row* rows, int64_t count, const SgdScalars* scalars, int simd, int threads) {
    step_rows(rows, count, *scalars, kernels(simd).sgd, kernels(simd).copy, threads);
}

#include "cpu_fused_exports.h"
