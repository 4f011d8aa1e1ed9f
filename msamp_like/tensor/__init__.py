"""ScalingTensor: a tensor stored in few bits with its scales, and the table of operations it defines."""

from msamp_like.tensor import operations, sharding
from msamp_like.tensor.scaling_tensor import ScalingTensor, norm, real, unscaled

__all__ = ["ScalingTensor", "norm", "operations", "real", "sharding", "unscaled"]
