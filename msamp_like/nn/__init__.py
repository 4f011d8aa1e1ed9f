"""Low-precision layers, conversion of a model to them and back, gradient clipping."""

from msamp_like.nn.clip_grad import clip_grad_norm_
from msamp_like.nn.conversion import convert, restore
from msamp_like.nn.functional import LinearGemm
from msamp_like.nn.grouped import GroupedGemm, GroupedLinear, grouped_linear
from msamp_like.nn.linear import Fp8Linear, ReadsAsBase

__all__ = [
    "Fp8Linear",
    "GroupedGemm",
    "GroupedLinear",
    "LinearGemm",
    "ReadsAsBase",
    "clip_grad_norm_",
    "convert",
    "grouped_linear",
    "restore",
]
