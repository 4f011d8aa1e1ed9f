// The fused kernels as cpu_fused.py calls them: rows are shared out among threads.

namespace {

const FusedKernels& fused(int simd) {
#ifdef HAS_VARIANTS
    if (simd == SIMD_AVX512) return avx512::FUSED;
    if (simd == SIMD_AVX2) return avx2::FUSED;
#endif
    (void)simd;
    return baseline::FUSED;
}

int64_t whole_vectors(int64_t columns) { return (columns + 15) / 16 * 16; }

// Calls body(low, high, work) on parts of the rows, each with room for `held` rows of its own.
template <typename Body>
void over_rows(int64_t rows, int64_t columns, int held, int threads, const Body& body) {
    in_parallel(rows, rows * columns, 1, threads, [&](int64_t low, int64_t high) {
        float* work = (float*)malloc(held * whole_vectors(columns) * sizeof(float));
        body(low, high, work);
        free(work);
    });
}

// A column's gradient is a sum over rows. It is taken in this many parts, whatever the number of threads, so that the
// result does not depend on it.
constexpr int64_t PARTS = 16;

}  // namespace

EXPORT void msamp_norm(const Norm* norm, int64_t rows, int simd, int threads) {
    over_rows(rows, norm->columns, 2, threads,
              [&](int64_t low, int64_t high, float* work) { fused(simd).norm(*norm, low, high, work); });
}

// `sums` holds grad_weight and grad_bias, each of whole vectors, PARTS times; the first of each are the results.
EXPORT void msamp_norm_backward(const NormBackward* norm, float* sums, int64_t rows, int simd, int threads) {
    const int64_t width = whole_vectors(norm->columns);
    memset(sums, 0, 2 * PARTS * width * sizeof(float));
    in_parallel(PARTS, rows * norm->columns, 1, threads, [&](int64_t low, int64_t high) {
        float* work = (float*)malloc(2 * width * sizeof(float));
        for (int64_t part = low; part < high; ++part)
            fused(simd).norm_backward(*norm, rows * part / PARTS, rows * (part + 1) / PARTS, work,
                                      sums + 2 * part * width, sums + (2 * part + 1) * width);
        free(work);
    });
    for (int64_t part = 1; part < PARTS; ++part)
        for (int64_t i = 0; i < 2 * width; ++i) sums[i] += sums[2 * part * width + i];
}

EXPORT int msamp_norm_parts() { return PARTS; }

EXPORT void msamp_activation(const Activation* a, int64_t rows, int simd, int threads) {
    in_parallel(rows * ((a->columns + TILE - 1) / TILE), rows * a->columns, 1, threads,
                [&](int64_t low, int64_t high) { fused(simd).activation(*a, low, high); });
}

EXPORT void msamp_activation_backward(const ActivationBackward* a, int64_t rows, int simd, int threads) {
    in_parallel(rows * ((a->columns + TILE - 1) / TILE), rows * a->columns, 1, threads,
                [&](int64_t low, int64_t high) { fused(simd).activation_backward(*a, low, high); });
}

EXPORT void msamp_softmax(const Softmax* softmax, int64_t rows, int simd, int threads) {
    over_rows(rows, softmax->columns, 1, threads,
              [&](int64_t low, int64_t high, float* work) { fused(simd).softmax(*softmax, low, high, work); });
}

EXPORT void msamp_softmax_backward(const SoftmaxBackward* softmax, int64_t rows, int simd, int threads) {
    over_rows(rows, softmax->columns, 1, threads,
              [&](int64_t low, int64_t high, float* work) { fused(simd).softmax_backward(*softmax, low, high, work); });
}

// The scale becomes 1, or the flag of a sum that is not finite. It is read until the last element is written.
EXPORT void msamp_accumulate(const Sum* sum, int64_t numel, int simd, int threads) {
    const Written& total = sum->total;
    uint32_t amax = 0;
    in_parallel(numel, numel, TILE, threads,
                [&](int64_t low, int64_t high) { fused(simd).accumulate(*sum, low, high, &amax); });
    *total.scale_inv = finite(amax) ? 1.0f : float_of(INFINITE);
    if (!finite(amax)) memset(total.payload, 0, numel * SIZE[total.type]);
}
