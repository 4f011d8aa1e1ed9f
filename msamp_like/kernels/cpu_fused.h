// The fused kernels of reference_fused.py over a range of rows, included once per instruction set after cpu_kernels.h,
// whose casts they use: their payloads and scales are those of the FP32 values before them, bit for bit. A row is read
// into the cache as FP32, worked on there, and leaves as its targets ask.
//
// exp is a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2] (2 units in the last place); the normal distribution below x
// is formula 7.1.26 of Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964 (off by 1.5e-7 at most).

namespace ISA {

#define INLINE static inline __attribute__((always_inline))

INLINE F exponential(F x) {
    const F low = floats(-87.0f), high = floats(88.0f);
    const I vanishes = x < low;
    x = vanishes ? low : x;
    x = x > high ? high : x;
    const F shift = floats(0x1.8p23f);  // adding it rounds to a whole number
    const F whole = (x * floats(1.44269504f) + shift) - shift;
    const F rest = (x - whole * floats(0.693359375f)) + whole * floats(2.12194440e-4f);
    F sum = floats(1.98756915e-4f);
    sum = sum * rest + floats(1.3981999e-3f);
    sum = sum * rest + floats(8.3334519e-3f);
    sum = sum * rest + floats(4.1665796e-2f);
    sum = sum * rest + floats(1.6666666e-1f);
    sum = sum * rest + floats(0.5f);
    sum = (sum * rest) * rest + rest + floats(1.0f);
    const F power = sum * (F)((__builtin_convertvector(whole, I) + 127) << 23);
    return vanishes ? F{} : power;  // 0 and not small: a masked logit has no share at all
}

INLINE F absolute(F x) { return (F)((I)x & 0x7fffffff); }

INLINE F logistic(F x) { return floats(1.0f) / (floats(1.0f) + exponential(-x)); }

// The share of a normal distribution that lies below x; `density` is exp(-x^2 / 2).
INLINE F normal_below(F x, F density) {
    const F t = floats(1.0f) / (floats(1.0f) + absolute(x) * floats(0.3275911f * 0.70710678f));
    F sum = t * floats(1.061405429f) - floats(1.453152027f);
    sum = sum * t + floats(1.421413741f);
    sum = sum * t - floats(0.284496736f);
    sum = sum * t + floats(0.254829592f);
    const F beyond = floats(0.5f) * sum * t * density;
    return x < floats(0.0f) ? beyond : floats(1.0f) - beyond;
}

INLINE F twice_tanh_argument(F x) {
    return floats(2 * 0.79788456f) * (x + floats(0.044715f) * x * x * x);
}

template <int Kind>
INLINE F activated(F x) {
    if constexpr (Kind == GELU) return x * normal_below(x, exponential(floats(-0.5f) * x * x));
    if constexpr (Kind == GELU_TANH) return x * logistic(twice_tanh_argument(x));
    return x * logistic(x);
}

// Derivative of the activation; `value` becomes the activation itself.
template <int Kind>
INLINE F slope(F x, F& value) {
    if constexpr (Kind == GELU) {
        const F density = exponential(floats(-0.5f) * x * x), below = normal_below(x, density);
        value = x * below;
        return below + x * density * floats(0.39894228f);
    }
    const F below = logistic(Kind == GELU_TANH ? twice_tanh_argument(x) : x);
    value = x * below;
    F inner = floats(1.0f);
    if constexpr (Kind == GELU_TANH)
        inner = floats(2 * 0.79788456f) * (floats(1.0f) + floats(3 * 0.044715f) * x * x);
    return below * (floats(1.0f) + x * (floats(1.0f) - below) * inner);
}

INLINE float sum_of(F value) {
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += value[lane];
    return sum;
}

static void read_row(int type, const uint8_t* from, int64_t start, int64_t n, float* row) {
    DECODERS[type][FP32](from + start * SIZE[type], (uint8_t*)row, n, 1.0f);
}

// `n` values from element `start` on, which begins a group of `in`.
static void read_kept(const Written& in, int64_t start, int64_t first_group, int64_t n, float* row) {
    for (int64_t i = 0; i < n; i += in.block) {
        const int64_t count = n - i < in.block ? n - i : in.block;
        DECODERS[in.type][FP32](in.payload + start + i, (uint8_t*)(row + i), count, in.scale_inv[first_group + i / in.block]);
    }
}

// `n` FP32 values as elements `start` and on of `out`; the first begins group `first_group`.
static void write_row(const float* row, int64_t start, int64_t first_group, int64_t n, const Written& out) {
    uint8_t* payload = out.payload + start * SIZE[out.type];
    const uint8_t* from = (const uint8_t*)row;
    if (out.how == AS_IT_IS) return DECODERS[FP32][out.type](from, payload, n, 1.0f);
    if (out.how == DELAYED)
        return raise_to(out.amax, quantize_run(FP32, from, out.type, payload, 0, n, *out.scale_inv, nullptr, true));
    for (int64_t i = 0; i < n; i += out.block) {
        const int64_t count = n - i < out.block ? n - i : out.block, group = first_group + i / out.block;
        const uint32_t amax = AMAXES[FP32](from + 4 * i, count);
        if (out.amax) out.amax[group] = amax;
        out.scale_inv[group] = Rule{out.type}.scale_inv(amax);
        quantize_run(FP32, from + 4 * i, out.type, payload + i * SIZE[out.type], 0, count, out.scale_inv[group], nullptr,
                     false);
    }
}

INLINE int64_t groups_before(int64_t row, int64_t columns, int64_t block) {
    return block > 0 ? row * ((columns + block - 1) / block) : 0;
}

// --- norms ------------------------------------------------------------------------------------------------------------

// Rows [low, high). `work` holds two rows of whole vectors.
static void norm_rows(const Norm& norm, int64_t low, int64_t high, float* work) {
    const int64_t columns = norm.columns, padded = (columns + LANES - 1) / LANES * LANES;
    float *values = work, *result = work + padded;
    for (int64_t row = low; row < high; ++row) {
        read_row(norm.in, norm.x, row * columns, columns, values);
        memset(values + columns, 0, (padded - columns) * 4);
        F sum = F{};
        if (norm.centered) {
            for (int64_t i = 0; i < padded; i += LANES) sum = sum + load<F>(values + i);
            const F mean = floats(sum_of(sum) / (float)columns);
            for (int64_t i = 0; i < padded; i += LANES) store(values + i, load<F>(values + i) - mean);
            memset(values + columns, 0, (padded - columns) * 4);
            sum = F{};
        }
        for (int64_t i = 0; i < padded; i += LANES) sum = sum + load<F>(values + i) * load<F>(values + i);
        const float inverse = 1.0f / __builtin_sqrtf(sum_of(sum) / (float)columns + norm.eps);
        norm.inverse[row] = inverse;
        for (int64_t i = 0; i < padded; i += LANES) {
            const F normalized = load<F>(values + i) * floats(inverse);
            store(values + i, normalized);
            F value = normalized;
            if (norm.weight) value = value * load<F>(norm.weight + i);
            if (norm.bias) value = value + load<F>(norm.bias + i);
            store(result + i, value);
        }
        write_row(values, row * columns, groups_before(row, columns, norm.kept.block), columns, norm.kept);
        write_row(result, row * columns, groups_before(row, columns, norm.out.block), columns, norm.out);
    }
}

// Rows [low, high); adds to grad_weight and grad_bias. `work` holds two rows of whole vectors.
static void norm_backward_rows(const NormBackward& norm, int64_t low, int64_t high, float* work, float* grad_weight,
                               float* grad_bias) {
    const int64_t columns = norm.columns, padded = (columns + LANES - 1) / LANES * LANES;
    float *values = work, *grads = work + padded;
    for (int64_t row = low; row < high; ++row) {
        read_row(norm.grad_type, norm.grad, row * columns, columns, grads);
        read_kept(norm.kept, row * columns, groups_before(row, columns, norm.kept.block), columns, values);
        memset(grads + columns, 0, (padded - columns) * 4);
        memset(values + columns, 0, (padded - columns) * 4);
        F sum = F{}, along = F{};
        for (int64_t i = 0; i < padded; i += LANES) {
            F grad = load<F>(grads + i);
            const F normalized = load<F>(values + i);
            store(grad_weight + i, load<F>(grad_weight + i) + grad * normalized);
            store(grad_bias + i, load<F>(grad_bias + i) + grad);
            if (norm.weight) grad = grad * load<F>(norm.weight + i);
            store(grads + i, grad);
            sum = sum + grad;
            along = along + grad * normalized;
        }
        const F mean = floats(norm.centered ? sum_of(sum) / (float)columns : 0.0f);
        const F share = floats(sum_of(along) / (float)columns), inverse = floats(norm.inverse[row]);
        for (int64_t i = 0; i < padded; i += LANES)
            store(grads + i, (load<F>(grads + i) - load<F>(values + i) * share - mean) * inverse);
        write_row(grads, row * columns, 0, columns, norm.out);
    }
}

// --- activations ------------------------------------------------------------------------------------------------------

template <int Kind>
static void activate(float* gate, const float* value, int64_t n, float* result) {
    for (int64_t i = 0; i < n; i += LANES) {
        const F made = activated<Kind>(load<F>(gate + i));
        store(result + i, value ? made * load<F>(value + i) : made);
    }
}

// result: grad of the gate; grad becomes that of the value.
template <int Kind>
static void differentiate(const float* gate, const float* value, int64_t n, float* grad, float* result) {
    for (int64_t i = 0; i < n; i += LANES) {
        F made;
        const F steep = slope<Kind>(load<F>(gate + i), made), given = load<F>(grad + i);
        store(result + i, value ? given * load<F>(value + i) * steep : given * steep);
        store(grad + i, given * made);
    }
}

typedef void (*Activate)(float*, const float*, int64_t, float*);
typedef void (*Differentiate)(const float*, const float*, int64_t, float*, float*);
static const Activate ACTIVATE[] = {activate<GELU>, activate<GELU_TANH>, activate<SILU>};
static const Differentiate DIFFERENTIATE[] = {differentiate<GELU>, differentiate<GELU_TANH>, differentiate<SILU>};

// Pieces [low, high): TILE elements of a row, or what is left of it.
static void activation_pieces(const Activation& a, int64_t low, int64_t high) {
    const int64_t pieces = (a.columns + TILE - 1) / TILE;
    alignas(64) float gate[TILE] = {0}, value[TILE] = {0}, result[TILE] = {0};
    for (int64_t piece = low; piece < high; ++piece) {
        const int64_t row = piece / pieces, column = (piece - row * pieces) * TILE, start = row * a.columns + column;
        const int64_t n = a.columns - column < TILE ? a.columns - column : TILE;
        const auto group = [&](const Written& s) {
            return s.block > 0 ? groups_before(row, a.columns, s.block) + column / s.block : 0;
        };
        read_row(a.gate_type, a.gate, start, n, gate);
        if (a.value) read_row(a.value_type, a.value, start, n, value);
        ACTIVATE[a.kind](gate, a.value ? value : nullptr, n, result);
        write_row(gate, start, group(a.kept_gate), n, a.kept_gate);
        if (a.value) write_row(value, start, group(a.kept_value), n, a.kept_value);
        write_row(result, start, group(a.out), n, a.out);
    }
}

static void activation_backward_pieces(const ActivationBackward& a, int64_t low, int64_t high) {
    const int64_t pieces = (a.columns + TILE - 1) / TILE;
    alignas(64) float gate[TILE] = {0}, value[TILE] = {0}, grad[TILE] = {0}, result[TILE] = {0};
    for (int64_t piece = low; piece < high; ++piece) {
        const int64_t row = piece / pieces, column = (piece - row * pieces) * TILE, start = row * a.columns + column;
        const int64_t n = a.columns - column < TILE ? a.columns - column : TILE;
        const auto group = [&](int64_t block) {
            return block > 0 ? groups_before(row, a.columns, block) + column / block : 0;
        };
        read_row(a.grad_type, a.grad, start, n, grad);
        read_kept(a.gate, start, group(a.gate.block), n, gate);
        if (a.value.payload) read_kept(a.value, start, group(a.value.block), n, value);
        DIFFERENTIATE[a.kind](gate, a.value.payload ? value : nullptr, n, grad, result);
        write_row(result, start, group(a.out_gate.block), n, a.out_gate);
        if (a.value.payload) write_row(grad, start, group(a.out_value.block), n, a.out_value);
    }
}

// --- softmax ----------------------------------------------------------------------------------------------------------

// Rows [low, high). `work` holds a row of whole vectors.
static void softmax_rows(const Softmax& softmax, int64_t low, int64_t high, float* work) {
    const int64_t columns = softmax.columns, padded = (columns + LANES - 1) / LANES * LANES;
    for (int64_t row = low; row < high; ++row) {
        read_row(softmax.in, softmax.logits, row * columns, columns, work);
        for (int64_t i = columns; i < padded; ++i) work[i] = work[0];
        F high_lanes = load<F>(work);
        for (int64_t i = LANES; i < padded; i += LANES) {
            const F value = load<F>(work + i);
            high_lanes = value > high_lanes ? value : high_lanes;
        }
        float largest = high_lanes[0];
        for (int lane = 1; lane < LANES; ++lane) largest = high_lanes[lane] > largest ? high_lanes[lane] : largest;
        F sums = F{};
        for (int64_t i = 0; i < padded; i += LANES) {
            const F value = exponential(load<F>(work + i) - floats(largest));
            store(work + i, value);
            sums = sums + value;
        }
        const float sum = sum_of(sums) - work[padded - 1] * (float)(padded - columns);
        softmax.sums[row] = largest + __builtin_logf(sum);
        const F share = floats(1.0f / sum);
        for (int64_t i = 0; i < padded; i += LANES) store(work + i, load<F>(work + i) * share);
        write_row(work, row * columns, groups_before(row, columns, softmax.kept.block), columns, softmax.kept);
    }
}

static void softmax_backward_rows(const SoftmaxBackward& softmax, int64_t low, int64_t high, float* work) {
    const int64_t columns = softmax.columns, padded = (columns + LANES - 1) / LANES * LANES;
    for (int64_t row = low; row < high; ++row) {
        const int64_t target = softmax.targets[row];
        read_kept(softmax.kept, row * columns, groups_before(row, columns, softmax.kept.block), columns, work);
        if (target >= 0) work[target] -= 1.0f;
        const F grad = floats(softmax.grad[row]);
        for (int64_t i = 0; i < padded; i += LANES) store(work + i, load<F>(work + i) * grad);
        write_row(work, row * columns, 0, columns, softmax.out);
    }
}

// --- sums -------------------------------------------------------------------------------------------------------------

// Elements [low, high), TILE at a time in the cache; raises `amax` to that of the FP32 sums.
static void accumulate_range(const Sum& sum, int64_t low, int64_t high, uint32_t* amax) {
    alignas(64) float total[TILE] = {0}, addend[TILE] = {0};
    const auto place = [](const Written& s, int64_t start) { return s.payload + start * SIZE[s.type]; };
    const auto read = [&](const Written& s, int64_t start, int64_t n, float* to) {
        DECODERS[s.type][FP32](place(s, start), (uint8_t*)to, n, *s.scale_inv);
    };
    for (int64_t start = low; start < high; start += TILE) {
        const int64_t n = high - start < TILE ? high - start : TILE;
        read(sum.total, start, n, total);
        read(sum.addend, start, n, addend);
        for (int64_t i = 0; i < n; i += LANES) store(total + i, load<F>(total + i) + load<F>(addend + i));
        raise_to(amax, ENCODERS[FP32][sum.total.type][WITH_AMAX]((uint8_t*)total, place(sum.total, start), n, 1.0f,
                                                                 start, nullptr));
    }
}

static const FusedKernels FUSED = {norm_rows,    norm_backward_rows,    activation_pieces, activation_backward_pieces,
                                   softmax_rows, softmax_backward_rows, accumulate_range};

#undef INLINE
}  // namespace ISA
