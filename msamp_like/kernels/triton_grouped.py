"""Triton twin of :mod:`.grouped` for CUDA and ROCm: one launch, and nobody waits for ``offsets``.

The grid has as many tiles as the rows could need, whatever the split; a program finds its expert by adding up the
tiles of those before it, and one without rows returns. Payloads are decoded to BF16, which holds every FP8 value, with
FP32 accumulation: scales that one product shares are applied to the sum, the others to the operands first, where a
power of two is exact too and any other scale rounds once more (2^-9). With ``units`` the FP8 bytes go to the tensor
cores as they are; that needs scales that the product shares.

Not used: ``torch.nn.functional.scaled_grouped_mm``, which takes E4M3 alone (a gradient is E5M2), a scale a row, dims in
multiples of 16, and for "tn" groups whose sizes divide by 16.

Sums of FP8 units are promoted to FP32 tile by tile, outside of the units: a gradient sums many small terms. The speed
is not measured yet.
"""

# The compiler reads these sources: annotations stay objects, and a kernel argument has none.
# mypy: allow-untyped-defs, allow-incomplete-defs
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from msamp_like.formats import BF16, FP8_DTYPES, block_extent, format_of, grid_shape
from msamp_like.kernels.fp8_units import has_fp8_units
from msamp_like.kernels.grouped import empty_product
from msamp_like.kernels.reference import Operand
from msamp_like.kernels.triton_codec import decode
from msamp_like.kernels.triton_tiles import raw

TILE_ROWS, TILE_COLUMNS, TILE_INNER = 64, 64, 64


# --- on the device ----------------------------------------------------------------------------------------------------


@triton.jit
def _load(payload, scale_inv, row, column, inside, columns, block_rows, block_columns, grid_columns,
          FORMAT: tl.constexpr, SHARED: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Elements at (row, column) of a matrix, ready for a product: FP8 as stored, or BF16 with their scales unless they
    are SHARED by the product."""
    code = tl.load(payload + row.to(tl.int64) * columns + column, mask=inside, other=0)
    if UNITS:
        if FORMAT == "e5m2":
            value = code.to(tl.float8e5, bitcast=True)
        else:
            value = code.to(tl.float8e4nv, bitcast=True)
    else:
        value = decode(code, FORMAT)
        if not SHARED:
            block = (row // block_rows) * grid_columns + column // block_columns
            value = value * tl.load(scale_inv + block, mask=inside, other=0.0)
            value = tl.where(inside, value, 0.0)
        if not WIDE:  # Triton's interpreter has no BF16 product
            value = value.to(tl.bfloat16)
    return value


@triton.jit
def _rows_kernel(
    a, a_scale_inv, b, b_scale_inv, offsets, out, experts, rows, columns, inner, b_rows, b_columns,
    a_block_rows, a_block_columns, a_grid_columns, b_block_rows, b_block_columns, b_grid_columns, scale_step,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr, SHARED_A: tl.constexpr,
    SHARED_B: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """ "nt" (TRANSPOSED) and "nn": a tile of rows of one expert times its matrix."""
    tile = tl.program_id(0)
    expert, first, end, seen, start = -1, 0, 0, 0, 0
    for e in range(experts):
        stop = tl.load(offsets + e)
        tiles = tl.cdiv(stop - start, ROWS)
        here = (tile >= seen) & (tile < seen + tiles)
        expert = tl.where(here, e, expert)
        first = tl.where(here, start + (tile - seen) * ROWS, first)
        end = tl.where(here, stop, end)
        seen += tiles
        start = stop
    if expert >= 0:
        row = first + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for begin in range(0, inner, INNER):
            k = begin + tl.arange(0, INNER)
            left = _load(a, a_scale_inv, row[:, None], k[None, :], (row < end)[:, None] & (k < inner)[None, :], inner,
                         a_block_rows, a_block_columns, a_grid_columns, A_FORMAT, SHARED_A, UNITS, WIDE)  # fmt: skip
            inside = (k < inner)[:, None] & (column < columns)[None, :]
            base = expert * b_rows
            if TRANSPOSED:
                b_row, b_column = base + column[None, :] + k[:, None] * 0, k[:, None] + column[None, :] * 0
            else:
                b_row, b_column = base + k[:, None] + column[None, :] * 0, column[None, :] + k[:, None] * 0
            right = _load(b, b_scale_inv, b_row, b_column, inside, b_columns,
                          b_block_rows, b_block_columns, b_grid_columns, B_FORMAT, SHARED_B, UNITS, WIDE)  # fmt: skip
            total = total + tl.dot(left, right)
        if SHARED_A:
            total = total * tl.load(a_scale_inv)
        if SHARED_B:
            total = total * tl.load(b_scale_inv + expert * scale_step)
        where = row[:, None].to(tl.int64) * columns + column[None, :]
        tl.store(out + where, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & (column < columns)[None, :])


@triton.jit
def _experts_kernel(
    a, a_scale_inv, b, b_scale_inv, offsets, out, a_columns, b_columns,
    a_block_rows, a_block_columns, a_grid_columns, b_block_rows, b_block_columns, b_grid_columns,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, SHARED_A: tl.constexpr, SHARED_B: tl.constexpr,
    UNITS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """ "tn": a tile of one expert's matrix, summed over its rows."""
    expert = tl.program_id(2)
    start = tl.load(offsets + tl.maximum(expert - 1, 0))
    start = tl.where(expert == 0, 0, start)
    stop = tl.load(offsets + expert)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(start, stop, INNER):
        t = begin + tl.arange(0, INNER)
        left = _load(a, a_scale_inv, t[None, :] + row[:, None] * 0, row[:, None] + t[None, :] * 0,
                     (row < a_columns)[:, None] & (t < stop)[None, :], a_columns,
                     a_block_rows, a_block_columns, a_grid_columns, A_FORMAT, SHARED_A, UNITS, WIDE)  # fmt: skip
        right = _load(b, b_scale_inv, t[:, None] + column[None, :] * 0, column[None, :] + t[:, None] * 0,
                      (t < stop)[:, None] & (column < b_columns)[None, :], b_columns,
                      b_block_rows, b_block_columns, b_grid_columns, B_FORMAT, SHARED_B, UNITS, WIDE)  # fmt: skip
        total = total + tl.dot(left, right)
    if SHARED_A:
        total = total * tl.load(a_scale_inv)
    if SHARED_B:
        total = total * tl.load(b_scale_inv)
    total = tl.where(stop > start, total, 0.0)  # a flagged scale times no rows is no NaN
    where = (expert.to(tl.int64) * a_columns + row[:, None]) * b_columns + column[None, :]
    tl.store(
        out + where, total.to(out.dtype.element_ty), mask=(row < a_columns)[:, None] & (column < b_columns)[None, :]
    )


# --- on the host ------------------------------------------------------------------------------------------------------


def takes(a: Operand, b: Operand) -> bool:
    """Whether BF16 holds every payload value."""
    return {a.payload.dtype, b.payload.dtype} <= {*FP8_DTYPES, BF16.dtype}


def grouped_matmul(
    a: Operand, b: Operand, offsets: Tensor, layout: str, dtype: torch.dtype, *, units: bool | None = None
) -> Tensor:
    """See :mod:`.grouped`; the order of the sum is the tile's, so last bits may differ. ``units`` None asks the device
    for FP8 units."""
    made = empty_product(a.payload, b.payload, offsets, layout, dtype)
    if layout != "tn":
        made.zero_()  # rows that nobody owns; one write of the output, where a tile that clears them would be none
    if made.numel() == 0:
        return made
    shared = a.scale_inv.numel() == 1, _shared_by_expert(b, layout)
    fp8 = {a.payload.dtype, b.payload.dtype} <= set(FP8_DTYPES)
    if units is None:
        units = fp8 and all(shared) and a.payload.is_cuda and has_fp8_units(a.payload.device)
    options: dict[str, Any] = {
        "A_FORMAT": format_of(a.payload.dtype).name,
        "B_FORMAT": format_of(b.payload.dtype).name,
        "SHARED_A": shared[0],
        "SHARED_B": shared[1],
        "UNITS": units,
        "WIDE": not made.is_cuda,
        "ROWS": TILE_ROWS,
        "COLUMNS": TILE_COLUMNS,
        "INNER": TILE_INNER,
    }
    operands = (raw(a.payload), a.scale_inv, raw(b.payload), b.scale_inv, offsets.contiguous(), made)
    blocks = (*_blocks(a), *_blocks(b))
    if layout == "tn":
        experts, out_rows, out_columns = made.shape
        grid = triton.cdiv(out_rows, TILE_ROWS), triton.cdiv(out_columns, TILE_COLUMNS), experts
        launch_grid(_experts_kernel, made, grid, *operands, out_rows, out_columns, *blocks, **options)
        return made
    experts, b_rows, b_columns = b.payload.shape
    rows, columns = made.shape
    grid = triton.cdiv(rows, TILE_ROWS) + experts, triton.cdiv(columns, TILE_COLUMNS), 1
    sizes = (experts, rows, columns, a.payload.shape[1], b_rows, b_columns)
    step = 0 if b.scale_inv.numel() == 1 else 1
    launch_grid(_rows_kernel, made, grid, *operands, *sizes, *blocks, step, TRANSPOSED=layout == "nt", **options)
    return made


def launch_grid(kernel: Any, like: Tensor, grid: tuple[int, int, int], *arguments: Any, **options: Any) -> None:
    """``kernel`` over a grid of three dims on the device of ``like``."""
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **options)


def _shared_by_expert(b: Operand, layout: str) -> bool:
    """Whether one product, of one expert, has one scale of ``b``."""
    if b.scale_inv.numel() == 1:
        return True
    return layout != "tn" and b.scale_inv.shape == (b.payload.shape[0], 1)


def _blocks(stored: Operand) -> tuple[int, int, int]:
    rows, columns = block_extent(stored.payload.shape, stored.block)
    return rows, columns, grid_shape(stored.payload.shape, stored.block)[1]
