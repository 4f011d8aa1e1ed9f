"""Triton twin of ``reference.quantize_both``: one read of a matrix, two FP8 copies, one of them transposed.

A program holds a square of the matrix, finds the scales along its rows and along its columns, and writes both: for BF16
in and FP8 out 4 bytes an element where two casts and a transposed copy move 10. Blocks are runs of 16 to 128 elements;
a whole row does not fit a program, and is cast twice. Bit-equal to the reference. Not measured yet.
"""

# The compiler reads these sources: annotations stay objects, and a kernel argument has none.
# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from msamp_like.formats import Block, Format, format_of, grid_shape
from msamp_like.kernels.triton_casts import _readable, quantize_current
from msamp_like.kernels.triton_codec import decode, encode, magnitude_bits, scale_inv_of
from msamp_like.kernels.triton_tiles import launch, raw

SIZES = (16, 32, 64, 128)
"""Lengths of a block that a program takes."""

_SQUARE = 128


@triton.jit
def _store_runs(
    value, payload, scale_inv, first_row, first_column, rows, columns,
    FORMAT: tl.constexpr, MARGIN: tl.constexpr, POWER_OF_TWO: tl.constexpr, RUN: tl.constexpr, SQUARE: tl.constexpr,
):  # fmt: skip
    """Quantize a square in runs along its rows; the matrix it belongs to has ``columns`` columns."""
    RUNS: tl.constexpr = SQUARE // RUN
    runs = tl.reshape(value, (SQUARE * RUNS, RUN))
    scales = scale_inv_of(tl.max(magnitude_bits(runs), axis=1), FORMAT, MARGIN, POWER_OF_TWO)
    flagged = magnitude_bits(scales) >= 0x7F800000
    factors = tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), scales)
    scaled = tl.where(flagged[:, None], 0.0, runs * factors[:, None])
    codes = tl.reshape(encode(scaled, 0, FORMAT, False), (SQUARE, SQUARE))
    row = first_row + tl.arange(0, SQUARE)
    column = first_column + tl.arange(0, SQUARE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(payload + row.to(tl.int64)[:, None] * columns + column[None, :], codes, mask=inside)
    run = first_column // RUN + tl.arange(0, RUNS)
    grid_columns = tl.cdiv(columns, RUN)
    exists = (row < rows)[:, None] & (run < grid_columns)[None, :]
    places = row.to(tl.int64)[:, None] * grid_columns + run[None, :]
    tl.store(scale_inv + places, tl.reshape(scales, (SQUARE, RUNS)), mask=exists)


@triton.jit
def _both_kernel(
    x, payload, scale_inv, crossed, crossed_scale_inv, rows, columns,
    X_FORMAT: tl.constexpr, FORMAT: tl.constexpr, MARGIN: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    RUN: tl.constexpr, SQUARE: tl.constexpr,
):  # fmt: skip
    squares = tl.cdiv(columns, SQUARE)
    first_row = (tl.program_id(0) // squares) * SQUARE
    first_column = (tl.program_id(0) % squares) * SQUARE
    row = first_row + tl.arange(0, SQUARE)
    column = first_column + tl.arange(0, SQUARE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row.to(tl.int64)[:, None] * columns + column[None, :]
    value = decode(tl.load(x + offsets, mask=inside, other=0), X_FORMAT)
    _store_runs(
        value, payload, scale_inv, first_row, first_column, rows, columns, FORMAT, MARGIN, POWER_OF_TWO, RUN, SQUARE
    )
    _store_runs(
        tl.trans(value), crossed, crossed_scale_inv, first_column, first_row, columns, rows,
        FORMAT, MARGIN, POWER_OF_TWO, RUN, SQUARE,
    )  # fmt: skip


def quantize_both(
    x: Tensor, format: Format, block: Block, margin: int = 0, power_of_two: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`.reference.quantize_both`; one launch for runs of :data:`SIZES`."""
    if block[0] != 1 or block[1] not in SIZES or x.numel() == 0:
        payload, scale_inv, _ = quantize_current(x, format, block, margin, power_of_two)
        crossed, crossed_scale_inv, _ = quantize_current(x.t().contiguous(), format, block, margin, power_of_two)
        return payload, scale_inv, crossed, crossed_scale_inv
    x = _readable(x)
    rows, columns = x.shape
    payloads = [torch.empty(shape, dtype=format.dtype, device=x.device) for shape in ((rows, columns), (columns, rows))]
    scales = [torch.empty(grid_shape(p.shape, block), dtype=torch.float32, device=x.device) for p in payloads]
    launch(
        _both_kernel, x, triton.cdiv(rows, _SQUARE) * triton.cdiv(columns, _SQUARE),
        raw(x), raw(payloads[0]), scales[0], raw(payloads[1]), scales[1], rows, columns,
        X_FORMAT=format_of(x.dtype).name, FORMAT=format.name, MARGIN=margin, POWER_OF_TWO=power_of_two,
        RUN=block[1], SQUARE=_SQUARE, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return payloads[0], scales[0], payloads[1], scales[1]
