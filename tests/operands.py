"""Operands for the tests of kernels, and bit equality of what kernels return; interpreted and on a device alike."""

from __future__ import annotations

import pytest
import torch

from msamp_like.formats import BF16, E4M3, E5M2, FP16, FP32, ROW, WHOLE
from msamp_like.kernels import Noise, Operand, Row, cpu, reference

needs_native = pytest.mark.skipif(not cpu.available(), reason=cpu.status().reason)
NOISE = Noise(seed=2**40 + 3, tensor=5, step=2**31 + 7, role=1)
BLOCKS = [WHOLE, ROW, (1, 128), (128, 128), (1, 32), (-1, 128), (2, 3)]
REAL = (torch.float32, torch.bfloat16, torch.float16)

_STATE = (1, 128)
STORED = {  # parameter, gradient, first moment, second moment
    "O0": ((FP32, WHOLE), (BF16, WHOLE), (FP32, WHOLE), (FP32, WHOLE)),
    "O1": ((FP16, _STATE), (E4M3, WHOLE), (FP32, WHOLE), (FP32, WHOLE)),
    "O2": ((FP16, _STATE), (E4M3, WHOLE), (E4M3, _STATE), (FP16, _STATE)),
    "all in blocks": ((FP16, _STATE), (E5M2, _STATE), (BF16, _STATE), (FP16, _STATE)),
    "rows": ((FP16, ROW), (E4M3, ROW), (E4M3, ROW), (FP16, ROW)),
    "one scale a tensor": ((FP16, WHOLE), (E4M3, WHOLE), (E4M3, WHOLE), (FP16, WHOLE)),
}
"""What the fused Adam step takes: the first three are the levels."""

_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits(tensor):
    return tensor.contiguous().view(_RAW[tensor.element_size()])


def same(got, expected):
    """Equal bits; NaN of two or four bytes may differ in its payload, which nothing reads."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    nan = torch.zeros_like(expected, dtype=torch.bool) if expected.element_size() == 1 else expected.isnan()
    return torch.equal(bits(got)[~nan], bits(expected)[~nan]) and bool(got[nan].isnan().all() if nan.any() else True)


def spread(shape, dtype=torch.float32):
    """Numbers over some twenty binades, so that every format meets its subnormal numbers and its largest."""
    return (torch.randn(shape) * torch.exp2(3 * torch.randn(shape))).to(dtype)


def every_number(dtype):
    """All numbers of 16 bits."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def every_code(format):
    """All codes of a format of 8 or 16 bits."""
    return every_number(format.dtype) if format.bytes == 2 else torch.arange(256).to(torch.uint8).view(format.dtype)


def around_ties(format):
    """The numbers of an FP8 format, the ties between them, and what lies next to a tie on both sides."""
    codes = torch.arange(127, dtype=torch.uint8).view(format.dtype).float()
    codes = codes[codes.isfinite()]
    ties = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([torch.nextafter(ties, ties * 0), ties, torch.nextafter(ties, ties * 2), codes])
    return torch.cat([x, -x])


def around_binades(format):
    """Values of amax on both sides of every one at which the scale of a format changes, and the special ones."""
    binades = torch.tensor(format.largest).frexp().mantissa * torch.exp2(torch.arange(-148, 129).double()).float()
    edges = torch.tensor([0.0, 1e-45, 1e-38, torch.finfo(torch.float32).max, torch.inf, torch.nan])
    inf = torch.tensor(torch.inf)
    return torch.cat([binades.nextafter(-inf).clamp(min=0), binades, binades.nextafter(inf), edges]).view(1, -1)


def adam_operands(shape, stored, noise, poison):
    """Parameter, gradient and moments as ``stored`` says; ``poison`` maps a position among the four to a number."""
    values = [torch.randn(shape), *(torch.randn(shape) * 1e-3 for _ in range(2)), torch.rand(shape) * 1e-5]
    for index, number in poison.items():
        values[index].view(-1)[17] = number
    made = []
    for role, (value, (format, block)) in enumerate(zip(values, stored, strict=True)):
        payload, scale_inv, _ = reference.quantize_current(value, format, block)
        made.append(Operand(payload, scale_inv, block, noise and noise._replace(role=role)))
    return made


def row_of(operands, step, copy=None):
    """A row of parameter, gradient, first and second moment."""
    param, grad, *states = operands
    return Row(param, grad, tuple(states), step, copy)
