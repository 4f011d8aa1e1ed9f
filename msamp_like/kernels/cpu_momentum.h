// Fused steps of updates that keep one state, a momentum: Lion and SGD. Part of cpu_kernels.h.
//
// An update is compiled once for a master's and a momentum's formats. What else rows differ in (noise, the gradient's
// format, a copy) is asked once a group, which costs little and saves a kernel for each combination.

// reference_updates.lion_update
struct Lion {
    typedef LionScalars Scalars;
    static constexpr int STATES = 1;
    const F shrink, beta1, rest1, beta2, rest2, lr;

    Lion(const Row&, const Scalars& s)
        : shrink(floats(s.shrink)), beta1(floats(s.beta1)), rest1(floats(s.rest1)), beta2(floats(s.beta2)),
          rest2(floats(s.rest2)), lr(floats(s.lr)) {}

    INLINE_MEMBER void operator()(F& param, F& momentum, F&, F grad) const {
        const F sum = momentum * beta1 + grad * rest1;
        param = param * shrink - (sum > F{} ? lr : sum < F{} ? -lr : F{});  // the sign of NaN is 0
        momentum = momentum * beta2 + grad * rest2;
    }
};

// reference_updates.sgd_update
struct Sgd {
    typedef SgdScalars Scalars;
    static constexpr int STATES = 1;
    const F decay, beta, rest, lr;
    const bool decays, averages, starts, nesterov;

    Sgd(const Row& row, const Scalars& s)
        : decay(floats(s.weight_decay)), beta(floats(s.momentum)), rest(floats(s.rest)), lr(floats(s.lr)),
          decays(s.weight_decay != 0), averages(s.momentum != 0), starts(row.step == 1), nesterov(s.nesterov) {}

    INLINE_MEMBER void operator()(F& param, F& momentum, F&, F grad) const {
        if (decays) grad = grad + param * decay;
        F direction = grad;
        if (averages) {
            momentum = starts ? grad : momentum * beta + grad * rest;
            direction = nesterov ? grad + momentum * beta : momentum;
        }
        param = param - direction * lr;
    }
};

// The steps of a row's blocks [low, high).
template <typename Update, int Param, int First>
struct OneState {
    Row& row;
    const Update& update;
    const Stored param, first, grad;  // a store of bytes might change what `row` says of them
    uint8_t* const residual;
    const F weight_scale, copy_scale;
    I whole[3] = {};  // largest magnitudes, of param, momentum and copy

    static constexpr int COPY = Param == FP16 ? E4M3 : BF16;  // the format that the levels make of such a master

    OneState(Row& row, const Update& update)
        : row(row), update(update), param(row.stored[0]), first(row.stored[1]), grad(row.stored[3]),
          residual((uint8_t*)row.residual), weight_scale(floats(1.0f / param.next_scale_inv)),
          copy_scale(floats(1.0f / row.copy.next_scale_inv)) {}

    INLINE_MEMBER void decode_grad(int64_t place, Group& real) const {
        const uint8_t* from = grad.payload + place * SIZE[grad.type];
        if (grad.type == E4M3)
            decode<E4M3>(from, real);
        else if (grad.type == BF16)
            decode<BF16>(from, real);
        else
            decode<FP32>(from, real);
    }

    // New values of a block; returns the largest magnitudes of param and momentum.
    INLINE_MEMBER Four stage(int64_t block, F (&params)[VECTORS], F (&firsts)[VECTORS]) {
        const F scales[3] = {floats(param.scale_inv[param.per_tile ? block : 0]),
                             floats(first.scale_inv[first.per_tile ? block : 0]),
                             floats(grad.scale_inv[grad.per_tile ? block : 0])};
        I largest[3] = {};
        for (int i = 0; i < VECTORS; i += 4) {
            const int64_t place = block * BLOCK + i * LANES;
            Group w, m, g;
            if constexpr (Param == SPLIT)
                decode_split(param.payload + place, residual + place, w);
            else
                decode<Param>(param.payload + place * SIZE[Param], w);
            decode<First>(first.payload + place * SIZE[First], m);
            decode_grad(place, g);
            for (int k = 0; k < 4; ++k) {
                F value = w[k] * scales[0], average = m[k] * scales[1], none = {};
                update(value, average, none, g[k] * scales[2]);
                largest[0] = larger(magnitude_of(value), largest[0]);
                largest[1] = larger(magnitude_of(average), largest[1]);
                params[i + k] = value;
                firsts[i + k] = average;
            }
        }
        for (int k = 0; k < 2; ++k) whole[k] = larger(largest[k], whole[k]);
        return largest_lanes(largest);
    }

    // A block of one operand, with a new scale from its largest magnitude where the format has scales.
    template <int Type>
    INLINE_MEMBER void write(const Stored& to, int64_t block, const F (&values)[VECTORS], uint32_t amax, F scale) {
        if constexpr (Type != FP32 && Type != SPLIT) {
            const float scale_inv = to.scale_inv[block] = Rule{Type}.scale_inv(amax);
            if (__builtin_expect(!finite(scale_inv), 0)) {
                memset(to.payload + block * BLOCK * SIZE[Type], 0, BLOCK * SIZE[Type]);
                return;
            }
            scale = floats(1.0f / scale_inv);
        }
        const U lanes = weyl_lanes(to.noise);
        for (int i = 0; i < VECTORS; i += 4) {
            const int64_t place = block * BLOCK + i * LANES;
            U words[4];
            for (int k = 0; k < 4 && to.noisy; ++k) words[k] = random_words(lanes, place + k * LANES, to.noise);
            if constexpr (Type == SPLIT) {
                if (to.noisy)
                    encode_split<true>(to.payload + place, residual + place, values + i, scale, words);
                else
                    encode_split<false>(to.payload + place, residual + place, values + i, scale, words);
            } else {
                Group real;
                for (int k = 0; k < 4; ++k) real[k] = Type == FP32 ? values[i + k] : values[i + k] * scale;
                if (Type != FP32 && to.noisy)
                    encode_scaled_stochastically<Type, UPPER>(to.payload + place * SIZE[Type], real, words);
                else
                    encode_scaled<Type>(to.payload + place * SIZE[Type], real);
            }
        }
    }

    // Only finds the largest magnitudes, for a scale that must be known before the first block is written.
    void find(int64_t low, int64_t high) {
        F params[VECTORS], firsts[VECTORS];
        for (int64_t block = low; block < high; ++block) stage(block, params, firsts);
        raise_to(&row.stored[0].amax, largest_lane(whole[0]));
    }

    // A block is written while the next is updated, and its copy made from what was written while that one is: neither
    // waits for a scale or for stores on their way.
    void run(int64_t low, int64_t high) {
        F params[2][VECTORS], firsts[2][VECTORS];
        Four amax[2];
        for (int64_t block = low; block < high + 2; ++block) {
            const int fresh = block & 1, ready = fresh ^ 1;
            if (block < high) amax[fresh] = stage(block, params[fresh], firsts[fresh]);
            if constexpr (Param != SPLIT)
                if (row.copy.payload && block > low + 1)
                    whole[2] = write_copy<Param, COPY>(row, block - 2, copy_scale, whole[2]);
            if (block > low && block <= high) {
                write<Param>(param, block - 1, params[ready], amax[ready][0], weight_scale);
                write<First>(first, block - 1, firsts[ready], amax[ready][1], F{});
            }
        }
        for (int k = 0; k < 2; ++k) raise_to(&row.stored[k].amax, largest_lane(whole[k]));
        raise_to(&row.copy.amax, largest_lane(whole[2]));
    }
};

template <typename Update>
using MomentumBlocks = void (*)(Row&, const Update&, int64_t, int64_t, bool);

template <typename Update, int Param, int First>
static void one_state_blocks(Row& row, const Update& update, int64_t low, int64_t high, bool writes) {
    OneState<Update, Param, First> blocks(row, update);
    if constexpr (Param == SPLIT)
        if (!writes) return blocks.find(low, high);
    blocks.run(low, high);
}

// The step for the formats that the levels store in; null for any other. Of those, a master in two parts alone has a
// scale that is not known before.
template <typename Update>
static MomentumBlocks<Update> momentum_blocks_of(const Row& row) {
    const Stored &param = row.stored[0], &first = row.stored[1], &grad = row.stored[3], &copy = row.copy;
    if (row.columns % BLOCK != 0 || row.tile != BLOCK || param.noise.lower_half || first.noise.lower_half) return nullptr;
    if ((param.scale_unknown() && !row.residual) || first.scale_unknown()) return nullptr;
    if (grad.type != E4M3 && grad.type != BF16 && grad.type != FP32) return nullptr;
    if (row.residual) return first.type == E4M3 && !copy.payload ? one_state_blocks<Update, SPLIT, E4M3> : nullptr;
    if (copy.payload && copy.type != (param.type == FP16 ? E4M3 : BF16)) return nullptr;
    if (param.type == FP16 && first.type == E4M3) return one_state_blocks<Update, FP16, E4M3>;
    if (param.type == FP16 && first.type == FP32) return one_state_blocks<Update, FP16, FP32>;
    if (param.type == FP32 && first.type == FP32 && !param.per_tile) return one_state_blocks<Update, FP32, FP32>;
    return nullptr;
}
