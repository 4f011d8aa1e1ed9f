"""Triton product of FP8 matrices with scales per block, a row or the tensor, promoted to FP32.

(M, K) times (N, K) transposed. Each step multiplies BLOCK_K columns, one block of either operand at most, on FP8 units
into an accumulator of its own, scales it and adds it to the FP32 sum: DeepSeek-AI, "DeepSeek-V3 Technical Report",
2024, https://arxiv.org/abs/2412.19437, section 3.3.2, "increasing accumulation precision". Reference:
:func:`.reference.scaled_matmul`, equal to it but for the order of the sum.

Operands may have any strides and no padding. Without FP8 units (``units=False``) a block is decoded to FP16, exactly,
and multiplied there; for comparison, since torch's product of matrices that were decoded before is the faster one.
"""

# The compiler reads these sources: annotations stay objects, and a kernel argument has none.
# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from msamp_like.formats import block_extent, format_of
from msamp_like.kernels.reference import Operand
from msamp_like.kernels.triton_codec import convert, decode
from msamp_like.kernels.triton_tiles import launch, raw

LARGEST_STEP = 128
"""Columns summed in the tensor core's own precision: the promotion interval of the paper."""


@triton.jit
def _values(codes, FORMAT: tl.constexpr, UNITS: tl.constexpr):
    """FP8 numbers where the units multiply them, else FP16, which holds every one of them."""
    if UNITS:
        if FORMAT == "e5m2":
            values = codes.to(tl.float8e5, bitcast=True)
        else:
            values = codes.to(tl.float8e4nv, bitcast=True)
    else:
        values = decode(codes, FORMAT).to(tl.float16)
    return values


@triton.jit
def _scales(scale_inv, lines, start, num_lines, line_stride, column_stride, block_lines, block_columns):
    """The scales of some lines of an operand, for the columns from ``start``; 1 where there is no line."""
    places = (lines // block_lines) * line_stride + (start // block_columns) * column_stride
    return tl.load(scale_inv + places, mask=lines < num_lines, other=1.0)


@triton.jit
def _product_kernel(
    a, a_scale_inv, b, b_scale_inv, product, m, n, k,
    a_row, a_column, a_scale_row, a_scale_column, a_block_rows, a_block_columns,
    b_row, b_column, b_scale_row, b_scale_column, b_block_rows, b_block_columns,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, FORMAT: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(n, BLOCK_N)
    rows = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    left_lines = rows.to(tl.int64)[:, None] * a_row
    right_lines = columns.to(tl.int64)[None, :] * b_row
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left_inside = (rows < m)[:, None] & (inner < k)[None, :]
        right_inside = (inner < k)[:, None] & (columns < n)[None, :]
        left = tl.load(a + left_lines + inner.to(tl.int64)[None, :] * a_column, mask=left_inside, other=0)
        right = tl.load(b + right_lines + inner.to(tl.int64)[:, None] * b_column, mask=right_inside, other=0)
        partial = tl.dot(_values(left, A_FORMAT, UNITS), _values(right, B_FORMAT, UNITS), out_dtype=tl.float32)
        a_scales = _scales(a_scale_inv, rows, start, m, a_scale_row, a_scale_column, a_block_rows, a_block_columns)
        b_scales = _scales(b_scale_inv, columns, start, n, b_scale_row, b_scale_column, b_block_rows, b_block_columns)
        total += partial * a_scales[:, None] * b_scales[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    offsets = rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(product + offsets, convert(total, FORMAT), mask=inside)


def inner_block(left: Operand, right: Operand) -> int:
    """Columns of one step: one scale of either operand reaches over them; 0 where no step suits both."""
    columns = left.payload.shape[1]
    extents = [block_extent(operand.payload.shape, operand.block)[1] for operand in (left, right)]
    steps = (LARGEST_STEP, 64, 32)
    return next((s for s in steps if all(e >= columns or e % s == 0 for e in extents)), 0)


def multiply(left: Operand, right: Operand, dtype: torch.dtype, units: bool = True) -> Tensor:
    """(M, N), from (M, K) and (N, K); :func:`inner_block` of the two is not 0."""
    (m, k), n = left.payload.shape, right.payload.shape[0]
    product = torch.empty((m, n), dtype=dtype, device=left.payload.device)
    block_m, block_n = (min(128, max(16, triton.next_power_of_2(size))) for size in (m, n))
    launch(
        _product_kernel, product, triton.cdiv(m, block_m) * triton.cdiv(n, block_n),
        raw(left.payload), left.scale_inv, raw(right.payload), right.scale_inv, raw(product), m, n, k,
        *_geometry(left), *_geometry(right),
        A_FORMAT=format_of(left.payload.dtype).name, B_FORMAT=format_of(right.payload.dtype).name,
        FORMAT=format_of(dtype).name, UNITS=units, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=inner_block(left, right), num_warps=8, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    return product


def _geometry(operand: Operand) -> tuple[int, ...]:
    """Strides of the codes, strides of the scales (0 along a dim of one scale), rows and columns of a block."""
    scales = [stride if size > 1 else 0 for size, stride in zip(operand.scale_inv.shape, operand.scale_inv.stride())]
    return (*operand.payload.stride(), *scales, *block_extent(operand.payload.shape, operand.block))
