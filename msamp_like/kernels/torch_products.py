"""torch's FP8 products of operands with more than one scale: how it wants them laid out, and padded.

All take (M, K) and (N, K) with K contracted, and return (M, N) after FP32 accumulation. The contracts are those of
PyTorch 2.11 to 2.13 (``aten/src/ATen/native/cuda/ScaledBlas.cpp``); the tests hold the layouts against the shape checks
that PyTorch runs without a device. No product here has run on a device yet.

Fast accumulation is off: it would keep partial sums in the tensor core's own precision, and no layout tells the
forward product, which could bear it, from those of gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from msamp_like.formats import block_extent
from msamp_like.kernels.reference import Operand

ALIGNMENT = 16
"""The FP8 units' rows are loaded 16 bytes at a time."""

PRODUCT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_TILE = 128
_MX = 32


def contracted_last(operand: Operand, crossed: bool) -> Operand:
    """A view of the operand with the contracted dim last; ``crossed`` where it is the first now."""
    if not crossed:
        return operand
    return Operand(operand.payload.t(), operand.scale_inv.t(), (operand.block[1], operand.block[0]))


def granularity(operand: Operand) -> str:
    """ "tensor", "row", "1x128", "128x128", "1x32", or the block in words: how far one scale reaches."""
    if operand.scale_inv.numel() == 1:
        return "tensor"
    if operand.scale_inv.shape == (operand.payload.shape[0], 1):
        return "row"
    rows, columns = block_extent(operand.payload.shape, operand.block)
    return f"{rows}x{columns}"


def aligned(matrix: Tensor, *, pad_rows: bool, columns: int = ALIGNMENT, rows: int = ALIGNMENT) -> Tensor:
    """``matrix`` row-major, columns (and rows) padded with zeros to multiples; no copy where it already is."""
    codes = matrix.view(torch.uint8)  # padding is not defined for the FP8 dtypes; code 0 is the number 0
    missing = (-codes.shape[1] % columns, -codes.shape[0] % rows if pad_rows else 0)
    if any(missing):
        codes = F.pad(codes, (0, missing[0], 0, missing[1]))
    return codes.contiguous().view(matrix.dtype)


def multiply_rows(left: Operand, right: Operand, dtype: torch.dtype) -> Tensor:
    """One scale a row of either, or a tensor; ``dtype`` is BF16."""
    a, b = aligned(left.payload, pad_rows=False), aligned(right.payload, pad_rows=True)
    scale_a, scale_b = (
        _padded(operand.scale_inv.expand(operand.payload.shape[0], 1), rows=matrix.shape[0])
        for operand, matrix in ((left, a), (right, b))
    )
    product = torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=dtype, use_fast_accum=False)
    return _unpadded(product, left, right)


def multiply_tiles(left: Operand, right: Operand, dtype: torch.dtype) -> Tensor:
    """1x128 with 1x128 or 128x128. A run of scales lies with the row as its fastest dim, a square's with K."""
    a = aligned(left.payload, pad_rows=False, columns=_TILE)
    b = aligned(right.payload, pad_rows=True, columns=_TILE, rows=_TILE)
    square = granularity(right) == "128x128"
    scale_b = _padded(right.scale_inv, rows=b.shape[0] // _TILE if square else b.shape[0])
    if square:  # (K / 128 rounded up to 4, N / 128), K fastest
        scale_b = F.pad(scale_b, (0, -scale_b.shape[1] % 4), value=1.0).contiguous().t()
    else:
        scale_b = _row_fastest(scale_b)
    run = F.ScalingType.BlockWise1x128
    product = F.scaled_mm(
        a,
        b.t(),
        _row_fastest(left.scale_inv),
        run,
        scale_b,
        F.ScalingType.BlockWise128x128 if square else run,
        output_dtype=dtype,
    )
    return _unpadded(product, left, right)


def multiply_mx(left: Operand, right: Operand, dtype: torch.dtype) -> Tensor:
    """1x32 of either, scales in E8M0 in the order that Blackwell's units load them."""
    a = aligned(left.payload, pad_rows=True, columns=_MX, rows=_MX)
    b = aligned(right.payload, pad_rows=True, columns=_MX, rows=_MX)
    scale_a, scale_b = (
        swizzled(_padded(e8m0(operand.scale_inv), rows=matrix.shape[0])) for operand, matrix in ((left, a), (right, b))
    )
    kind, order = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4
    product = F.scaled_mm(a, b.t(), scale_a, kind, scale_b, kind, order, order, output_dtype=dtype)
    return _unpadded(product, left, right)


MULTIPLY: dict[str, Callable[[Operand, Operand, torch.dtype], Tensor]] = {
    "rows": multiply_rows,
    "tiles": multiply_tiles,
    "mx": multiply_mx,
}


def e8m0(scale_inv: Tensor) -> Tensor:
    """Powers of two as their biased exponents, uint8, exact; the flag +inf becomes 255, which is NaN there."""
    return (scale_inv.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def swizzled(exponents: Tensor) -> Tensor:
    """(rows, K / 32) exponents as the flat E8M0 tensor that the units load: tiles of 128 rows and 4 columns, in each
    the 32 rows r, r + 32, r + 64 and r + 96 side by side (cuBLAS, "1D block scaling factors layout")."""
    padded = F.pad(exponents, (0, -exponents.shape[1] % 4, 0, -exponents.shape[0] % _TILE))
    rows, columns = padded.shape
    tiles = padded.view(rows // _TILE, 4, _MX, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(torch.float8_e8m0fnu)


def _padded(scales: Tensor, rows: int) -> Tensor:
    """Scales of as many rows; what is added scales zeros."""
    return F.pad(scales, (0, 0, 0, rows - scales.shape[0]), value=1).contiguous()


def _row_fastest(scales: Tensor) -> Tensor:
    return scales.t().contiguous().t()


def _unpadded(product: Tensor, left: Operand, right: Operand) -> Tensor:
    rows, columns = left.payload.shape[0], right.payload.shape[0]
    return product if product.shape == (rows, columns) else product[:rows, :columns].contiguous()
