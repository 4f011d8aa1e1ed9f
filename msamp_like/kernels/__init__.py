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

from msamp_like.formats import Block, Format, format_of, grid_shape
from msamp_like.kernels import cpu, cpu_updates, reference, reference_updates, table
from msamp_like.kernels.reference import Noise, Operand
from msamp_like.kernels.reference_updates import (
    AdamScalars,
    Residual,
    Row,
    adam_update,
    dequantize_with_residual,
    quantize_with_residual,
)

__all__ = [
    "AdamScalars",
    "Noise",
    "Operand",
    "Residual",
    "Row",
    "adam_steps_",
    "adam_update",
    "amax",
    "dequantize",
    "dequantize_with_residual",
    "quantize",
    "quantize_amax",
    "quantize_current",
    "quantize_with_residual",
    "scale_inv_from_amax",
    "scaled_matmul",
    "store_",
]

_SCHEMAS = (
    "amax(Tensor x, int[2] block) -> Tensor",
    "scale_inv_from_amax(Tensor amax, ScalarType dtype, int margin, bool power_of_two) -> Tensor",
    "quantize(Tensor x, Tensor scale_inv, ScalarType dtype, int[2] block, SymInt[]? noise) -> Tensor",
    "quantize_amax(Tensor x, Tensor scale_inv, ScalarType dtype, int[2] block) -> (Tensor, Tensor)",
    "quantize_current(Tensor x, ScalarType dtype, int[2] block, int margin, bool power_of_two)"
    " -> (Tensor, Tensor, Tensor)",
    "dequantize(Tensor payload, Tensor scale_inv, int[2] block, ScalarType dtype) -> Tensor",
    "scaled_matmul(Tensor a, Tensor a_scale_inv, int[2] a_block, Tensor b, Tensor b_scale_inv, int[2] b_block,"
    " str layout, ScalarType dtype) -> Tensor",
    "store_(Tensor(a!) target, Tensor(b!) target_scale_inv, int[2] target_block, SymInt[]? target_noise,"
    " Tensor value) -> ()",
    f"adam_steps_({table.SCHEMA}, float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled)"
    " -> ()",
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


def dequantize(payload: Tensor, scale_inv: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """See :func:`.reference.dequantize`."""
    return _OPS.dequantize.default(payload, scale_inv, block, dtype)


def scaled_matmul(a: Operand, b: Operand, layout: str, dtype: torch.dtype) -> Tensor:
    """See :func:`.reference.scaled_matmul`; the order of the sum is the device's, so the last bits may differ."""
    return _OPS.scaled_matmul.default(*a[:3], *b[:3], layout, dtype)


def store_(target: Operand, value: Tensor) -> None:
    """See :func:`.reference.store_`."""
    _OPS.store_.default(*target, value)


def adam_steps_(rows: Sequence[Row], scalars: AdamScalars) -> None:
    """See :func:`.reference_updates.adam_steps_`; all rows lie on one device and have as many states."""
    _OPS.adam_steps_.default(*table.flatten(rows), *scalars)


# --- which twin -----------------------------------------------------------------------------------------------------


def _elsewhere(name: str) -> ModuleType:
    return reference_updates if name == "adam_steps_" else reference


@functools.cache
def _on_cpu(name: str) -> ModuleType:
    if not cpu.available():
        return _elsewhere(name)
    return cpu_updates if name == "adam_steps_" else cpu


@functools.cache
def _on_cuda(name: str) -> ModuleType:
    """The file that holds a function's CUDA twin, imported when the first CUDA tensor arrives."""
    file = {"adam_steps_": "triton_adam", "scaled_matmul": "cuda"}.get(name, "triton_casts")
    if importlib.util.find_spec("triton") is None:
        return _elsewhere(name)
    twin = importlib.import_module(f"msamp_like.kernels.{file}")
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

    def dequantize(self, payload: Tensor, scale_inv: Tensor, block: list[int], dtype: torch.dtype) -> Tensor:
        return self.pick("dequantize").dequantize(payload.contiguous(), scale_inv, _block(block), dtype)

    def scaled_matmul(self, *arguments: Any) -> Tensor:
        a, b = _operand(*arguments[:3]), _operand(*arguments[3:6])
        with torch.autocast(a.payload.device.type, enabled=False):  # which would take the product in FP16 and overflow
            return self.pick("scaled_matmul").scaled_matmul(a, b, *arguments[6:])

    def store_(self, *arguments: Any) -> None:
        self.pick("store_").store_(_operand(*arguments[:4]), arguments[4].contiguous())

    def adam_steps_(self, *arguments: Any) -> None:
        width = len(table.Flat._fields)
        rows = table.unflatten(table.Flat(*arguments[:width]))
        self.pick("adam_steps_").adam_steps_(rows, AdamScalars(*arguments[width:]))


def _block(block: list[int]) -> Block:
    return block[0], block[1]


def _noise(noise: list[int] | None) -> Noise | None:
    return None if noise is None else Noise(*noise)


def _operand(payload: Tensor, scale_inv: Tensor, block: list[int], noise: list[int] | None = None) -> Operand:
    return Operand(payload, scale_inv, _block(block), _noise(noise))


# --- shapes, for torch.compile and FakeTensor -----------------------------------------------------------------------


def _empty_payload(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _empty_grid(x: Tensor, block: list[int]) -> Tensor:
    return torch.empty(grid_shape(x.shape, _block(block)), dtype=torch.float32, device=x.device)


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
    "dequantize": lambda payload, scale_inv, block, dtype: _empty_payload(payload, dtype),
    "scaled_matmul": _empty_product,
    "store_": lambda *arguments: None,
    "adam_steps_": lambda *arguments: None,
}

for _name, _shape in _SHAPES.items():
    for _key, _pick in (("CPU", _on_cpu), ("CUDA", _on_cuda), ("CompositeExplicitAutograd", _elsewhere)):
        _LIBRARY.impl(_name, getattr(_Device(_pick), _name), _key)
    torch.library.register_fake(f"msamp_like::{_name}", _shape, lib=_LIBRARY)
