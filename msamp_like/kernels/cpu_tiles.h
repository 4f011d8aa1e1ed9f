// Fused steps over tiles of any length in any formats: values are staged in FP32. Part of cpu_kernels.h.

struct Values {  // of one tile, FP32: the old ones, then the new
    alignas(64) float param[TILE], first[TILE], second[TILE], grad[TILE];
    uint32_t amax[3];  // bits, of param, first, second
};

// Elements [start, start + n) of a master in two parts, and back; a group is cut at the end.
static void read_split(const Row& row, int64_t start, int64_t n, float* values) {
    for (int64_t i = 0; i < n; i += GROUP) {
        const int64_t count = n - i < GROUP ? n - i : GROUP;
        uint8_t codes[GROUP] = {0}, residual[GROUP] = {0};
        memcpy(codes, row.stored[0].payload + start + i, count);
        memcpy(residual, row.residual + start + i, count);
        Group real;
        decode_split(codes, residual, real);
        for (int k = 0; k < 4; ++k) store(values + i + k * LANES, real[k] * floats(row.stored[0].scale_inv[0]));
    }
}

static void write_split(const Row& row, int64_t start, int64_t n, const float* values) {
    const F scale = floats(1.0f / row.stored[0].next_scale_inv);
    for (int64_t i = 0; i < n; i += GROUP) {
        const int64_t count = n - i < GROUP ? n - i : GROUP;
        uint8_t codes[GROUP], residual[GROUP];
        Group real;
        U words[4];
        for (int k = 0; k < 4; ++k) {
            real[k] = load<F>(values + i + k * LANES);
            words[k] = random_words(weyl_lanes(row.stored[0].noise), start + i + k * LANES, row.stored[0].noise);
        }
        if (row.stored[0].noisy)
            encode_split<true>(codes, residual, real, scale, words);
        else
            encode_split<false>(codes, residual, real, scale, words);
        memcpy(row.stored[0].payload + start + i, codes, count);
        memcpy(row.residual + start + i, residual, count);
    }
}

INLINE I magnitude_below(F value, I lanes, int64_t count) {
    const I magnitude = magnitude_of(value);
    return count >= LANES ? magnitude : (lanes < (int32_t)count ? magnitude : I{});
}

template <typename Update>
static void update_values(const Update& update, int64_t n, Values& values) {
    const I lanes = lane_numbers();
    I amax[3] = {};
    for (int64_t i = 0; i < n; i += LANES) {
        F param = load<F>(values.param + i), first = load<F>(values.first + i), second = {};
        if constexpr (Update::STATES == 2) second = load<F>(values.second + i);
        update(param, first, second, load<F>(values.grad + i));
        store(values.param + i, param);
        store(values.first + i, first);
        amax[0] = larger(magnitude_below(param, lanes, n - i), amax[0]);
        amax[1] = larger(magnitude_below(first, lanes, n - i), amax[1]);
        if constexpr (Update::STATES == 2) {
            store(values.second + i, second);
            amax[2] = larger(magnitude_below(second, lanes, n - i), amax[2]);
        }
    }
    for (int k = 0; k < 3; ++k) values.amax[k] = largest_lane(amax[k]);
}

static void read_values(const Row& row, int64_t start, int64_t n, int64_t tile, Values& values) {
    float* const staged[4] = {values.param, values.first, values.second, values.grad};
    for (int k = 0; k < 4; ++k) {
        const Stored& stored = row.stored[k];
        if (k == 0 && row.residual)
            read_split(row, start, n, values.param);
        else if (stored.payload)
            DECODERS[stored.type][FP32](stored.payload + start * SIZE[stored.type], (uint8_t*)staged[k], n,
                                        stored.scale_inv[stored.per_tile ? tile : 0]);
    }
}

static void write_values(const Values& values, const Row& row, int64_t start, int64_t n, int64_t tile) {
    const float* const sources[3] = {values.param, values.first, values.second};
    for (int k = 0; k < 3; ++k) {
        const Stored& stored = row.stored[k];
        if (!stored.payload) continue;
        if (k == 0 && row.residual) {
            write_split(row, start, n, values.param);
            continue;
        }
        float scale_inv = stored.next_scale_inv;
        if (stored.per_tile) scale_inv = stored.scale_inv[tile] = Rule{stored.type}.scale_inv(values.amax[k]);
        quantize_run(FP32, (const uint8_t*)sources[k], stored.type, stored.payload + start * SIZE[stored.type], start, n,
                     scale_inv, stored.noise_or_null(), false);
    }
}

// The copy of what is stored now, with the scale that was guessed; the largest value says whether it was right.
static uint32_t copy_values(const Row& row, int64_t start, int64_t n, int64_t tile, Values& values) {
    const Stored &param = row.stored[0], &copy = row.copy;
    const float scale_inv = param.per_tile ? param.scale_inv[tile] : param.next_scale_inv;
    DECODERS[param.type][FP32](param.payload + start * SIZE[param.type], (uint8_t*)values.param, n, scale_inv);
    quantize_run(FP32, (const uint8_t*)values.param, copy.type, copy.payload + start * SIZE[copy.type], start, n,
                 copy.next_scale_inv, nullptr, false);
    return AMAXES[FP32]((const uint8_t*)values.param, n);
}

// `write` false: only finds the largest new values, for operands whose one scale must be known before any is written.
template <typename Update>
static void step_tiles(Row& row, const Update& update, int64_t low, int64_t high, bool write) {
    const Grid grid = row.grid();
    Values values = {};
    uint32_t amax[4] = {0, 0, 0, 0};
    for (Run run(grid, low, high); run.start < high; run.next()) {
        read_values(row, run.start, run.length(), run.block, values);
        update_values(update, run.length(), values);
        for (int k = 0; k < 3; ++k) amax[k] = values.amax[k] > amax[k] ? values.amax[k] : amax[k];
        if (write) write_values(values, row, run.start, run.length(), run.block);
        if (write && row.copy.payload) {
            const uint32_t largest = copy_values(row, run.start, run.length(), run.block, values);
            amax[3] = largest > amax[3] ? largest : amax[3];
        }
    }
    for (int k = 0; k < 3; ++k) raise_to(&row.stored[k].amax, amax[k]);
    raise_to(&row.copy.amax, amax[3]);
}

// Elements [low, high), which cut no tile.
static void adam_range(Row& row, const AdamScalars& scalars, int64_t low, int64_t high, bool write) {
    const StepBlocks blocks = write ? blocks_of(row) : nullptr;
    if (blocks)
        blocks(row, scalars, low / BLOCK, high / BLOCK);
    else
        step_tiles(row, Adam(row, scalars), low, high, write);
}

template <typename Update>
static void momentum_range(Row& row, const typename Update::Scalars& scalars, int64_t low, int64_t high, bool write) {
    const MomentumBlocks<Update> blocks = momentum_blocks_of<Update>(row);
    if (blocks)
        blocks(row, Update(row, scalars), low / BLOCK, high / BLOCK, write);
    else
        step_tiles(row, Update(row, scalars), low, high, write);
}

// The copy once more, with the scale that the step found.
static void copy_range(Row& row, int64_t low, int64_t high) {
    const Grid grid = row.grid();
    Values values;
    for (Run run(grid, low, high); run.start < high; run.next())
        copy_values(row, run.start, run.length(), run.block, values);
}
