"""Triton twin of the softmax of :mod:`msamp_like.kernels.reference_fused`, for CUDA and ROCm.

A program reads its row three times, from L2 after the first: for the maximum, the sum, and what is kept. Casts and
groups are those of :mod:`.triton_fused`. The speed is not measured yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msamp_like.formats import format_of
from msamp_like.kernels import reference_fused
from msamp_like.kernels.reference import Operand
from msamp_like.kernels.reference_fused import Grouped, Kept, Target
from msamp_like.kernels.triton_codec import convert, decode
from msamp_like.kernels.triton_fused import is_fast, keep, name_of, new_kept, read, row_sum, tile_options
from msamp_like.kernels.triton_tiles import block_offsets, launch, num_blocks, raw

# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _softmax_kernel(
    logits, sums, kept, kept_scale_inv, columns,
    X_FORMAT: tl.constexpr, KEPT_FORMAT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    in_row = tl.cdiv(columns, BLOCK)
    largest = tl.full((GROUPS, BLOCK), float("-inf"), tl.float32)
    for first in range(0, in_row, GROUPS):
        places = (first + tl.arange(0, GROUPS))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        value = decode(tl.load(logits + row * columns + places, mask=places < columns, other=0), X_FORMAT)
        largest = tl.maximum(largest, tl.where(places < columns, value, float("-inf")))
    top = tl.max(tl.max(largest, axis=1), axis=0)
    total = tl.zeros((GROUPS, BLOCK), tl.float32)
    for first in range(0, in_row, GROUPS):
        places = (first + tl.arange(0, GROUPS))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        value = decode(tl.load(logits + row * columns + places, mask=places < columns, other=0), X_FORMAT)
        total += tl.where(places < columns, tl.exp(value - top), 0.0)
    log_sum = top + tl.log(row_sum(total))
    tl.store(sums + row, log_sum)
    for first in range(0, in_row, GROUPS):
        groups = first + tl.arange(0, GROUPS)
        places = groups[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        offsets = row * columns + places
        inside = places < columns
        value = decode(tl.load(logits + offsets, mask=inside, other=0), X_FORMAT)
        value = tl.where(inside, tl.exp(value - log_sum), 0.0)
        keep(value, kept, kept_scale_inv, offsets, inside, row * in_row + groups, groups < in_row, KEPT_FORMAT)


@triton.jit
def _softmax_backward_kernel(
    kept, kept_scale_inv, targets, grad, result, rows, columns,
    KEPT_FORMAT: tl.constexpr, OUT_FORMAT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    exist = groups < num_blocks(rows, columns, 1, BLOCK)
    offsets, inside = block_offsets(groups, tl.arange(0, BLOCK), rows, columns, 1, BLOCK, BLOCK)
    row = groups // tl.cdiv(columns, BLOCK)
    target = tl.load(targets + row, mask=exist, other=-1)
    given = tl.load(grad + row, mask=exist, other=0.0)
    value = read(kept, kept_scale_inv, offsets, inside, groups, exist, KEPT_FORMAT)
    column = offsets - row.to(tl.int64)[:, None] * columns
    value = tl.where(column == target[:, None], value - 1.0, value) * given[:, None]
    tl.store(result + offsets, convert(value, OUT_FORMAT), mask=inside)


# --- launches ---------------------------------------------------------------------------------------------------------


def softmax_quantize(logits: Tensor, kept: Grouped) -> tuple[Tensor, Kept]:
    """See :func:`.reference_fused.softmax_quantize`."""
    if not is_fast((logits,), kept.block):
        return reference_fused.softmax_quantize(logits, kept)
    rows, columns = logits.shape
    held, sums = new_kept(logits, kept), torch.empty(rows, device=logits.device)
    launch(
        _softmax_kernel, logits, rows, raw(logits), sums, raw(held.payload), held.scale_inv, columns,
        X_FORMAT=name_of(logits), KEPT_FORMAT=kept.format.name, **tile_options(kept.block),
    )  # fmt: skip
    return sums, held


def softmax_backward(kept: Operand, targets: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`.reference_fused.softmax_backward`."""
    if not is_fast((grad,), kept.block, Target(dtype)):
        return reference_fused.softmax_backward(kept, targets, grad, dtype)
    made = torch.empty(kept.payload.shape, dtype=dtype, device=grad.device)
    options = tile_options(kept.block)
    launch(
        _softmax_backward_kernel, grad, triton.cdiv(kept.scale_inv.numel(), options["GROUPS"]), raw(kept.payload),
        kept.scale_inv, targets, grad.float(), raw(made), *kept.payload.shape,
        KEPT_FORMAT=name_of(kept.payload), OUT_FORMAT=format_of(dtype).name, **options,
    )  # fmt: skip
    return made
