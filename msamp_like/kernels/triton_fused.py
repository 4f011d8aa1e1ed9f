"""Triton twin of the norms and activations of :mod:`msamp_like.kernels.reference_fused`, for CUDA and ROCm.

A norm has a row in registers and reads it once; activations work on whole groups. Bytes moved for BF16 in and out and
one byte kept: norm and activation 5 an element, a gated activation 8, norm backward 5. The casts are those of
:mod:`.triton_codec`, bit-equal to the reference on the same FP32 values; the values differ in last bits (the order of a
sum, and exp and erf as the device has them).

Groups are powers of two, and a quantized result has the groups of what is kept, or one delayed scale; for anything
else, and for norms of rows beyond 65,536, the reference runs. The speed is not measured yet.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from msamp_like.formats import FORMATS, WHOLE, format_of, grid_shape, matrix_shape
from msamp_like.kernels import reference_fused
from msamp_like.kernels.reference import Operand
from msamp_like.kernels.reference_fused import Grouped, Kept, Stored, Target
from msamp_like.kernels.triton_codec import convert, decode, encode, magnitude_bits, scale_down, scale_inv_of
from msamp_like.kernels.triton_tiles import block_offsets, launch, num_blocks, raw

_KNOWN_DTYPES = tuple(format.dtype for format in FORMATS.values())
_REAL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST_ROW = 1 << 16
_TILE_ELEMENTS = 2048
_PARTS = 256
"""A column's gradient is summed in this many parts of the rows, so that its bits do not depend on the device."""


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def row_sum(tile):
    return tl.sum(tl.sum(tile, axis=1), axis=0)


@triton.jit
def keep(value, payload, scale_inv, offsets, inside, groups, exist, FORMAT: tl.constexpr):
    """Writes a tile of (groups, elements), each group with a scale of its own."""
    scales = scale_inv_of(tl.max(magnitude_bits(value), axis=1), FORMAT, 0, True)
    tl.store(scale_inv + groups, scales, mask=exist)
    tl.store(payload + offsets, encode(scale_down(value, scales), 0, FORMAT, False), mask=inside)


@triton.jit
def _write(value, payload, scale_inv, amax, offsets, inside, groups, exist, FORMAT: tl.constexpr, HOW: tl.constexpr):
    """Writes a tile as its target asks: "plain", in "groups", or with the one "delayed" scale."""
    if HOW == "plain":
        tl.store(payload + offsets, convert(value, FORMAT), mask=inside)
    else:
        largest = tl.max(magnitude_bits(value), axis=1)
        if HOW == "groups":
            scales = scale_inv_of(largest, FORMAT, 0, True)
            tl.store(scale_inv + groups, scales, mask=exist)
            tl.store(amax + groups, largest, mask=exist)
        else:
            scales = tl.load(scale_inv + groups * 0)
            tl.atomic_max(amax, tl.max(largest, axis=0))
        tl.store(payload + offsets, encode(scale_down(value, scales), 0, FORMAT, False), mask=inside)


@triton.jit
def read(payload, scale_inv, offsets, inside, groups, exist, FORMAT: tl.constexpr):
    scales = tl.load(scale_inv + groups, mask=exist, other=1.0)
    return decode(tl.load(payload + offsets, mask=inside, other=0), FORMAT) * scales[:, None]


@triton.jit
def _row(columns, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Group numbers of a row, which exist, places of their elements, and which of these exist."""
    groups = tl.arange(0, GROUPS)
    places = groups[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return groups, groups < tl.cdiv(columns, BLOCK), places, places < columns


@triton.jit
def _norm_kernel(
    x, weight, bias, inverse, payload, scale_inv, amax, kept, kept_scale_inv, columns, eps,
    CENTERED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, X_FORMAT: tl.constexpr,
    OUT_FORMAT: tl.constexpr, HOW: tl.constexpr, KEPT_FORMAT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    groups, exist, places, inside = _row(columns, GROUPS, BLOCK)
    offsets = row * columns + places
    value = decode(tl.load(x + offsets, mask=inside, other=0), X_FORMAT)
    if CENTERED:
        value = tl.where(inside, value - row_sum(value) / columns, 0.0)
    deviation = tl.sqrt_rn(row_sum(value * value) / columns + eps)
    factor = tl.div_rn(deviation * 0.0 + 1.0, deviation)
    tl.store(inverse + row, factor)
    value = value * factor
    groups = row * tl.cdiv(columns, BLOCK) + groups
    keep(value, kept, kept_scale_inv, offsets, inside, groups, exist, KEPT_FORMAT)
    if WEIGHTED:
        value = value * tl.load(weight + places, mask=inside, other=0.0)
    if BIASED:
        value = value + tl.load(bias + places, mask=inside, other=0.0)
    _write(value, payload, scale_inv, amax, offsets, inside, groups, exist, OUT_FORMAT, HOW)


@triton.jit
def _norm_backward_kernel(
    grad, kept, kept_scale_inv, inverse, weight, grad_input, grad_weight, grad_bias, rows, columns, rows_each,
    CENTERED: tl.constexpr, WEIGHTED: tl.constexpr, GRAD_FORMAT: tl.constexpr, KEPT_FORMAT: tl.constexpr,
    OUT_FORMAT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    groups, exist, places, inside = _row(columns, GROUPS, BLOCK)
    sum_weight = tl.zeros((GROUPS, BLOCK), tl.float32)
    sum_bias = tl.zeros((GROUPS, BLOCK), tl.float32)
    for index in range(rows_each):
        row = (part * rows_each + index).to(tl.int64)
        present = inside & (row < rows)
        offsets = row * columns + places
        numbers = row * tl.cdiv(columns, BLOCK) + groups
        given = decode(tl.load(grad + offsets, mask=present, other=0), GRAD_FORMAT)
        normalized = read(kept, kept_scale_inv, offsets, present, numbers, exist & (row < rows), KEPT_FORMAT)
        factor = tl.load(inverse + row, mask=row < rows, other=0.0)
        sum_weight += given * normalized
        sum_bias += given
        if WEIGHTED:
            given = given * tl.load(weight + places, mask=inside, other=0.0)
        value = given - normalized * (row_sum(given * normalized) / columns)
        if CENTERED:
            value = value - row_sum(given) / columns
        tl.store(grad_input + offsets, convert(value * factor, OUT_FORMAT), mask=present)
    tl.store(grad_weight + part * columns + places, sum_weight, mask=inside)
    tl.store(grad_bias + part * columns + places, sum_bias, mask=inside)


@triton.jit
def _logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _share_below(x, KIND: tl.constexpr):
    """What an activation multiplies its input by."""
    if KIND == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return _logistic(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return _logistic(x)


@triton.jit
def _slope(x, below, KIND: tl.constexpr):
    if KIND == "gelu":
        return below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        return below * (1.0 + x * (1.0 - below) * (1.5957691216057308 * (1.0 + 0.134145 * x * x)))
    else:
        return below * (1.0 + x * (1.0 - below))


@triton.jit
def _activation_kernel(
    gate, value, payload, scale_inv, amax, kept_gate, gate_scale_inv, kept_value, value_scale_inv, rows, columns,
    KIND: tl.constexpr, GATED: tl.constexpr, GATE_FORMAT: tl.constexpr, VALUE_FORMAT: tl.constexpr,
    OUT_FORMAT: tl.constexpr, HOW: tl.constexpr, KEPT_FORMAT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    exist = groups < num_blocks(rows, columns, 1, BLOCK)
    offsets, inside = block_offsets(groups, tl.arange(0, BLOCK), rows, columns, 1, BLOCK, BLOCK)
    x = decode(tl.load(gate + offsets, mask=inside, other=0), GATE_FORMAT)
    keep(x, kept_gate, gate_scale_inv, offsets, inside, groups, exist, KEPT_FORMAT)
    result = x * _share_below(x, KIND)
    if GATED:
        factor = decode(tl.load(value + offsets, mask=inside, other=0), VALUE_FORMAT)
        keep(factor, kept_value, value_scale_inv, offsets, inside, groups, exist, KEPT_FORMAT)
        result = result * factor
    _write(result, payload, scale_inv, amax, offsets, inside, groups, exist, OUT_FORMAT, HOW)


@triton.jit
def _activation_backward_kernel(
    grad, kept_gate, gate_scale_inv, kept_value, value_scale_inv, grad_gate, scale_inv, amax, grad_value,
    grad_value_scale_inv, grad_value_amax, rows, columns,
    KIND: tl.constexpr, GATED: tl.constexpr, GRAD_FORMAT: tl.constexpr, KEPT_FORMAT: tl.constexpr,
    OUT_FORMAT: tl.constexpr, HOW: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    exist = groups < num_blocks(rows, columns, 1, BLOCK)
    offsets, inside = block_offsets(groups, tl.arange(0, BLOCK), rows, columns, 1, BLOCK, BLOCK)
    given = decode(tl.load(grad + offsets, mask=inside, other=0), GRAD_FORMAT)
    x = read(kept_gate, gate_scale_inv, offsets, inside, groups, exist, KEPT_FORMAT)
    below = _share_below(x, KIND)
    steep = _slope(x, below, KIND)
    if GATED:
        factor = read(kept_value, value_scale_inv, offsets, inside, groups, exist, KEPT_FORMAT)
        _write(
            given * (x * below), grad_value, grad_value_scale_inv, grad_value_amax, offsets, inside, groups, exist,
            OUT_FORMAT, HOW,
        )  # fmt: skip
        given = given * factor
    _write(given * steep, grad_gate, scale_inv, amax, offsets, inside, groups, exist, OUT_FORMAT, HOW)


# --- launches ---------------------------------------------------------------------------------------------------------


def is_fast(tensors: tuple[Tensor | None, ...], block: tuple[int, int], out: Target | None = None) -> bool:
    real = all(t is None or (t.dtype in _REAL_DTYPES and t.numel() > 0) for t in tensors)
    groups = block[0] == 1 and block[1] >= 16 and block[1] & (block[1] - 1) == 0
    return real and groups and (out is None or _how(out, block) != "")


def _how(out: Target, block: tuple[int, int]) -> str:
    """How a kernel writes to ``out``; empty if it cannot."""
    if out.block is None:
        return "plain" if out.dtype in _REAL_DTYPES else ""
    if out.scale_inv is not None:
        return "delayed" if out.block == WHOLE else ""
    return "groups" if out.block == block else ""


def _new(like: Tensor, out: Target) -> Stored:
    payload = torch.empty(like.shape, dtype=out.dtype, device=like.device)
    if out.block is None:
        none = torch.empty(0, device=like.device)
        return Stored(payload, none, none.clone())
    amax = torch.zeros(grid_shape(like.shape, out.block), device=like.device)
    return Stored(payload, torch.empty_like(amax) if out.scale_inv is None else out.scale_inv.clone(), amax)


def new_kept(like: Tensor, kept: Grouped) -> Kept:
    grid = grid_shape(like.shape, kept.block)
    payload = torch.empty(like.shape, dtype=kept.format.dtype, device=like.device)
    return Kept(payload, torch.empty(grid, device=like.device))


def _bits(stored: Stored) -> tuple[Tensor, Tensor, Tensor]:
    return raw(stored.payload), stored.scale_inv, raw(stored.amax)


def name_of(tensor: Tensor) -> str:
    return format_of(tensor.dtype).name


def _row_options(columns: int, block: tuple[int, int]) -> dict[str, Any]:
    """A whole row in registers."""
    groups = triton.next_power_of_2(triton.cdiv(columns, block[1]))
    warps = min(16, max(4, groups * block[1] // 1024))
    return {"GROUPS": groups, "BLOCK": block[1], "num_warps": warps, "enable_fp_fusion": False}


def tile_options(block: tuple[int, int]) -> dict[str, Any]:
    return {"GROUPS": _TILE_ELEMENTS // block[1], "BLOCK": block[1], "num_warps": 4, "enable_fp_fusion": False}


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.detach().float().contiguous()


def norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool, out: Target, kept: Grouped
) -> tuple[Stored, Kept, Tensor]:
    """See :func:`.reference_fused.norm_quantize`."""
    if not is_fast((x,), kept.block, out) or x.shape[-1] > _LONGEST_ROW:
        return reference_fused.norm_quantize(x, weight, bias, eps, centered, out, kept)
    rows, columns = matrix_shape(x.shape)
    made, held, inverse = _new(x, out), new_kept(x, kept), torch.empty(rows, device=x.device)
    launch(
        _norm_kernel, x, rows, raw(x), _vector(weight), _vector(bias), inverse, *_bits(made), raw(held.payload),
        held.scale_inv, columns, eps,
        CENTERED=centered, WEIGHTED=weight is not None, BIASED=bias is not None, X_FORMAT=name_of(x),
        OUT_FORMAT=format_of(out.dtype).name, HOW=_how(out, kept.block), KEPT_FORMAT=kept.format.name,
        **_row_options(columns, kept.block),
    )  # fmt: skip
    return made, held, inverse


def norm_backward(
    grad: Tensor, kept: Operand, inverse: Tensor, weight: Tensor | None, centered: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`.reference_fused.norm_backward`."""
    if not is_fast((grad,), kept.block, Target(dtype)) or grad.shape[-1] > _LONGEST_ROW:
        return reference_fused.norm_backward(grad, kept, inverse, weight, centered, dtype)
    rows, columns = matrix_shape(grad.shape)
    rows_each = triton.cdiv(rows, _PARTS)
    parts = triton.cdiv(rows, rows_each)
    sums = torch.empty(2, parts, columns, device=grad.device)
    made = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    launch(
        _norm_backward_kernel, grad, parts, raw(grad), raw(kept.payload), kept.scale_inv, inverse, _vector(weight),
        raw(made), sums[0], sums[1], rows, columns, rows_each,
        CENTERED=centered, WEIGHTED=weight is not None, GRAD_FORMAT=name_of(grad), KEPT_FORMAT=name_of(kept.payload),
        OUT_FORMAT=format_of(dtype).name, **_row_options(columns, kept.block),
    )  # fmt: skip
    return made, sums[0].sum(0), sums[1].sum(0)


def activation_quantize(
    gate: Tensor, value: Tensor | None, kind: str, out: Target, kept: Grouped
) -> tuple[Stored, Kept, Kept]:
    """See :func:`.reference_fused.activation_quantize`."""
    if not is_fast((gate, value), kept.block, out):
        return reference_fused.activation_quantize(gate, value, kind, out, kept)
    made, held, held_value = _new(gate, out), new_kept(gate, kept), None
    if value is not None:
        held_value = new_kept(value, kept)
    factors = (None, None) if held_value is None else (raw(held_value.payload), held_value.scale_inv)
    options = tile_options(kept.block)
    launch(
        _activation_kernel, gate, triton.cdiv(held.scale_inv.numel(), options["GROUPS"]), raw(gate),
        None if value is None else raw(value), *_bits(made), raw(held.payload), held.scale_inv, *factors,
        *matrix_shape(gate.shape),
        KIND=kind, GATED=value is not None, GATE_FORMAT=name_of(gate),
        VALUE_FORMAT="" if value is None else name_of(value),
        OUT_FORMAT=format_of(out.dtype).name, HOW=_how(out, kept.block), KEPT_FORMAT=kept.format.name, **options,
    )  # fmt: skip
    if held_value is None:
        none = torch.empty(0, device=gate.device)
        held_value = Kept(none.to(kept.format.dtype), none)
    return made, held, held_value


def activation_backward(
    grad: Tensor, gate: Operand, value: Operand | None, kind: str, out: Target
) -> tuple[Stored, Stored]:
    """See :func:`.reference_fused.activation_backward`."""
    if not is_fast((grad,), gate.block, out):
        return reference_fused.activation_backward(grad, gate, value, kind, out)
    made, made_value = _new(grad, out), None if value is None else _new(grad, out)
    factors = (None, None) if value is None else (raw(value.payload), value.scale_inv)
    options = tile_options(gate.block)
    launch(
        _activation_backward_kernel, grad, triton.cdiv(gate.scale_inv.numel(), options["GROUPS"]), raw(grad),
        raw(gate.payload), gate.scale_inv, *factors, *_bits(made),
        *((None, None, None) if made_value is None else _bits(made_value)), *matrix_shape(grad.shape),
        KIND=kind, GATED=value is not None, GRAD_FORMAT=name_of(grad), KEPT_FORMAT=name_of(gate.payload),
        OUT_FORMAT=format_of(out.dtype).name, HOW=_how(out, gate.block), **options,
    )  # fmt: skip
    if made_value is None:
        none = torch.empty(0, device=grad.device)
        made_value = Stored(none.to(out.dtype), none, none.clone())
    return made, made_value
