"""How close two tensors are: in dB where rounding is a choice, to the bit where it is defined."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msamp_like.tensor import real


def sqnr(exact: Tensor, value: Tensor) -> float:
    """Signal to quantization noise, dB: 20 log10(|exact| / |exact - value|); inf where they are equal.

    One rounding to a mantissa of m stored bits costs about 6 m + 13 dB for normal data (E5M2 25, E4M3 31, BF16 55,
    FP16 73); the noises of independent roundings add.
    """
    exact, value = real(exact.detach(), torch.float64), real(value.detach(), torch.float64)
    noise = (exact - value).norm().item()
    return math.inf if noise == 0 else 20 * math.log10(exact.norm().item() / noise)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in type, shape and every bit; NaN equals the same NaN. Of ScalingTensors, what they store."""
    if type(a) is not type(b) or a.dtype != b.dtype or a.shape != b.shape:
        return False
    if hasattr(a, "payload"):
        return a.block == b.block and same_bits(a.payload, b.payload) and same_bits(a.scale_inv, b.scale_inv)
    if a.numel() == 0:
        return True
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
