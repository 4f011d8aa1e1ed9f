"""The CPU twin of :mod:`.reference_fused`, in ``cpu_fused.h``: a row is read once and leaves as its targets ask.

Payloads and scales are those of the reference on the same FP32 values. Those values differ in their last bits: the sums
over a row run in vectors, exp and the normal distribution are polynomials, and a column's gradient is summed in 16
parts of the rows, whatever the number of threads. Where a case has no fast path (float64, groups whose size does not
divide 2048) the reference itself is called. A sum of two stored tensors is the reference's to the bit.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from msamp_like.formats import BF16, FP32, WHOLE, Block, Format, grid_shape
from msamp_like.kernels import cpu, reference_fused
from msamp_like.kernels.reference import Operand
from msamp_like.kernels.reference_fused import KINDS, Grouped, Kept, Stored, Target

_PIECE = 2048  # TILE of cpu.cpp
_VECTOR = 16
_AS_IT_IS, _IN_GROUPS, _DELAYED = range(3)
_POINTER, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Written(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("payload", "scale_inv", "amax")),
        ("block", _INT64),
        *((name, _INT32) for name in ("type", "how")),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("x", "weight", "bias", "inverse")),
        *((name, _Written) for name in ("out", "kept")),
        ("columns", _INT64),
        ("eps", ctypes.c_float),
        *((name, _INT32) for name in ("type", "centered")),
    ]


class _NormBackward(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("grad", "inverse", "weight")),
        *((name, _Written) for name in ("kept", "out")),
        ("columns", _INT64),
        *((name, _INT32) for name in ("type", "centered")),
    ]


class _Activation(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("gate", "value")),
        *((name, _Written) for name in ("out", "kept_gate", "kept_value")),
        ("columns", _INT64),
        *((name, _INT32) for name in ("gate_type", "value_type", "kind", "unused")),
    ]


class _ActivationBackward(ctypes.Structure):
    _fields_ = [
        ("grad", _POINTER),
        *((name, _Written) for name in ("gate", "value", "out_gate", "out_value")),
        ("columns", _INT64),
        *((name, _INT32) for name in ("type", "kind")),
    ]


class _Softmax(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("logits", "sums")),
        ("kept", _Written),
        ("columns", _INT64),
        *((name, _INT32) for name in ("type", "unused")),
    ]


class _SoftmaxBackward(ctypes.Structure):
    _fields_ = [
        *((name, _Written) for name in ("kept", "out")),
        *((name, _POINTER) for name in ("targets", "grad")),
        ("columns", _INT64),
    ]


class _Sum(ctypes.Structure):
    _fields_ = [(name, _Written) for name in ("total", "addend")]


@functools.cache
def _parts() -> int:
    return int(cpu.native().library.msamp_norm_parts())


def _call(name: str, arguments: ctypes.Structure, rows: int, *between: Any) -> None:
    native = cpu.native()
    threads = _INT32(torch.get_num_threads())
    getattr(native.library, name)(ctypes.byref(arguments), *between, _INT64(rows), _INT32(native.simd), threads)


# --- what is written and read ---------------------------------------------------------------------------------------


def _is_fast(tensors: tuple[Tensor | None, ...], *blocks: tuple[int, int] | None) -> bool:
    real = all(t is None or (t.dtype in cpu.REAL_DTYPES and t.numel() > 0) for t in tensors)
    return real and all(b is None or (b[0] == 1 and b[1] > 0 and _PIECE % b[1] == 0) for b in blocks)


def _out_is_fast(out: Target) -> bool:
    if out.block is None:
        return out.dtype in cpu.REAL_DTYPES
    return _is_fast((), out.block) if out.scale_inv is None else out.block == WHOLE


def _new(like: Tensor, out: Target) -> tuple[Stored, _Written]:
    """Room for a result of the shape of ``like``, and what the library is told of it."""
    payload = torch.empty(like.shape, dtype=out.dtype)
    type_ = cpu.TYPES[out.dtype]
    if out.block is None:
        none = torch.empty(0)
        return Stored(payload, none, none.clone()), _Written(payload.data_ptr(), None, None, 0, type_, _AS_IT_IS)
    grid = grid_shape(like.shape, out.block)
    amax = torch.zeros(grid)
    delayed = out.scale_inv is not None
    scale_inv = out.scale_inv.reshape(grid).clone() if out.scale_inv is not None else torch.empty(grid)
    pointers = (t.data_ptr() for t in (payload, scale_inv, amax))
    block = 0 if delayed else out.block[1]
    return Stored(payload, scale_inv, amax), _Written(*pointers, block, type_, _DELAYED if delayed else _IN_GROUPS)


def _new_kept(like: Tensor, kept: Grouped) -> tuple[Kept, _Written]:
    made = Kept(torch.empty(like.shape, dtype=kept.format.dtype), torch.empty(grid_shape(like.shape, kept.block)))
    return made, _read(Operand(*made, kept.block))


def _read(kept: Operand) -> _Written:
    type_ = cpu.TYPES[kept.payload.dtype]
    return _Written(kept.payload.data_ptr(), kept.scale_inv.data_ptr(), None, kept.block[1], type_, _IN_GROUPS)


def _vectors(vector: Tensor | None) -> Tensor | None:
    """FP32, filled up to whole vectors."""
    if vector is None:
        return None
    missing = -vector.numel() % _VECTOR
    vector = vector.detach().float().contiguous()
    return torch.nn.functional.pad(vector, (0, missing)) if missing else vector


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# --- the functions --------------------------------------------------------------------------------------------------


def norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool, out: Target, kept: Grouped
) -> tuple[Stored, Kept, Tensor]:
    """See :func:`.reference_fused.norm_quantize`."""
    if not _is_fast((x,), kept.block) or not _out_is_fast(out):
        return reference_fused.norm_quantize(x, weight, bias, eps, centered, out, kept)
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    scale, shift, inverse = _vectors(weight), _vectors(bias), torch.empty(rows)
    made, target = _new(x, out)
    held, target_kept = _new_kept(x, kept)
    addresses = x.data_ptr(), _address(scale), _address(shift), inverse.data_ptr()
    _call("msamp_norm", _Norm(*addresses, target, target_kept, columns, eps, cpu.TYPES[x.dtype], centered), rows)
    return made, held, inverse


def norm_backward(
    grad: Tensor, kept: Operand, inverse: Tensor, weight: Tensor | None, centered: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`.reference_fused.norm_backward`."""
    if not _is_fast((grad,), kept.block) or dtype not in cpu.REAL_DTYPES:
        return reference_fused.norm_backward(grad, kept, inverse, weight, centered, dtype)
    rows, columns = grad.numel() // grad.shape[-1], grad.shape[-1]
    scale, width = _vectors(weight), columns + -columns % _VECTOR
    made, target = _new(grad, Target(dtype))
    sums = torch.empty(_parts(), 2, width)
    addresses = grad.data_ptr(), inverse.contiguous().data_ptr(), _address(scale)
    arguments = _NormBackward(*addresses, _read(kept), target, columns, cpu.TYPES[grad.dtype], centered)
    _call("msamp_norm_backward", arguments, rows, _POINTER(sums.data_ptr()))
    return made.payload, sums[0, 0, :columns].clone(), sums[0, 1, :columns].clone()


def activation_quantize(
    gate: Tensor, value: Tensor | None, kind: str, out: Target, kept: Grouped
) -> tuple[Stored, Kept, Kept]:
    """See :func:`.reference_fused.activation_quantize`."""
    if not _is_fast((gate, value), kept.block) or not _out_is_fast(out):
        return reference_fused.activation_quantize(gate, value, kind, out, kept)
    columns = gate.shape[-1] if gate.ndim else 1
    made, target = _new(gate, out)
    held_gate, target_gate = _new_kept(gate, kept)
    held_value, target_value = Kept(torch.empty(0, dtype=kept.format.dtype), torch.empty(0)), _Written()
    if value is not None:
        held_value, target_value = _new_kept(value, kept)
    types = cpu.TYPES[gate.dtype], 0 if value is None else cpu.TYPES[value.dtype]
    arguments = _Activation(
        *(gate.data_ptr(), _address(value), target, target_gate, target_value, columns, *types, KINDS.index(kind), 0)
    )
    _call("msamp_activation", arguments, gate.numel() // columns)
    return made, held_gate, held_value


def activation_backward(
    grad: Tensor, gate: Operand, value: Operand | None, kind: str, out: Target
) -> tuple[Stored, Stored]:
    """See :func:`.reference_fused.activation_backward`."""
    if not _is_fast((grad,), gate.block) or not _out_is_fast(out):
        return reference_fused.activation_backward(grad, gate, value, kind, out)
    columns = grad.shape[-1] if grad.ndim else 1
    made, target = _new(grad, out)
    none = torch.empty(0)
    made_value, target_value = Stored(none.to(out.dtype), none, none.clone()), _Written()
    if value is not None:
        made_value, target_value = _new(grad, out)
    factor = _Written() if value is None else _read(value)
    kinds = cpu.TYPES[grad.dtype], KINDS.index(kind)
    arguments = _ActivationBackward(grad.data_ptr(), _read(gate), factor, target, target_value, columns, *kinds)
    _call("msamp_activation_backward", arguments, grad.numel() // columns)
    return made, made_value


def softmax_quantize(logits: Tensor, kept: Grouped) -> tuple[Tensor, Kept]:
    """See :func:`.reference_fused.softmax_quantize`."""
    if not _is_fast((logits,), kept.block):
        return reference_fused.softmax_quantize(logits, kept)
    rows, columns = logits.shape
    sums = torch.empty(rows)
    held, target = _new_kept(logits, kept)
    arguments = _Softmax(logits.data_ptr(), sums.data_ptr(), target, columns, cpu.TYPES[logits.dtype], 0)
    _call("msamp_softmax", arguments, rows)
    return sums, held


def softmax_backward(kept: Operand, targets: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`.reference_fused.softmax_backward`."""
    if not _is_fast((grad,), kept.block) or dtype not in cpu.REAL_DTYPES or targets.dtype != torch.int64:
        return reference_fused.softmax_backward(kept, targets, grad, dtype)
    made, target = _new(kept.payload, Target(dtype))
    columns, grad = kept.payload.shape[1], grad.float()
    arguments = _SoftmaxBackward(_read(kept), target, targets.data_ptr(), grad.data_ptr(), columns)
    _call("msamp_softmax_backward", arguments, kept.payload.shape[0])
    return made.payload


def accumulate_(total: Operand, addend: Operand) -> None:
    """See :func:`.reference_fused.accumulate_`."""
    unscaled = total.payload.dtype in (BF16.dtype, FP32.dtype) and total.payload.is_contiguous()
    single = total.scale_inv.numel() == addend.scale_inv.numel() == 1 and total.payload.numel() > 0
    if not (unscaled and single) or addend.payload.dtype not in cpu.TYPES:
        reference_fused.accumulate_(total, addend)
        return
    _call("msamp_accumulate", _Sum(_read(total), _read(addend)), total.payload.numel())


def requantize(
    source: Operand, format: Format, block: Block, margin: int = 0, power_of_two: bool = True
) -> tuple[Tensor, Tensor]:
    """See :func:`.reference_fused.requantize`."""
    plain = source.payload.dtype in cpu.REAL_DTYPES and source.scale_inv.numel() == 1
    if plain and float(source.scale_inv) == 1.0:
        return cpu.quantize_current(source.payload, format, block, margin, power_of_two)[:2]
    values = cpu.dequantize(*source[:3], torch.float32)
    return cpu.quantize_current(values, format, block, margin, power_of_two)[:2]
