"""The fused kernels of :mod:`.reference_fused` as torch custom ops, picked by device as :mod:`msamp_like.kernels` does.

The functions here have the signatures of the reference. A target and what is kept are flattened into an op's arguments;
where an op returns nothing for one of them (no scales, no value) it returns an empty tensor.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from msamp_like.formats import Block, Format, format_of, grid_shape
from msamp_like.kernels import cpu, cpu_fused, reference_fused
from msamp_like.kernels.reference import Operand
from msamp_like.kernels.reference_fused import KINDS, Grouped, Kept, Stored, Target

__all__ = [
    "KINDS",
    "Grouped",
    "Kept",
    "Stored",
    "Target",
    "accumulate_",
    "activation_backward",
    "activation_quantize",
    "norm_backward",
    "norm_quantize",
    "requantize",
    "softmax_backward",
    "softmax_quantize",
]

_OUT = "ScalarType out_dtype, int[2]? out_block, Tensor? out_scale_inv"
_KEPT = "ScalarType kept_dtype, int[2] kept_block"
_SCHEMAS = (
    f"norm_quantize(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centered, {_OUT}, {_KEPT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "norm_backward(Tensor grad, Tensor payload, Tensor scale_inv, int[2] block, Tensor inverse, Tensor? weight,"
    " bool centered, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    f"activation_quantize(Tensor gate, Tensor? value, str kind, {_OUT}, {_KEPT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "activation_backward(Tensor grad, Tensor gate, Tensor gate_scale_inv, Tensor? value, Tensor? value_scale_inv,"
    f" int[2] block, str kind, {_OUT}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"softmax_quantize(Tensor logits, {_KEPT}) -> (Tensor, Tensor, Tensor)",
    "softmax_backward(Tensor payload, Tensor scale_inv, int[2] block, Tensor targets, Tensor grad, ScalarType dtype)"
    " -> Tensor",
    "accumulate_(Tensor(a!) total, Tensor(b!) total_scale_inv, int[2] total_block,"
    " Tensor addend, Tensor addend_scale_inv, int[2] addend_block) -> ()",
    "requantize(Tensor source, Tensor source_scale_inv, int[2] source_block, ScalarType dtype, int[2] block,"
    " int margin, bool power_of_two) -> (Tensor, Tensor)",
)

_LIBRARY = torch.library.Library("msamp_like", "FRAGMENT")
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_OPS = torch.ops.msamp_like


# --- the functions --------------------------------------------------------------------------------------------------


def norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool, out: Target, kept: Grouped
) -> tuple[Stored, Kept, Tensor]:
    """See :func:`.reference_fused.norm_quantize`."""
    made = _OPS.norm_quantize.default(x, weight, bias, eps, centered, *out, kept.format.dtype, kept.block)
    return Stored(*made[:3]), Kept(*made[3:5]), made[5]


def norm_backward(
    grad: Tensor, kept: Operand, inverse: Tensor, weight: Tensor | None, centered: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`.reference_fused.norm_backward`."""
    return _OPS.norm_backward.default(grad, *kept[:3], inverse, weight, centered, dtype)


def activation_quantize(
    gate: Tensor, value: Tensor | None, kind: str, out: Target, kept: Grouped
) -> tuple[Stored, Kept, Kept]:
    """See :func:`.reference_fused.activation_quantize`."""
    made = _OPS.activation_quantize.default(gate, value, kind, *out, kept.format.dtype, kept.block)
    return Stored(*made[:3]), Kept(*made[3:5]), Kept(*made[5:])


def activation_backward(
    grad: Tensor, gate: Operand, value: Operand | None, kind: str, out: Target
) -> tuple[Stored, Stored]:
    """See :func:`.reference_fused.activation_backward`; gate and value are kept in blocks of one shape."""
    factors = (None, None) if value is None else value[:2]
    made = _OPS.activation_backward.default(grad, *gate[:2], *factors, gate.block, kind, *out)
    return Stored(*made[:3]), Stored(*made[3:])


def softmax_quantize(logits: Tensor, kept: Grouped) -> tuple[Tensor, Kept]:
    """See :func:`.reference_fused.softmax_quantize`."""
    made = _OPS.softmax_quantize.default(logits, kept.format.dtype, kept.block)
    return made[0], Kept(*made[1:])


def softmax_backward(kept: Operand, targets: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`.reference_fused.softmax_backward`."""
    return _OPS.softmax_backward.default(*kept[:3], targets, grad, dtype)


def accumulate_(total: Operand, addend: Operand) -> None:
    """See :func:`.reference_fused.accumulate_`."""
    _OPS.accumulate_.default(*total[:3], *addend[:3])


def requantize(
    source: Operand, format: Format, block: Block, margin: int = 0, power_of_two: bool = True
) -> tuple[Tensor, Tensor]:
    """See :func:`.reference_fused.requantize`."""
    return _OPS.requantize.default(*source[:3], format.dtype, block, margin, power_of_two)


# --- which twin -----------------------------------------------------------------------------------------------------


def _on_cpu(name: str) -> ModuleType:
    return cpu_fused if cpu.available() else reference_fused


@functools.cache
def _on_cuda(name: str) -> ModuleType:
    """The file that holds a function's CUDA twin, imported when the first CUDA tensor arrives."""
    if importlib.util.find_spec("triton") is None:
        return reference_fused
    files = {
        "softmax_quantize": "triton_softmax",
        "softmax_backward": "triton_softmax",
        "accumulate_": "triton_sums",
        "requantize": "triton_casts",
    }
    return importlib.import_module(f"msamp_like.kernels.{files.get(name, 'triton_fused')}")


def _elsewhere(name: str) -> ModuleType:
    return reference_fused


class _Device:
    """The ops on one kind of device: flat arguments back into named tuples, then the twin. Inputs are contiguous."""

    def __init__(self, pick: Callable[[str], Any]) -> None:
        self.pick = pick

    def norm_quantize(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool, *stored: Any
    ) -> tuple[Tensor, ...]:
        out, kept = _target(*stored[:3]), _grouped(*stored[3:])
        made = self.pick("norm_quantize").norm_quantize(x.contiguous(), weight, bias, eps, centered, out, kept)
        return *made[0], *made[1], made[2]

    def norm_backward(
        self, grad: Tensor, payload: Tensor, scale_inv: Tensor, block: list[int], *rest: Any
    ) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = self.pick("norm_backward").norm_backward(
            grad.contiguous(), _operand(payload, scale_inv, block), *rest
        )
        return made

    def activation_quantize(self, gate: Tensor, value: Tensor | None, kind: str, *stored: Any) -> tuple[Tensor, ...]:
        out, kept = _target(*stored[:3]), _grouped(*stored[3:])
        factor = None if value is None else value.contiguous()
        made = self.pick("activation_quantize").activation_quantize(gate.contiguous(), factor, kind, out, kept)
        return *made[0], *made[1], *made[2]

    def activation_backward(
        self, grad: Tensor, gate: Tensor, gate_scale_inv: Tensor, value: Tensor | None, value_scale_inv: Tensor | None,
        block: list[int], kind: str, *out: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        factor = None if value is None or value_scale_inv is None else _operand(value, value_scale_inv, block)
        made = self.pick("activation_backward").activation_backward(
            grad.contiguous(), _operand(gate, gate_scale_inv, block), factor, kind, _target(*out)
        )
        return *made[0], *made[1]

    def softmax_quantize(self, logits: Tensor, *kept: Any) -> tuple[Tensor, ...]:
        made = self.pick("softmax_quantize").softmax_quantize(logits.contiguous(), _grouped(*kept))
        return made[0], *made[1]

    def softmax_backward(self, payload: Tensor, scale_inv: Tensor, block: list[int], *rest: Any) -> Tensor:
        targets, grad, dtype = rest
        kept = _operand(payload, scale_inv, block)
        return self.pick("softmax_backward").softmax_backward(kept, targets.contiguous(), grad.contiguous(), dtype)

    def accumulate_(self, payload: Tensor, scale_inv: Tensor, block: list[int], *addend: Any) -> None:
        total = Operand(payload, scale_inv, _block(block))  # as it is: this is where the sum goes
        self.pick("accumulate_").accumulate_(total, _operand(*addend))

    def requantize(
        self, source: Tensor, source_scale_inv: Tensor, source_block: list[int], dtype: torch.dtype,
        block: list[int], *rule: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        stored = _operand(source, source_scale_inv, source_block)
        made: tuple[Tensor, Tensor] = self.pick("requantize").requantize(stored, format_of(dtype), _block(block), *rule)
        return made


def _block(block: list[int]) -> Block:
    return block[0], block[1]


def _target(dtype: torch.dtype, block: list[int] | None, scale_inv: Tensor | None) -> Target:
    return Target(dtype, None if block is None else _block(block), scale_inv)


def _grouped(dtype: torch.dtype, block: list[int]) -> Grouped:
    return Grouped(format_of(dtype), _block(block))


def _operand(payload: Tensor, scale_inv: Tensor, block: list[int]) -> Operand:
    return Operand(payload.contiguous(), scale_inv.contiguous(), _block(block))


# --- shapes, for torch.compile and FakeTensor -----------------------------------------------------------------------


def _empty(like: Tensor, shape: Any = (0,), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _empty_stored(
    like: Tensor, dtype: torch.dtype, block: list[int] | None, scale_inv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grid = (0,) if block is None else grid_shape(like.shape, _block(block))
    return _empty(like, like.shape, dtype), _empty(like, grid), _empty(like, grid)


def _empty_kept(like: Tensor, dtype: torch.dtype, block: list[int]) -> tuple[Tensor, Tensor]:
    return _empty(like, like.shape, dtype), _empty(like, grid_shape(like.shape, _block(block)))


def _norm_shapes(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool, *stored: Any
) -> tuple[Tensor, ...]:
    rows = x.numel() // x.shape[-1]
    return *_empty_stored(x, *stored[:3]), *_empty_kept(x, *stored[3:]), _empty(x, (rows,))


def _activation_shapes(gate: Tensor, value: Tensor | None, kind: str, *stored: Any) -> tuple[Tensor, ...]:
    none = _empty(gate, (0,), stored[3]), _empty(gate)
    kept = _empty_kept(gate, *stored[3:])
    return *_empty_stored(gate, *stored[:3]), *kept, *(none if value is None else _empty_kept(gate, *stored[3:]))


def _activation_backward_shapes(
    grad: Tensor, gate: Tensor, gate_scale_inv: Tensor, value: Tensor | None, value_scale_inv: Tensor | None,
    block: list[int], kind: str, *out: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    none = _empty(grad, (0,), out[0]), _empty(grad), _empty(grad)
    return *_empty_stored(grad, *out), *(none if value is None else _empty_stored(grad, *out))


_SHAPES: dict[str, Callable[..., Any]] = {
    "norm_quantize": _norm_shapes,
    "norm_backward": lambda grad, payload, scale_inv, block, inverse, weight, centered, dtype: (
        _empty(grad, grad.shape, dtype),
        _empty(grad, grad.shape[-1:]),
        _empty(grad, grad.shape[-1:]),
    ),
    "activation_quantize": _activation_shapes,
    "activation_backward": _activation_backward_shapes,
    "softmax_quantize": lambda logits, dtype, block: (
        _empty(logits, logits.shape[:1]),
        *_empty_kept(logits, dtype, block),
    ),
    "softmax_backward": lambda payload, scale_inv, block, targets, grad, dtype: _empty(payload, payload.shape, dtype),
    "accumulate_": lambda *arguments: None,
    "requantize": lambda source, scale_inv, source_block, dtype, block, margin, power_of_two: _empty_kept(
        source, dtype, block
    ),
}

for _name, _shape in _SHAPES.items():
    for _key, _pick in (("CPU", _on_cpu), ("CUDA", _on_cuda), ("CompositeExplicitAutograd", _elsewhere)):
        _LIBRARY.impl(_name, getattr(_Device(_pick), _name), _key)
    torch.library.register_fake(f"msamp_like::{_name}", _shape, lib=_LIBRARY)
