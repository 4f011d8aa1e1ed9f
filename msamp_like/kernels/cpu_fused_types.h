// What cpu.cpp hands to the fused kernels of cpu_fused.h; cpu_fused.py has the same structures.

enum Kind { GELU, GELU_TANH, SILU };        // the order of reference_fused.KINDS
enum How { AS_IT_IS, IN_GROUPS, DELAYED };  // how a result is stored: a plain cast, a scale a group, one known scale

// A result to write, or one written before to read.
struct Written {
    uint8_t* payload;
    float* scale_inv;
    uint32_t* amax;  // bits of FP32; null: not asked for
    int64_t block;   // elements of a row in one group; 0 without groups
    int32_t type, how;
};

struct Norm {
    const uint8_t* x;
    const float *weight, *bias;  // null, or whole vectors
    float* inverse;
    Written out, kept;
    int64_t columns;
    float eps;
    int32_t in, centered;
};

struct NormBackward {
    const uint8_t* grad;
    const float *inverse, *weight;
    Written kept, out;
    int64_t columns;
    int32_t grad_type, centered;
};

struct Activation {
    const uint8_t *gate, *value;  // value null: none
    Written out, kept_gate, kept_value;
    int64_t columns;
    int32_t gate_type, value_type, kind, unused;
};

struct ActivationBackward {
    const uint8_t* grad;
    Written gate, value, out_gate, out_value;
    int64_t columns;
    int32_t grad_type, kind;
};

struct Softmax {
    const uint8_t* logits;
    float* sums;
    Written kept;
    int64_t columns;
    int32_t in, unused;
};

struct SoftmaxBackward {
    Written kept, out;
    const int64_t* targets;
    const float* grad;
    int64_t columns;
};

// One scale each, `how` and `block` are not read.
struct Sum {
    Written total, addend;
};

struct FusedKernels {
    void (*norm)(const Norm&, int64_t, int64_t, float*);
    void (*norm_backward)(const NormBackward&, int64_t, int64_t, float*, float*, float*);
    void (*activation)(const Activation&, int64_t, int64_t);
    void (*activation_backward)(const ActivationBackward&, int64_t, int64_t);
    void (*softmax)(const Softmax&, int64_t, int64_t, float*);
    void (*softmax_backward)(const SoftmaxBackward&, int64_t, int64_t, float*);
    void (*accumulate)(const Sum&, int64_t, int64_t, uint32_t*);
};
