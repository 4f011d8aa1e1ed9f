"""The definition of every kernel, in plain torch, on plain tensors.

A faster twin (``cpu.cpp``, ``triton_*.py``) gives the same bytes; where it may not (a sum in another order), the parity
test states the bound. Nothing here is fast, everything here is short.

    real = payload * scale_inv        payload = real * scale        amax = max|x|, FP32

Scales are stored as a matrix of FP32 ``scale_inv``, one entry a block (see :mod:`msamp_like.formats`). A block whose
amax is not finite gets ``scale_inv = +inf`` and payload 0, so every value read back from it is NaN: the flag travels
with the tensor, and no later MAX over ranks can lose it as it would lose a NaN.

Stochastic rounding draws from Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), a
pure function of (seed, tensor, step, role, index): independent of device, threads and restarts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from msamp_like.formats import FP32, UE5M3, Block, Format, block_extent, format_of, grid_shape, matrix_shape

MAX_EXPONENT = 126
"""Scales are clamped to [2^-126, 2^126]: both a scale and its reciprocal are then normal FP32 numbers."""

UE5M3_NAN = 0xFC
"""The upper byte of FP16's quiet NaN, without the sign."""


class Noise(NamedTuple):
    """Where in the random stream one tensor's rounding stands; equal values draw equal bits on every device."""

    seed: int
    tensor: int
    step: int
    role: int


class Operand(NamedTuple):
    """One stored tensor as kernels see it; ``noise`` asks for stochastic rounding when it is written."""

    payload: Tensor
    scale_inv: Tensor  # FP32, grid_shape(payload.shape, block)
    block: Block
    noise: Noise | None = None


# --- scales ---------------------------------------------------------------------------------------------------------


def amax(x: Tensor, block: Block) -> Tensor:
    """Largest magnitude of each block, FP32, shape ``grid_shape(x.shape, block)``; NaN where the block holds one."""
    rows, columns = matrix_shape(x.shape)
    block_rows, block_columns = block_extent(x.shape, block)
    grid = grid_shape(x.shape, block)
    if x.numel() == 0:
        return torch.zeros(grid, dtype=torch.float32, device=x.device)
    magnitude = x.reshape(rows, columns).float().abs()
    padding = (0, grid[1] * block_columns - columns, 0, grid[0] * block_rows - rows)
    padded = torch.nn.functional.pad(magnitude, padding)
    return padded.view(grid[0], block_rows, grid[1], block_columns).amax(dim=(1, 3))


def scale_inv_from_amax(amax: Tensor, format: Format, margin: int = 0, power_of_two: bool = True) -> Tensor:
    """The scale that puts ``amax`` just inside the format, as its reciprocal; shape of ``amax``, FP32.

    The largest power of two with ``amax * scale <= largest / 2^margin``, found from the integer exponents and mantissas
    (log2 in FP32 is wrong just above a binade); or, with ``power_of_two=False``, ``amax / largest``. amax 0 gives 1, a
    non-finite amax gives +inf. Formats without a scale always get 1, but are flagged alike.
    """
    finite = torch.isfinite(amax)
    if not format.scaled:
        return torch.where(finite, torch.ones_like(amax), torch.inf)
    if power_of_two:
        bits = amax.float().contiguous().view(torch.int32)
        limit = int(torch.tensor(format.largest, dtype=torch.float32).view(torch.int32))
        exponent = (limit >> 23) - (bits >> 23) - margin
        exponent = exponent - ((bits & 0x7FFFFF) > (limit & 0x7FFFFF)).int()
        exponent = exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT)
        scale_inv = ((127 - exponent) << 23).int().view(torch.float32)
    else:
        scale_inv = (amax.float() / (format.largest / 2.0**margin)).clamp(2.0**-MAX_EXPONENT, 2.0**MAX_EXPONENT)
    scale_inv = torch.where(amax == 0, torch.ones_like(scale_inv), scale_inv)
    return torch.where(finite, scale_inv, torch.inf)


def expand_scales(scales: Tensor, shape: torch.Size | tuple[int, ...], block: Block) -> Tensor:
    """``scales`` of the grid broadcast to a matrix that multiplies ``x.reshape(matrix_shape(shape))``."""
    rows, columns = matrix_shape(shape)
    block_rows, block_columns = block_extent(shape, block)
    if scales.shape[0] > 1:
        scales = scales.repeat_interleave(block_rows, 0)[:rows]
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(block_columns, 1)[:, :columns]
    return scales


# --- casts ----------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, scale_inv: Tensor, format: Format, block: Block, noise: Noise | None = None) -> Tensor:
    """``x / scale_inv`` clamped to the format and rounded: to nearest even, or stochastically with ``noise``.

    Shape of ``x``. Finite input never becomes NaN or infinity. A block flagged by a non-finite scale_inv becomes 0.
    """
    scale_inv = expand_scales(scale_inv, x.shape, block)
    flagged = ~torch.isfinite(scale_inv)
    scaled = x.reshape(matrix_shape(x.shape)).float() * (1.0 / scale_inv)
    scaled = torch.where(flagged, torch.zeros_like(scaled), scaled)
    if noise is not None and format is not FP32:
        scaled = round_stochastically(scaled, format, noise)
    return encode(scaled.clamp(-format.largest if format.signed else 0.0, format.largest), format).view(x.shape)


def encode(value: Tensor, format: Format) -> Tensor:
    """FP32 within the format's range to its codes, rounded to nearest even; NaN stays NaN."""
    if format is not UE5M3:
        return value.to(format.dtype)
    field = (value.contiguous().view(torch.int32) >> 23).clamp(min=_exponent_field(format))
    steps_per_unit = ((254 + format.mantissa_bits - field) << 23).view(torch.float32)
    steps = torch.round(value * steps_per_unit).nan_to_num(0.0).int()
    code = ((field - _exponent_field(format)) << format.mantissa_bits) + steps
    return torch.where(value.isnan(), UE5M3_NAN, code).to(torch.uint8)


def decode(payload: Tensor) -> Tensor:
    """FP32 value of every code; exact."""
    if payload.dtype != UE5M3.dtype:
        return payload.float()
    return (payload.to(torch.int16) << 7).view(torch.float16).float()


def quantize_amax(x: Tensor, scale_inv: Tensor, format: Format, block: Block) -> tuple[Tensor, Tensor]:
    """:func:`quantize` and :func:`amax` of the same tensor; a twin reads ``x`` once."""
    return quantize(x, scale_inv, format, block), amax(x, block)


def quantize_current(
    x: Tensor, format: Format, block: Block, margin: int = 0, power_of_two: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale from the tensor at hand: (payload, scale_inv, amax)."""
    largest = amax(x, block)
    scale_inv = scale_inv_from_amax(largest, format, margin, power_of_two)
    return quantize(x, scale_inv, format, block), scale_inv, largest


def dequantize(payload: Tensor, scale_inv: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """``payload * scale_inv`` in FP32, rounded once to ``dtype``; shape of ``payload``."""
    matrix = decode(payload.reshape(matrix_shape(payload.shape)))
    return (matrix * expand_scales(scale_inv, payload.shape, block)).to(dtype).view(payload.shape)


# --- stochastic rounding --------------------------------------------------------------------------------------------

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, int, int, int], key: tuple[int, int]) -> list[Tensor]:
    """Four 32-bit words a counter, as int64 tensors of the shape of ``counter[0]``; ten rounds."""
    first = counter[0]
    words = [first, *(torch.full_like(first, value & _MASK) for value in counter[1:])]
    key0, key1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(10):
        product0, product1 = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        words = [high1 ^ words[1] ^ key0, low1, high0 ^ words[3] ^ key1, low0]
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return words


def random_bits(numel: int, noise: Noise, device: torch.device) -> Tensor:
    """16 random bits an element, int64, shape (numel,).

    Eight elements share one Philox counter: element i takes half ``i % 2`` (low half first) of word ``i % 8 // 2`` of
    counter (i // 8, step, role, 0) under key (seed, tensor).
    """
    counters = torch.arange(-(-numel // 8), dtype=torch.int64, device=device)
    words = philox((counters, noise.step, noise.role, 0), (noise.seed, noise.tensor))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=1).flatten()[:numel]


def round_stochastically(scaled: Tensor, format: Format, noise: Noise) -> Tensor:
    """FP32 values of the format, each the lower or upper neighbour of ``scaled`` with the odds that keep the mean.

    |y| is counted in steps of its binade, a uniform number in [0, 1) is added, the fraction dropped. The uniform has
    min(16, 23 - mantissa_bits) bits, so the addition is exact in FP32 for every normal value.
    """
    bits = min(16, 23 - format.mantissa_bits)
    uniform = (random_bits(scaled.numel(), noise, scaled.device) >> (16 - bits)).float() * 2.0**-bits
    magnitude = scaled.abs().clamp(max=format.largest)
    # the unit of a binade, and its reciprocal, must be normal FP32 numbers: only BF16's smallest values are nearer to 0
    smallest = max(_exponent_field(format), format.mantissa_bits + 1)
    field = (magnitude.view(torch.int32) >> 23).clamp(min=smallest)
    steps_per_unit = ((254 + format.mantissa_bits - field) << 23).view(torch.float32)
    unit = ((field - format.mantissa_bits) << 23).view(torch.float32)
    steps = torch.floor(magnitude * steps_per_unit + uniform.view(scaled.shape))
    return torch.copysign(steps * unit, scaled)


def _exponent_field(format: Format) -> int:
    return int(torch.tensor(format.smallest_normal, dtype=torch.float32).view(torch.int32)) >> 23


# --- products -------------------------------------------------------------------------------------------------------


def scaled_matmul(a: Operand, b: Operand, layout: str, dtype: torch.dtype) -> Tensor:
    """Product of two stored matrices, FP32 accumulation, rounded once to ``dtype``.

    ``layout`` names the transposition of each operand, as BLAS does: "nt" is a[M, K] b[N, K]^T, "nn" is a[M, N] b[N,
    K], "tn" is a[M, N]^T b[M, K].
    """
    left = dequantize(a.payload, a.scale_inv, a.block, torch.float32)
    right = dequantize(b.payload, b.scale_inv, b.block, torch.float32)
    return (transposed(left, layout[0]) @ transposed(right, layout[1])).to(dtype)


def transposed(matrix: Tensor, letter: str) -> Tensor:
    """``matrix`` for "n", its transpose for "t": one letter of a layout."""
    return matrix.t() if letter == "t" else matrix


# --- optimizer updates ----------------------------------------------------------------------------------------------


class AdamScalars(NamedTuple):
    """Scalars of one Adam step, each rounded to FP32 where it is used. ``step`` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool  # AdamW: decay acts on the weight; Adam: it is added to the gradient
    step: int


def adam_update(param: Tensor, grad: Tensor, first: Tensor, second: Tensor, scalars: AdamScalars) -> list[Tensor]:
    """One step of Adam or AdamW on FP32 tensors of one shape: new (param, first moment, second moment).

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    References: Kingma and Ba, "Adam", 2015, arXiv:1412.6980; Loshchilov and Hutter, "Decoupled Weight Decay
    Regularization", 2019, arXiv:1711.05101.

    Every product and sum is its own rounding: a fused multiply-add would give other last bits on another device.
    """
    s = scalars
    if s.weight_decay != 0:
        if s.decoupled:
            param = param * (1 - s.lr * s.weight_decay)
        else:
            grad = grad + param * s.weight_decay
    first = first * s.beta1 + grad * (1 - s.beta1)
    second = second * s.beta2 + (grad * grad) * (1 - s.beta2)
    correction1, correction2 = 1 - s.beta1**s.step, (1 - s.beta2**s.step) ** 0.5
    root = second.double().sqrt().float()  # torch's FP32 square root is not correctly rounded on every CPU
    denominator = root / correction2 + s.eps
    param = param - (first / denominator) * (s.lr / correction1)
    return [param, first, second]


def adam_step_(param: Operand, grad: Operand, first: Operand, second: Operand, scalars: AdamScalars) -> None:
    """One fused Adam step in place: dequantize, :func:`adam_update`, requantize with scales from the new values."""
    stored = (param, first, second)
    w, g, m, v = (dequantize(t.payload, t.scale_inv, t.block, torch.float32) for t in (param, grad, first, second))
    for target, value in zip(stored, adam_update(w, g, m, v, scalars), strict=True):
        store_(target, value)


def store_(target: Operand, value: Tensor) -> None:
    """Overwrite a stored tensor with FP32 ``value``, scales from the value itself, rounding as ``target.noise``
    says."""
    format = format_of(target.payload.dtype)
    scale_inv = scale_inv_from_amax(amax(value, target.block), format)
    target.payload.copy_(quantize(value, scale_inv, format, target.block, target.noise))
    target.scale_inv.copy_(scale_inv)
