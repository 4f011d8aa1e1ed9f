"""Definitions of the fused kernels: a norm, activation, softmax or sum together with the casts of what leaves it.

Each reads its input once, and writes the result (as it is, or quantized for the product that reads it) and what
backward keeps of it, quantized in groups. The casts are those of :mod:`.reference`, so payload and scales are bit-equal
wherever the FP32 values before them are. Those are not defined to the bit: a row's sums may run in another order, and
exp, erf and tanh are what a device's library gives; the parity tests bound both.

What is kept: a norm its normalized input, which its backward needs and no mean; an activation its input, a product its
factors; a softmax its probabilities. Backward is taken at the values kept.

GELU: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, https://arxiv.org/abs/1606.08415. SiLU of a gate times
a value is SwiGLU: Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from msamp_like.formats import Block, Format, format_of, grid_shape
from msamp_like.kernels import reference
from msamp_like.kernels.reference import Operand

KINDS = ("gelu", "gelu_tanh", "silu")
_ELEMENTS_AT_A_TIME = 1 << 20
"""A softmax works on this many logits at a time: its FP32 values never exist all at once."""


# --- sums -------------------------------------------------------------------------------------------------------------


def accumulate_(total: Operand, addend: Operand) -> None:
    """Add one stored tensor to another in place: the FP32 sum of the real values, rounded once as ``total`` is stored.

    A twin reads both and writes ``total``, and makes no tensor, where ``total`` is BF16 or FP32 and both have one
    scale: the sum of gradients over micro-batches.
    """
    values = reference.dequantize(*total[:3], torch.float32) + reference.dequantize(*addend[:3], torch.float32)
    reference.store_(total, values)


def requantize(
    source: Operand, format: Format, block: Block, margin: int = 0, power_of_two: bool = True
) -> tuple[Tensor, Tensor]:
    """:func:`.reference.quantize_current` of the real values of a stored tensor: (payload, scale_inv).

    A twin makes no FP32 tensor of them where ``source`` has one scale (on CPU: the scale 1).
    """
    values = reference.dequantize(*source[:3], torch.float32)
    return reference.quantize_current(values, format, block, margin, power_of_two)[:2]


# --- norms, activations, softmax --------------------------------------------------------------------------------------


class Target(NamedTuple):
    """How a fused kernel stores a result: without ``block`` as it is, in ``dtype``; else quantized, with the delayed
    ``scale_inv`` of the whole tensor or, without one, scales from the result itself."""

    dtype: torch.dtype
    block: Block | None = None
    scale_inv: Tensor | None = None


class Stored(NamedTuple):
    """A result as its target asked for; scales and amax are empty where it has none."""

    payload: Tensor
    scale_inv: Tensor
    amax: Tensor


class Kept(NamedTuple):
    """What backward keeps of a tensor; ``block`` is of one row."""

    payload: Tensor
    scale_inv: Tensor


class Grouped(NamedTuple):
    """How a fused kernel stores what backward keeps."""

    format: Format
    block: Block


def store(real: Tensor, target: Target) -> Stored:
    """FP32 values as ``target`` asks."""
    if target.block is None:
        none = real.new_empty(0, dtype=torch.float32)
        return Stored(real.to(target.dtype), none, none.clone())
    format = format_of(target.dtype)
    if target.scale_inv is None:
        return Stored(*reference.quantize_current(real, format, target.block))
    payload, amax = reference.quantize_amax(real, target.scale_inv, format, target.block)
    return Stored(payload, target.scale_inv.clone(), amax)


def keep(real: Tensor, grouped: Grouped) -> Kept:
    """FP32 values as backward keeps them."""
    return Kept(*reference.quantize_current(real, grouped.format, grouped.block)[:2])


def _real(kept: Operand) -> Tensor:
    return reference.dequantize(kept.payload, kept.scale_inv, kept.block, torch.float32)


# --- norms ----------------------------------------------------------------------------------------------------------


def norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool, out: Target, kept: Grouped
) -> tuple[Stored, Kept, Tensor]:
    """LayerNorm (``centered``) or RMSNorm over the last dim: (result, normalized input, 1 / deviation (rows,) FP32).

    n = (x - mean) / sqrt(var + eps), of RMSNorm x / sqrt(mean(x^2) + eps);  result = n * weight + bias
    """
    real = x.float()
    if centered:
        real = real - real.mean(-1, keepdim=True)
    inverse = (real.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalized = real * inverse
    result = normalized if weight is None else normalized * weight.float()
    result = result if bias is None else result + bias.float()
    return store(result, out), keep(normalized, kept), inverse.flatten()


def norm_backward(
    grad: Tensor, kept: Operand, inverse: Tensor, weight: Tensor | None, centered: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_input in ``dtype``, grad_weight, grad_bias), the last two FP32 (columns,).

    With g = grad * weight: grad_input = (g - mean(g) - n mean(g n)) / deviation, of RMSNorm without mean(g).
    """
    columns = grad.shape[-1]
    grad32, normalized = grad.float().reshape(-1, columns), _real(kept).reshape(-1, columns)
    scaled = grad32 if weight is None else grad32 * weight.float()
    grad_input = scaled - normalized * (scaled * normalized).mean(-1, keepdim=True)
    if centered:
        grad_input = grad_input - scaled.mean(-1, keepdim=True)
    grad_input = (grad_input * inverse.unsqueeze(-1)).to(dtype).view(grad.shape)
    return grad_input, (grad32 * normalized).sum(0), grad32.sum(0)


# --- activations ----------------------------------------------------------------------------------------------------


def activation(x: Tensor, kind: str) -> Tensor:
    """``kind`` of FP32 ``x``: "gelu", "gelu_tanh" (its approximation) or "silu"."""
    if kind == "silu":
        return x * torch.sigmoid(x)
    if kind == "gelu":
        return x * _normal_below(x)
    return x * torch.sigmoid(2 * _tanh_argument(x))


def slope(x: Tensor, kind: str) -> Tensor:
    """Derivative of :func:`activation` at FP32 ``x``."""
    if kind == "silu":
        below = torch.sigmoid(x)
        return below * (1 + x * (1 - below))
    if kind == "gelu":
        return _normal_below(x) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    below = torch.sigmoid(2 * _tanh_argument(x))
    inner = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return below * (1 + x * (1 - below) * inner)


def _normal_below(x: Tensor) -> Tensor:
    """Share of a normal distribution that lies below x."""
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _tanh_argument(x: Tensor) -> Tensor:
    """0.5 (1 + tanh(y)) is sigmoid(2 y) of this y."""
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)


def activation_quantize(
    gate: Tensor, value: Tensor | None, kind: str, out: Target, kept: Grouped
) -> tuple[Stored, Kept, Kept]:
    """``kind(gate)``, or ``kind(gate) * value``: (result, gate kept, value kept; empty without one)."""
    result = activation(gate.float(), kind)
    if value is None:
        none = torch.empty(0, dtype=kept.format.dtype, device=gate.device)
        return store(result, out), keep(gate.float(), kept), Kept(none, none.float())
    return store(result * value.float(), out), keep(gate.float(), kept), keep(value.float(), kept)


def activation_backward(
    grad: Tensor, gate: Operand, value: Operand | None, kind: str, out: Target
) -> tuple[Stored, Stored]:
    """(grad of the gate, grad of the value; empty without one), both stored as ``out`` asks."""
    grad32, gate32 = grad.float(), _real(gate)
    if value is None:
        none = grad.new_empty(0, dtype=torch.float32)
        return store(grad32 * slope(gate32, kind), out), Stored(none.to(out.dtype), none, none.clone())
    factor = grad32 * activation(gate32, kind)
    return store(grad32 * _real(value) * slope(gate32, kind), out), store(factor, out)


# --- softmax --------------------------------------------------------------------------------------------------------


def softmax_quantize(logits: Tensor, kept: Grouped) -> tuple[Tensor, Kept]:
    """Of each row (rows, columns): (log of the sum of exponentials FP32 (rows,), softmax kept)."""
    rows, columns = logits.shape
    height = max(1, _ELEMENTS_AT_A_TIME // max(1, columns))
    sums = torch.empty(rows, dtype=torch.float32, device=logits.device)
    payload = torch.empty(logits.shape, dtype=kept.format.dtype, device=logits.device)
    grid = grid_shape(logits.shape, kept.block)
    scale_inv = torch.ones(grid, dtype=torch.float32, device=logits.device)
    for start in range(0, rows, height):
        part = slice(start, start + height)
        real = logits[part].float()
        sums[part] = torch.logsumexp(real, -1)
        payload[part], scale_inv[part] = keep(torch.exp(real - sums[part].unsqueeze(-1)), kept)
    return sums, Kept(payload, scale_inv)


def softmax_backward(kept: Operand, targets: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Grad of logits from that of each row's loss, FP32 (rows,): ``(softmax - [column is target]) * grad``.

    A target below 0 is no column: such a row's grad is that of the sum alone, and 0 where the row does not count.
    """
    rows, columns = kept.payload.shape
    height = max(1, _ELEMENTS_AT_A_TIME // max(1, columns))
    result = torch.empty(rows, columns, dtype=dtype, device=grad.device)
    for start in range(0, rows, height):
        part = slice(start, start + height)
        softmax = reference.dequantize(kept.payload[part], kept.scale_inv[part], kept.block, torch.float32)
        target = targets[part].unsqueeze(-1)
        chosen = torch.zeros_like(softmax).scatter_(1, target.clamp(min=0), (target >= 0).float())
        result[part] = ((softmax - chosen) * grad[part].unsqueeze(-1)).to(dtype)
    return result
