"""Kernels on plain tensors, picked by device.

:mod:`.reference` is the definition, and what runs on a device without a twin. On the CPU :mod:`.cpu` gives the same
bytes if its library was built, on CUDA and ROCm the ``triton_*`` files do. Every function is a torch custom op
(``torch.ops.msamp_like``), so that torch.compile and FakeTensor see its shapes and never its inside; the functions here
have the signatures of the reference and flatten its named tuples into an op's arguments.

Results are contiguous whatever the strides of the input. No op has a derivative: casts are wrapped where gradients are
defined.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from msamp_like.formats import Block, Format, check_same_kind, format_of, grid_shape
from msamp_like.kernels import attention as attention_reference
from msamp_like.kernels import cpu, cpu_updates, grouped, reference, reference_updates, table
from msamp_like.kernels.reference import Noise, Operand
from msamp_like.kernels.reference_updates import (
    AdamScalars,
    LionScalars,
    Residual,
    Row,
    SgdScalars,
    adam_update,
    dequantize_with_residual,
    lion_update,
    quantize_with_residual,
    sgd_update,
    store_with_residual_,
)

__all__ = [
    "AdamScalars",
    "LionScalars",
    "Noise",
    "Operand",
    "Residual",
    "Row",
    "SgdScalars",
    "adam_steps_",
    "adam_update",
    "amax",
    "attention_backward",
    "attention_forward",
    "dequantize",
    "dequantize_with_residual",
    "grouped_matmul",
    "lion_steps_",
    "lion_update",
    "quantize",
    "quantize_amax",
    "quantize_both",
    "quantize_current",
    "quantize_with_residual",
    "scale_inv_from_amax",
    "scaled_matmul",
    "sgd_steps_",
    "sgd_update",
    "steps_",
    "store_",
    "store_with_residual_",
]

_STEPS: dict[str, Any] = {"adam_steps_": AdamScalars, "lion_steps_": LionScalars, "sgd_steps_": SgdScalars}
"""Steps of a table of rows, each with what its update is told."""

_SCHEMAS = (
    "amax(Tensor x, int[2] block) -> Tensor",
    "scale_inv_from_amax(Tensor amax, ScalarType dtype, int margin, bool power_of_two) -> Tensor",
    "quantize(Tensor x, Tensor scale_inv, ScalarType dtype, int[2] block, SymInt[]? noise) -> Tensor",
    "quantize_amax(Tensor x, Tensor scale_inv, ScalarType dtype, int[2] block) -> (Tensor, Tensor)",
    "quantize_current(Tensor x, ScalarType dtype, int[2] block, int margin, bool power_of_two)"
    " -> (Tensor, Tensor, Tensor)",
    "quantize_both(Tensor x, ScalarType dtype, int[2] block, int margin, bool power_of_two)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "dequantize(Tensor payload, Tensor scale_inv, int[2] block, ScalarType dtype) -> Tensor",
    "scaled_matmul(Tensor a, Tensor a_scale_inv, int[2] a_block, Tensor b, Tensor b_scale_inv, int[2] b_block,"
    " str layout, ScalarType dtype) -> Tensor",
    "grouped_matmul(Tensor a, Tensor a_scale_inv, int[2] a_block, Tensor b, Tensor b_scale_inv, int[2] b_block,"
    " Tensor offsets, str layout, ScalarType dtype) -> Tensor",
    "attention_forward(Tensor query, Tensor query_scale_inv, int[2] query_block,"
    " Tensor key, Tensor key_scale_inv, int[2] key_block, Tensor value, Tensor value_scale_inv, int[2] value_block,"
    " float scale, bool causal, ScalarType dtype) -> (Tensor, Tensor)",
    "attention_backward(Tensor query, Tensor query_scale_inv, int[2] query_block,"
    " Tensor key, Tensor key_scale_inv, int[2] key_block, Tensor value, Tensor value_scale_inv, int[2] value_block,"
    " Tensor grad, Tensor grad_scale_inv, int[2] grad_block, Tensor log_sum, Tensor delta,"
    " float scale, bool causal, ScalarType format, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    "store_(Tensor(a!) target, Tensor(b!) target_scale_inv, int[2] target_block, SymInt[]? target_noise,"
    " Tensor value) -> ()",
    *(table.schema(name, scalars) for name, scalars in _STEPS.items()),
)

_LIBRARY = torch.library.Library("msamp_like", "DEF")
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_OPS = torch.ops.msamp_like


# --- the functions --------------------------------------------------------------------------------------------------


def amax(x: Tensor, block: Block) -> Tensor:
    """See :func:`.reference.amax`."""
    return _OPS.amax.default(x, block)


def scale_inv_from_amax(amax: Tensor, format: Format, margin: int = 0, power_of_two: bool = True) -> Tensor:
    """See :func:`.reference.scale_inv_from_amax`."""
    return _OPS.scale_inv_from_amax.default(amax, format.dtype, margin, power_of_two)


def quantize(x: Tensor, scale_inv: Tensor, format: Format, block: Block, noise: Noise | None = None) -> Tensor:
    """See :func:`.reference.quantize`."""
    return _OPS.quantize.default(x, scale_inv, format.dtype, block, noise)


def quantize_amax(x: Tensor, scale_inv: Tensor, format: Format, block: Block) -> tuple[Tensor, Tensor]:
    """See :func:`.reference.quantize_amax`."""
    return _OPS.quantize_amax.default(x, scale_inv, format.dtype, block)


def quantize_current(
    x: Tensor, format: Format, block: Block, margin: int = 0, power_of_two: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`.reference.quantize_current`."""
    return _OPS.quantize_current.default(x, format.dtype, block, margin, power_of_two)


def quantize_both(
    x: Tensor, format: Format, block: Block, margin: int = 0, power_of_two: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`.reference.quantize_both`."""
    return _OPS.quantize_both.default(x, format.dtype, block, margin, power_of_two)


def dequantize(payload: Tensor, scale_inv: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """See :func:`.reference.dequantize`."""
    return _OPS.dequantize.default(payload, scale_inv, block, dtype)


def scaled_matmul(a: Operand, b: Operand, layout: str, dtype: torch.dtype) -> Tensor:
    """See :func:`.reference.scaled_matmul`; the order of the sum is the device's, so the last bits may differ.

    Raises ValueError for an OCP and a fnuz FP8 operand together.
    """
    check_same_kind(a.payload.dtype, b.payload.dtype)
    return _OPS.scaled_matmul.default(*a[:3], *b[:3], layout, dtype)


def grouped_matmul(a: Operand, b: Operand, offsets: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """See :mod:`.grouped`; the order of the sum is the device's, so the last bits may differ."""
    return _OPS.grouped_matmul.default(*a[:3], *b[:3], offsets, layout, dtype)


def attention_forward(
    query: Operand, key: Operand, value: Operand, scale: float, causal: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See :func:`.attention.attention`."""
    return _OPS.attention_forward.default(*query[:3], *key[:3], *value[:3], scale, causal, dtype)


def attention_backward(
    query: Operand, key: Operand, value: Operand, grad_output: Operand, log_sum: Tensor, delta: Tensor,
    scale: float, causal: bool, format: Format, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`.attention.attention_backward`."""
    operands = (*query[:3], *key[:3], *value[:3], *grad_output[:3], log_sum, delta)
    return _OPS.attention_backward.default(*operands, scale, causal, format.dtype, dtype)


def store_(target: Operand, value: Tensor) -> None:
    """See :func:`.reference.store_`."""
    _OPS.store_.default(*target, value)


def adam_steps_(rows: Sequence[Row], scalars: AdamScalars, bad: Tensor | None = None) -> None:
    """See :func:`.reference_updates.adam_steps_`; all rows lie on one device and have as many states."""
    _OPS.adam_steps_.default(*table.flatten(rows), *scalars, bad)


def lion_steps_(rows: Sequence[Row], scalars: LionScalars, bad: Tensor | None = None) -> None:
    """See :func:`.reference_updates.lion_steps_`; all rows lie on one device."""
    _OPS.lion_steps_.default(*table.flatten(rows), *scalars, bad)


def sgd_steps_(rows: Sequence[Row], scalars: SgdScalars, bad: Tensor | None = None) -> None:
    """See :func:`.reference_updates.sgd_steps_`; all rows lie on one device."""
    _OPS.sgd_steps_.default(*table.flatten(rows), *scalars, bad)


def steps_(rows: Sequence[Row], update: Callable[..., list[Tensor]], bad: Tensor | None = None) -> None:
    """See :func:`.reference_updates.steps_`: a step that has no kernel of its own, between the casts of the device."""
    reference_updates.steps_(rows, update, bad, dequantize, store_)


# --- which twin -----------------------------------------------------------------------------------------------------


def _elsewhere(name: str) -> ModuleType:
    return reference_updates if name.endswith("_steps_") else reference


@functools.cache
def _on_cpu(name: str) -> ModuleType:
    if not cpu.available():
        return _elsewhere(name)
    return cpu_updates if name.endswith("_steps_") else cpu


@functools.cache
def _on_cuda(name: str) -> ModuleType:
    """The file that holds a function's CUDA twin, imported when the first CUDA tensor arrives."""
    files = {
        **dict.fromkeys(_STEPS, "triton_optimizers"),
        "scaled_matmul": "cuda",
        "quantize_both": "triton_both",
        "grouped_matmul": "triton_grouped",
        "attention": "triton_attention",
        "attention_backward": "triton_attention",
    }
    if importlib.util.find_spec("triton") is None:
        return _elsewhere(name)
    twin = importlib.import_module(f"msamp_like.kernels.{files.get(name, 'triton_casts')}")
    return twin if hasattr(twin, name) else _elsewhere(name)


class _Device:
    """The ops on one kind of device: flat arguments back into named tuples, then the twin that ``pick`` names.

    Inputs are made contiguous here, once for all twins: so results have one layout on every device.
    """

    def __init__(self, pick: Callable[[str], Any]) -> None:
        self.pick = pick

    def amax(self, x: Tensor, block: list[int]) -> Tensor:
        return self.pick("amax").amax(x.contiguous(), _block(block))

    def scale_inv_from_amax(self, amax: Tensor, dtype: torch.dtype, margin: int, power_of_two: bool) -> Tensor:
        twin = self.pick("scale_inv_from_amax")
        return twin.scale_inv_from_amax(amax.contiguous(), format_of(dtype), margin, power_of_two)

    def quantize(
        self, x: Tensor, scale_inv: Tensor, dtype: torch.dtype, block: list[int], noise: list[int] | None
    ) -> Tensor:
        twin = self.pick("quantize")
        return twin.quantize(x.contiguous(), scale_inv, format_of(dtype), _block(block), _noise(noise))

    def quantize_amax(
        self, x: Tensor, scale_inv: Tensor, dtype: torch.dtype, block: list[int]
    ) -> tuple[Tensor, Tensor]:
        twin = self.pick("quantize_amax")
        return twin.quantize_amax(x.contiguous(), scale_inv, format_of(dtype), _block(block))

    def quantize_current(
        self, x: Tensor, dtype: torch.dtype, block: list[int], margin: int, power_of_two: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        twin = self.pick("quantize_current")
        return twin.quantize_current(x.contiguous(), format_of(dtype), _block(block), margin, power_of_two)

    def quantize_both(
        self, x: Tensor, dtype: torch.dtype, block: list[int], margin: int, power_of_two: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        twin = self.pick("quantize_both")
        return twin.quantize_both(x.contiguous(), format_of(dtype), _block(block), margin, power_of_two)

    def dequantize(self, payload: Tensor, scale_inv: Tensor, block: list[int], dtype: torch.dtype) -> Tensor:
        return self.pick("dequantize").dequantize(payload.contiguous(), scale_inv, _block(block), dtype)

    def scaled_matmul(self, *arguments: Any) -> Tensor:
        a, b = _operand(*arguments[:3]), _operand(*arguments[3:6])
        with torch.autocast(a.payload.device.type, enabled=False):  # which would take the product in FP16 and overflow
            return self.pick("scaled_matmul").scaled_matmul(a, b, *arguments[6:])

    def grouped_matmul(self, *arguments: Any) -> Tensor:
        a, b = _operand(*arguments[:3]), _operand(*arguments[3:6])
        twin, multiply = self.pick("grouped_matmul"), self.pick("scaled_matmul").scaled_matmul
        with torch.autocast(a.payload.device.type, enabled=False):
            if hasattr(twin, "grouped_matmul") and twin.takes(a, b):
                return twin.grouped_matmul(a, b, *arguments[6:])
            offsets, layout, dtype = arguments[6:]
            return grouped.by_expert(a, b, offsets, layout, dtype, multiply)

    def attention_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        operands, (scale, causal, dtype) = _operands(arguments[:9]), arguments[9:]
        return _attention(self.pick("attention")).attention(*operands, scale, causal, dtype)

    def attention_backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        operands, (log_sum, delta, scale, causal, format, dtype) = _operands(arguments[:12]), arguments[12:]
        twin = _attention(self.pick("attention_backward"))
        return twin.attention_backward(*operands, log_sum, delta, scale, causal, format_of(format), dtype)

    def store_(self, *arguments: Any) -> None:
        self.pick("store_").store_(_operand(*arguments[:4]), arguments[4].contiguous())

    def steps_(self, name: str, *arguments: Any) -> None:
        scalars, width = _STEPS[name], len(table.Flat._fields)
        rows, rest = table.unflatten(table.Flat(*arguments[:width])), arguments[width:]
        fields = len(scalars._fields)  # torch leaves out what follows them where it is the default
        getattr(self.pick(name), name)(rows, scalars(*rest[:fields]), *rest[fields:])


def _block(block: list[int]) -> Block:
    return block[0], block[1]


def _noise(noise: list[int] | None) -> Noise | None:
    return None if noise is None else Noise(*noise)


def _operand(payload: Tensor, scale_inv: Tensor, block: list[int], noise: list[int] | None = None) -> Operand:
    return Operand(payload, scale_inv, _block(block), _noise(noise))


def _operands(arguments: tuple[Any, ...]) -> list[Operand]:
    return [_operand(*arguments[i : i + 3]) for i in range(0, len(arguments), 3)]


def _attention(twin: Any) -> Any:
    return twin if hasattr(twin, "attention_backward") else attention_reference


# --- shapes, for torch.compile and FakeTensor -----------------------------------------------------------------------


def _empty_payload(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _empty_grid(x: Tensor, block: list[int]) -> Tensor:
    return torch.empty(grid_shape(x.shape, _block(block)), dtype=torch.float32, device=x.device)


def _empty_both(x: Tensor, dtype: torch.dtype, block: list[int], margin: int, power_of_two: bool) -> tuple[Tensor, ...]:
    crossed = torch.empty(x.t().shape, dtype=x.dtype, device=x.device)
    return _empty_payload(x, dtype), _empty_grid(x, block), _empty_payload(crossed, dtype), _empty_grid(crossed, block)


def _empty_product(
    a: Tensor, a_scale_inv: Tensor, a_block: list[int], b: Tensor, b_scale_inv: Tensor, b_block: list[int],
    layout: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    left, right = reference.transposed(a, layout[0]), reference.transposed(b, layout[1])
    return torch.empty((left.shape[0], right.shape[1]), dtype=dtype, device=a.device)


_SHAPES: dict[str, Callable[..., Any]] = {
    "amax": _empty_grid,
    "scale_inv_from_amax": lambda amax, dtype, margin, power_of_two: torch.empty(
        amax.shape, dtype=torch.float32, device=amax.device
    ),
    "quantize": lambda x, scale_inv, dtype, block, noise: _empty_payload(x, dtype),
    "quantize_amax": lambda x, scale_inv, dtype, block: (_empty_payload(x, dtype), _empty_grid(x, block)),
    "quantize_current": lambda x, dtype, block, margin, power_of_two: (
        _empty_payload(x, dtype),
        _empty_grid(x, block),
        _empty_grid(x, block),
    ),
    "quantize_both": _empty_both,
    "dequantize": lambda payload, scale_inv, block, dtype: _empty_payload(payload, dtype),
    "scaled_matmul": _empty_product,
    "grouped_matmul": lambda a, a_scale_inv, a_block, b, *rest: grouped.empty_product(a, b, *rest[2:]),
    "attention_forward": lambda query, *rest: (
        torch.empty(query.shape, dtype=rest[-1], device=query.device),
        torch.empty(query.shape[:3], dtype=torch.float32, device=query.device),
    ),
    "attention_backward": lambda *arguments: tuple(
        torch.empty(arguments[i].shape, dtype=arguments[-1], device=arguments[i].device) for i in (0, 3, 6)
    ),
    "store_": lambda *arguments: None,
    **dict.fromkeys(_STEPS, lambda *arguments: None),
}

for _name, _shape in _SHAPES.items():
    for _key, _pick in (("CPU", _on_cpu), ("CUDA", _on_cuda), ("CompositeExplicitAutograd", _elsewhere)):
        _device = _Device(_pick)
        _implementation = functools.partial(_device.steps_, _name) if _name in _STEPS else getattr(_device, _name)
        _LIBRARY.impl(_name, _implementation, _key)
    torch.library.register_fake(f"msamp_like::{_name}", _shape, lib=_LIBRARY)
