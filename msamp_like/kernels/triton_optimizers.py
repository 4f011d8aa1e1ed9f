"""Launches of the optimizers' fused steps: twins of ``reference_updates.adam_steps_`` and its kin.

Rows of a table that store alike are one launch of :mod:`.triton_steps`, two where something is known only when a whole
tensor has been read, three where it must be known before. A master in blocks of one row, (1, b) with b at most 4096,
states alike, a gradient of one scale or such blocks: that is every level. What else there is (blocks of several rows,
strides) is the reference's, which reads the flag ``bad`` on the host, and said once in the log; a copy with blocks is a
cast after the pass.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msamp_like.kernels import reference_updates
from msamp_like.kernels.fp8_units import fp8_units
from msamp_like.kernels.reference import Operand
from msamp_like.kernels.reference_updates import (
    AdamScalars,
    LionScalars,
    Row,
    SgdScalars,
    bounds,
    corrected,
    largest_ratio,
)
from msamp_like.kernels.triton_casts import dequantize, store_
from msamp_like.kernels.triton_steps import FOUND, settle_kernel, step_kernel
from msamp_like.kernels.triton_table import (
    CHOICE,
    Choice,
    Combination,
    Planned,
    addresses,
    numbers,
    plan,
    programs,
)
from msamp_like.kernels.triton_tiles import launch

logger = logging.getLogger(__name__)


class _Update(NamedTuple):
    """An update's name in the kernel, and what it multiplies by, the same for all rows."""

    kind: str  # "adam", "lion", "sgd" without momentum, "momentum" or "nesterov"
    decay: str  # "none", "decoupled" (of the weight) or "added" (to the gradient)
    keep: float
    weight_decay: float
    beta1: float
    rest1: float
    beta2: float = 0.0
    rest2: float = 0.0


def adam_steps_(rows: Sequence[Row], scalars: AdamScalars, bad: Tensor | None = None, choice: Choice = CHOICE) -> None:
    """``reference_updates.adam_steps_``; rows that the pass cannot take go to the reference itself."""
    s = scalars
    decay = "none" if s.weight_decay == 0 else "decoupled" if s.decoupled else "added"
    keep = 1 - s.lr * s.weight_decay
    update = _Update("adam", decay, keep, s.weight_decay, s.beta1, 1 - s.beta1, s.beta2, 1 - s.beta2)
    for row in _step_(rows, update, functools.partial(_adam_numbers, scalars), bad, choice):
        reference_updates.adam_steps_([row], scalars, bad)


def lion_steps_(rows: Sequence[Row], scalars: LionScalars, bad: Tensor | None = None, choice: Choice = CHOICE) -> None:
    """``reference_updates.lion_steps_``, likewise."""
    s = scalars
    keep = 1 - s.lr * s.weight_decay
    update = _Update("lion", "decoupled", keep, s.weight_decay, s.beta1, 1 - s.beta1, s.beta2, 1 - s.beta2)
    for row in _step_(rows, update, functools.partial(_rate_alone, s.lr), bad, choice):
        reference_updates.lion_steps_([row], scalars, bad)


def sgd_steps_(rows: Sequence[Row], scalars: SgdScalars, bad: Tensor | None = None, choice: Choice = CHOICE) -> None:
    """``reference_updates.sgd_steps_``, likewise."""
    s = scalars
    kind = "sgd" if s.momentum == 0 else "nesterov" if s.nesterov else "momentum"
    decay = "none" if s.weight_decay == 0 else "added"
    update = _Update(kind, decay, 1.0, s.weight_decay, s.momentum, 1 - s.dampening)
    for row in _step_(rows, update, functools.partial(_rate_alone, s.lr), bad, choice):
        reference_updates.sgd_steps_([row], scalars, bad)


@functools.lru_cache(maxsize=64)
def _adam_numbers(scalars: AdamScalars, step: int) -> tuple[float, ...]:
    """Rate, eps, ratio, growth and increase, in double as the reference has them; each is rounded to FP32 once."""
    ratio = largest_ratio(scalars, step)
    return (*corrected(scalars, step), ratio, *bounds(scalars, step, ratio))


def _rate_alone(rate: float, step: int) -> tuple[float, ...]:
    return rate, 0.0, 0.0, 0.0, 0.0


# --- rows -------------------------------------------------------------------------------------------------------------


def _planned(rows: Sequence[Row]) -> tuple[list[Planned], list[Row]]:
    """The rows that one pass takes, and the others; a gradient with strides is made contiguous."""
    planned: list[Planned] = []
    others = []
    for row in rows:
        if row.param.payload.numel() == 0:
            continue
        if not row.grad.payload.is_contiguous() or not row.grad.scale_inv.is_contiguous():
            row = row._replace(grad=_contiguous(row.grad))
        found = plan(row, len(planned))
        if isinstance(found, str):
            _name_fallback(found)
            others.append(row)
        else:
            planned.append(found)
    return planned, others


def _contiguous(operand: Operand) -> Operand:
    return operand._replace(payload=operand.payload.contiguous(), scale_inv=operand.scale_inv.contiguous())


@functools.cache
def _name_fallback(reason: str) -> None:
    logger.warning("fused step not used: %s; the step runs in plain torch", reason)


# --- launches ---------------------------------------------------------------------------------------------------------


def _step_(
    rows: Sequence[Row], update: _Update, numbers_of: Callable[[int], tuple[float, ...]], bad: Tensor | None,
    choice: Choice,
) -> list[Row]:  # fmt: skip
    """The launches of a table, those of one combination after those of another; returns the rows that none takes."""
    planned, others = _planned(rows)
    if not planned:
        return others
    device = planned[0].row.param.payload.device
    found = torch.zeros(len(planned), FOUND.value, dtype=torch.int32, device=device)
    changing = [numbers_of(row.row.step) for row in planned]
    tables = addresses(planned, device), numbers(planned, changing, device), found
    skip = torch.zeros(1, device=device) if bad is None else bad
    together: dict[Combination, list[Planned]] = {}
    for row in planned:
        together.setdefault(row.combination, []).append(row)
    for combination, members in together.items():
        _launch_step(combination, members, tables, update, skip, choice)
    for row in planned:
        if row.combination.COPY == "none" and row.row.copy is not None:
            _cast_copy(row.row.param, row.row.copy, bad)
    return others


def _launch_step(
    combination: Combination, rows: list[Planned], tables: tuple[Tensor, Tensor, Tensor], update: _Update,
    bad: Tensor, choice: Choice,
) -> None:  # fmt: skip
    device, group = tables[0].device, combination.group(choice)
    places, _, found = tables
    stored = {**combination._asdict(), "UNITS": _knows_e4m3(device), "CONVERTS": choice.converts}
    chunks = programs(rows, group * choice.tiles, device)
    for measures in (True, False) if combination.measured(update.kind) else (False,):
        launch(
            step_kernel, found, len(chunks), *tables, chunks, bad, *update[2:],
            KIND=update.kind, DECAY=update.decay, MEASURES=measures, **stored,
            **combination.options(choice, choice.tiles),
        )  # fmt: skip
    if combination.settled():
        chunks = programs(rows, group * choice.settle_tiles, device)
        kept = {name: value for name, value in stored.items() if name in settle_kernel.arg_names}
        options = combination.options(choice, choice.settle_tiles)
        launch(settle_kernel, found, len(chunks), places, found, chunks, bad, **kept, **options)


def _knows_e4m3(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and fp8_units(device).triton


def _cast_copy(param: Operand, copy: Operand, bad: Tensor | None) -> None:
    """A copy that the pass does not write, from what is now stored; where a step is ``bad``, what it was."""
    value = dequantize(*param[:3], torch.float32)
    if bad is None:
        store_(copy, value)
        return
    new = copy._replace(payload=torch.empty_like(copy.payload), scale_inv=torch.empty_like(copy.scale_inv))
    store_(new, value)
    for old, tensor in zip(copy[:2], new[:2], strict=True):
        old.copy_(torch.where(bad != 0, old, tensor))
