// What the instruction sets share: formats, the blocks of a tensor, scales, and what a kernel is told.

enum Type { FP32, BF16, FP16, E4M3, E5M2, UE5M3, TYPES, SPLIT };  // SPLIT: E4M3 and a residual
constexpr int64_t SIZE[TYPES] = {4, 2, 2, 1, 1, 1};
constexpr int64_t TILE = 2048;                   // elements worked on at a time where values are staged in the L1 cache
constexpr int64_t ELEMENTS_PER_THREAD = 32768;   // below that, waking a thread costs more than it saves
constexpr int64_t STREAMED_BYTES = 16 << 20;    // results of this size would fill a last-level cache
constexpr int64_t CHUNK = 65536;  // elements of a table that a thread takes at a time
constexpr uint32_t WEYL = 0x9E3779B9;  // reference.WEYL
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

// --- a table of parameters to step ----------------------------------------------------------------------------------

struct AdamScalars {
    float shrink;  // 1 - lr * weight_decay
    float weight_decay, beta1, rest1, beta2, rest2;
    int32_t decoupled;
};

struct LionScalars {
    float shrink, beta1, rest1, beta2, rest2, lr;
};

struct SgdScalars {
    float weight_decay, momentum, rest, lr;
    int32_t nesterov;
};

struct Stored {
    uint8_t* payload;
    float* scale_inv;
    Noise noise;
    int32_t noisy, type, per_tile;  // per_tile 0: one scale for the whole tensor
    float next_scale_inv;           // of a whole tensor, while it is written
    uint32_t amax;                  // of the new values, bits

    const Noise* noise_or_null() const { return noisy ? &noise : nullptr; }
    // An unscaled format has the scale 1, whatever is written; any other has to know it before.
    bool scale_unknown() const { return !per_tile && type != FP32 && type != BF16; }
};

// reference_updates.Row, and what of its update depends on the step. Tiles are (1, tile); an operand has one scale a tile
// or one in all.
struct Row {
    Stored stored[4];  // param, first, second (payload null: there is none), grad
    Stored copy;       // payload null: none
    int8_t* residual;  // null: the parameter holds all of the master
    float* residual_amax;
    int64_t rows, columns, tile;
    float rate, eps, ratio;
    float growth, increase;  // growth 0: no bound is known of what a step adds to a master in two parts
    int32_t step;

    bool scale_unknown(int operand) const {
        const bool foreseen = operand == 0 && residual && growth > 0;
        return operand < 3 && stored[operand].scale_unknown() && !foreseen;
    }
    Grid grid() const { return {rows, columns, 1, tile}; }
    int64_t numel() const { return rows * columns; }
};
