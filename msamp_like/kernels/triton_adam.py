"""Triton twin of ``reference_updates.adam_steps_``: one pass over the bytes of a parameter, its gradient and moments.

Read, decode, update in FP32 in the reference's order of operations, find each block's new scale, encode, write: with
an FP16 parameter, E4M3 gradient, E4M3 and FP16 moments that is 11 bytes an element, and 24 more a block for the scales.
A block must fit a program for that, so this twin takes blocks of one row, (1, b) with b at most 4096, the same for all
that have blocks, and tensors of one scale where the format needs none (FP32, BF16) or which are only read (the
gradient). Anything else is the reference's, and said once in the log.

A tensor of one scale in FP32 or BF16 still carries a flag for all of it (scale_inv = +inf, payload 0): the pass counts
blocks that are not finite, a second launch writes scale and zeros, and reads one word where there is nothing to do.

Left out: many tensors in one launch, a copy in the same pass, a master in two parts. The speed is not measured yet:
``benchmarks/gpu.py`` does that.
"""

import functools
import logging
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from msamp_like.formats import block_extent, format_of, matrix_shape
from msamp_like.kernels import reference_updates
from msamp_like.kernels.reference import Operand
from msamp_like.kernels.reference_updates import AdamScalars, Row, corrected
from msamp_like.kernels.triton_casts import dequantize, store_
from msamp_like.kernels.triton_codec import INFINITY, decode, encode, magnitude_bits, scale_down, scale_inv_of
from msamp_like.kernels.triton_tiles import (
    TILE_ELEMENTS,
    Tiling,
    block_offsets,
    keys,
    launch,
    num_blocks,
    random_bits,
    raw,
)

logger = logging.getLogger(__name__)

MAX_BLOCK = 4096
_FLAT_BLOCK = 1024
"""Elements cut off together where no operand has blocks."""

_ADAM_ELEMENTS = TILE_ELEMENTS // 2
"""Four FP32 values an element are live at once, so a program holds fewer elements than a cast's."""


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _read(payload, scale_inv, blocks, exists, offsets, inside, FORMAT: tl.constexpr, BLOCKED: tl.constexpr):
    """FP32 values of a tile of a stored tensor."""
    scales = tl.load(scale_inv + (blocks if BLOCKED else blocks * 0), mask=exists, other=1.0)
    return decode(tl.load(payload + offsets, mask=inside, other=0), FORMAT) * scales[:, None]


@triton.jit
def _write(
    value, payload, scale_inv, flag, random, blocks, exists, offsets, inside,
    FORMAT: tl.constexpr, BLOCKED: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    """Store FP32 ``value`` with scales from itself; without blocks, only count in ``flag`` what is not finite."""
    largest = tl.max(tl.where(inside, magnitude_bits(value), 0), axis=1)
    scales = scale_inv_of(largest, FORMAT, 0, True)
    if BLOCKED:
        tl.store(scale_inv + blocks, scales, mask=exists)
    else:
        # Every writer writes the same 1, so the order does not matter.
        tl.store(flag, 1, mask=tl.max(largest, axis=0) >= INFINITY)
    tl.store(payload + offsets, encode(scale_down(value, scales), random, FORMAT, NOISY), mask=inside)


@triton.jit(do_not_specialize=["param_key0", "param_key1", "first_key0", "first_key1", "second_key0", "second_key1"])
def _adam_kernel(
    param, param_scale_inv, param_key0, param_key1,
    first, first_scale_inv, first_key0, first_key1,
    second, second_scale_inv, second_key0, second_key1,
    grad, grad_scale_inv, flags, rows, columns, block_rows, block_columns,
    keep, weight_decay, beta1, rest1, beta2, rest2, rate, eps,
    PARAM: tl.constexpr, PARAM_BLOCKED: tl.constexpr, PARAM_NOISY: tl.constexpr, PARAM_LOWER_HALF: tl.constexpr,
    FIRST: tl.constexpr, FIRST_BLOCKED: tl.constexpr, FIRST_NOISY: tl.constexpr, FIRST_LOWER_HALF: tl.constexpr,
    SECOND: tl.constexpr, SECOND_BLOCKED: tl.constexpr, SECOND_NOISY: tl.constexpr, SECOND_LOWER_HALF: tl.constexpr,
    GRAD: tl.constexpr, GRAD_BLOCKED: tl.constexpr, DECAY: tl.constexpr,
    PADDED: tl.constexpr, ELEMENTS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    exists = blocks < num_blocks(rows, columns, block_rows, block_columns)
    elements = tl.arange(0, ELEMENTS)
    offsets, inside = block_offsets(blocks, elements, rows, columns, block_rows, block_columns, PADDED)
    w = _read(param, param_scale_inv, blocks, exists, offsets, inside, PARAM, PARAM_BLOCKED)
    g = _read(grad, grad_scale_inv, blocks, exists, offsets, inside, GRAD, GRAD_BLOCKED)
    m = _read(first, first_scale_inv, blocks, exists, offsets, inside, FIRST, FIRST_BLOCKED)
    v = _read(second, second_scale_inv, blocks, exists, offsets, inside, SECOND, SECOND_BLOCKED)

    # reference_updates.adam_update, each line in its order; contraction is off at launch.
    if DECAY == "decoupled":
        w = w * keep
    elif DECAY == "added":
        g = g + w * weight_decay
    m = m * beta1 + g * rest1
    v = v * beta2 + (g * g) * rest2
    w = w - tl.div_rn(m, tl.sqrt_rn(v) + eps) * rate

    random = 0
    if PARAM_NOISY:
        random = random_bits(offsets, param_key0, param_key1, PARAM_LOWER_HALF)
    _write(w, param, param_scale_inv, flags, random, blocks, exists, offsets, inside,
           PARAM, PARAM_BLOCKED, PARAM_NOISY)  # fmt: skip
    if FIRST_NOISY:
        random = random_bits(offsets, first_key0, first_key1, FIRST_LOWER_HALF)
    _write(m, first, first_scale_inv, flags + 1, random, blocks, exists, offsets, inside,
           FIRST, FIRST_BLOCKED, FIRST_NOISY)  # fmt: skip
    if SECOND_NOISY:
        random = random_bits(offsets, second_key0, second_key1, SECOND_LOWER_HALF)
    _write(v, second, second_scale_inv, flags + 2, random, blocks, exists, offsets, inside,
           SECOND, SECOND_BLOCKED, SECOND_NOISY)  # fmt: skip


@triton.jit
def _settle(payload, scale_inv, flag, numel, ELEMENTS: tl.constexpr):
    """Scale of a tensor of one scale: 1, or +inf over a payload of zeros if the pass met a value that is not finite."""
    flagged = tl.load(flag) != 0
    tl.store(scale_inv, tl.where(flagged, float("inf"), 1.0), mask=tl.program_id(0) == 0)
    if flagged:
        offsets = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        tl.store(payload + offsets, 0, mask=offsets < numel)


@triton.jit
def _settle_kernel(
    param, param_scale_inv, first, first_scale_inv, second, second_scale_inv, flags, numel,
    PARAM_BLOCKED: tl.constexpr, FIRST_BLOCKED: tl.constexpr, SECOND_BLOCKED: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    if not PARAM_BLOCKED:
        _settle(param, param_scale_inv, flags, numel, ELEMENTS)
    if not FIRST_BLOCKED:
        _settle(first, first_scale_inv, flags + 1, numel, ELEMENTS)
    if not SECOND_BLOCKED:
        _settle(second, second_scale_inv, flags + 2, numel, ELEMENTS)


# --- launches ---------------------------------------------------------------------------------------------------------


def adam_steps_(rows: Sequence[Row], scalars: AdamScalars, bad: Tensor | None = None) -> None:
    """``reference_updates.adam_steps_``; rows that one pass cannot take go to the reference itself."""
    if bad is not None and bool(bad):
        return
    for row in rows:
        if row.param.payload.numel():
            _adam_step_(row, scalars)


def _adam_step_(row: Row, scalars: AdamScalars) -> None:
    param, grad, (first, second) = row.param, row.grad, row.states
    tiling, reason = _one_pass(param, grad, first, second)
    if tiling is None or row.residual is not None:
        _name_fallback(reason or "a master of two parts")
        reference_updates.adam_steps_([row], scalars)
        return
    stored = {"PARAM": param, "FIRST": first, "SECOND": second}
    blocked = {f"{name}_BLOCKED": _is_blocked(operand) for name, operand in stored.items()}
    constants = {name: format_of(operand.payload.dtype).name for name, operand in stored.items()}
    noisy = {f"{name}_NOISY": operand.noise is not None and constants[name] != "fp32"
             for name, operand in stored.items()}  # fmt: skip
    halves = {f"{name}_LOWER_HALF": operand.noise is not None and bool(operand.noise.role & 2)
              for name, operand in stored.items()}  # fmt: skip
    pointers = [(raw(operand.payload), operand.scale_inv) for operand in stored.values()]
    arguments: list[object] = []
    for pair, operand in zip(pointers, stored.values(), strict=True):
        arguments += [*pair, *keys(operand.noise)]
    flags = torch.zeros(3, dtype=torch.int32, device=param.payload.device)
    launch(
        _adam_kernel, param.payload, tiling.num_programs, *arguments, raw(grad.payload), grad.scale_inv, flags,
        *tiling.matrix, *_coefficients(scalars, row.step), **constants, **blocked, **noisy, **halves,
        GRAD=format_of(grad.payload.dtype).name, GRAD_BLOCKED=grad.scale_inv.numel() > 1,
        DECAY="none" if scalars.weight_decay == 0 else "decoupled" if scalars.decoupled else "added",
        **tiling.options(),
    )  # fmt: skip
    if not all(blocked.values()):
        numel = param.payload.numel()
        launch(
            _settle_kernel, param.payload, triton.cdiv(numel, TILE_ELEMENTS),
            *(pointer for pair in pointers for pointer in pair), flags, numel, **blocked, ELEMENTS=TILE_ELEMENTS,
        )  # fmt: skip
    if row.copy is not None:
        store_(row.copy, dequantize(param.payload, param.scale_inv, param.block, torch.float32))


def _coefficients(s: AdamScalars, step: int) -> tuple[float, ...]:
    """Scalars as the kernel takes them, computed in double as the reference does; each is rounded to FP32 once."""
    rate, eps = corrected(s, step)
    return 1 - s.lr * s.weight_decay, s.weight_decay, s.beta1, 1 - s.beta1, s.beta2, 1 - s.beta2, rate, eps


def _is_blocked(operand: Operand) -> bool:
    """Whether the pass writes the operand's scales: it has several, or a format that needs one."""
    return operand.scale_inv.numel() > 1 or format_of(operand.payload.dtype).scaled


def _one_pass(param: Operand, grad: Operand, first: Operand, second: Operand) -> tuple[Tiling | None, str]:
    """The tiling of one pass over all four, or None and the reason why there is none."""
    operands = (param, grad, first, second)
    if not all(t.payload.is_contiguous() and t.scale_inv.is_contiguous() for t in operands):
        return None, "a payload or its scales are not contiguous"
    rows, columns = matrix_shape(param.payload.shape)
    extents = {_row_block(t) for t in (param, first, second) if _is_blocked(t)}
    extents |= {_row_block(grad)} if grad.scale_inv.numel() > 1 else set()
    if None in extents or len(extents) > 1:
        blocks = ", ".join(str(t.block) for t in operands)
        return None, f"blocks must be one row of at most {MAX_BLOCK}, the same for all, got {blocks}"
    block_columns = extents.pop() if extents else None
    if block_columns is None:
        rows, columns, block_columns = 1, rows * columns, _FLAT_BLOCK
    elif columns % block_columns == 0:
        rows, columns = 1, rows * columns
    padded = triton.next_power_of_2(block_columns)
    return Tiling((rows, columns, 1, block_columns), padded, padded, max(1, _ADAM_ELEMENTS // padded), False), ""


def _row_block(operand: Operand) -> int | None:
    """Columns of a block of one row that fits a program, as far as the tensor reaches; None for any other block."""
    rows, columns = matrix_shape(operand.payload.shape)
    block_rows, block_columns = block_extent(operand.payload.shape, operand.block)
    block_columns = min(block_columns, columns)
    return block_columns if min(block_rows, rows) == 1 and block_columns <= MAX_BLOCK else None


@functools.cache
def _name_fallback(reason: str) -> None:
    logger.warning("fused Adam step not used: %s; the step runs in plain torch", reason)
