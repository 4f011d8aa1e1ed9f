"""The definition of every kernel, in plain torch, on plain tensors.

A faster twin (``cpu.cpp``, ``triton_*.py``) gives the same bytes; where it may not (a sum in another order), the parity
test states the bound. Nothing here is fast, everything here is short.

    real = payload * scale_inv        payload = real * scale        amax = max|x|, FP32

Scales are stored as a matrix of FP32 ``scale_inv``, one entry a block (see :mod:`msamp_like.formats`). A block whose
amax is not finite gets ``scale_inv = +inf`` and payload 0, so every value read back from it is NaN: the flag travels
with the tensor, and no later MAX over ranks can lose it as it would lose a NaN.

Stochastic rounding draws 16 bits an element from a keyed hash of its index, a pure function of (seed, tensor, step,
role, index): independent of device, threads and restarts. The optimizers' updates stand in :mod:`.reference_updates`.
"""

from __future__ import annotations

import hashlib
import struct
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
    if format.dtype != UE5M3.dtype:
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


def quantize_both(
    x: Tensor, format: Format, block: Block, margin: int = 0, power_of_two: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`quantize_current` of a matrix and of its transpose: (payload, scale_inv, payload, scale_inv).

    What a product reads that contracts over the columns, and what one reads that contracts over the rows: both have
    their blocks along the last dim. A twin reads ``x`` once.
    """
    payload, scale_inv, _ = quantize_current(x, format, block, margin, power_of_two)
    crossed, crossed_scale_inv, _ = quantize_current(x.t().contiguous(), format, block, margin, power_of_two)
    return payload, scale_inv, crossed, crossed_scale_inv


def dequantize(payload: Tensor, scale_inv: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """``payload * scale_inv`` in FP32, rounded once to ``dtype``; shape of ``payload``."""
    matrix = decode(payload.reshape(matrix_shape(payload.shape)))
    return (matrix * expand_scales(scale_inv, payload.shape, block)).to(dtype).view(payload.shape)


# --- stochastic rounding --------------------------------------------------------------------------------------------

_MASK = 0xFFFFFFFF
WEYL = 0x9E3779B9
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


def noise_keys(noise: Noise) -> tuple[int, int]:
    """The two 32-bit keys of a tensor's stream: BLAKE2b of (seed, tensor, step, role), without the role's bit 1.

    Hashed once a tensor and step on the host, so that elements get by with a cheap mix. Roles that differ in bit 1
    alone (a master weight and its second moment) share the keys: one word an element serves both, a half for each.
    """
    words = (noise.seed, noise.tensor, noise.step, noise.role & ~2)
    digest = hashlib.blake2b(struct.pack("<4Q", *(word & (1 << 64) - 1 for word in words)), digest_size=8).digest()
    first, second = struct.unpack("<2I", digest)
    return first, second


def random_bits(numel: int, noise: Noise, device: torch.device) -> Tensor:
    """16 random bits an element, int64, shape (numel,): the upper half of the element's word, the lower one of a role
    with bit 1.

    A word is a 32-bit permutation of the element's index (the stream of a tensor repeats after 2^32 elements): a Weyl
    sequence that starts at one key, then two products with xor-shifts around them (the constants of C. Wellons' search
    for low bias, 2018, https://nullprogram.com/blog/2018/07/31/), the other key between the two. So the streams of two
    keys are not shifts of each other.
    """
    key0, key1 = noise_keys(noise)
    word = torch.arange(numel, dtype=torch.int64, device=device) & _MASK
    word = (word * WEYL + key0) & _MASK
    word = ((word ^ (word >> 16)) * MULTIPLIERS[0]) & _MASK
    word = ((word ^ (word >> 15) ^ key1) * MULTIPLIERS[1]) & _MASK
    word = word ^ (word >> 16)
    return word & 0xFFFF if noise.role & 2 else word >> 16


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


# --- writing in place -----------------------------------------------------------------------------------------------


def store_(target: Operand, value: Tensor) -> None:
    """Overwrite a stored tensor with FP32 ``value``, scales from the value itself, rounding as ``target.noise``
    says."""
    format = format_of(target.payload.dtype)
    scale_inv = scale_inv_from_amax(amax(value, target.block), format)
    target.payload.copy_(quantize(value, scale_inv, format, target.block, target.noise))
    target.scale_inv.copy_(scale_inv)
