// All kernels of one instruction set: included once for each by cpu.cpp, which defines ISA (the namespace) and LANES
// (floats in one vector). The headers are written on GCC's vector types and have no guards: they are meant to be read
// again.
//
// Every product, sum, quotient and root is its own FP32 rounding, so that the bytes equal those of the reference. The
// build must not contract them (-ffp-contract=off) nor flush subnormals (no -ffast-math).

namespace ISA {

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

#include "cpu_vectors.h"
#include "cpu_noise.h"
#include "cpu_casts.h"
#include "cpu_scaled.h"
#include "cpu_updates.h"
#include "cpu_momentum.h"
#include "cpu_tiles.h"

static const Kernels KERNELS = {amax_range, quantize_range,       quantize_current_range, dequantize_range,
                                adam_range, momentum_range<Lion>, momentum_range<Sgd>,    copy_range};

#undef INLINE
#undef INLINE_MEMBER
}  // namespace ISA
