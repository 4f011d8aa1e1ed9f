"""A table of rows as the arguments of an op, whose schema knows lists of tensors and of integers, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from msamp_like.formats import Block
from msamp_like.kernels.reference import Noise, Operand
from msamp_like.kernels.reference_updates import Residual, Row

SCHEMA = (
    "Tensor(a!)[] params, Tensor(b!)[] param_scales, Tensor[] grads, Tensor[] grad_scales,"
    " Tensor(c!)[] states, Tensor(d!)[] state_scales, Tensor(e!)[] copies, Tensor(f!)[] copy_scales,"
    " Tensor(g!)[] residuals, Tensor(h!)[] residual_amaxes, SymInt[] layout"
)
"""The arguments of an op that takes a table: what :class:`Flat` holds."""


def schema(name: str, scalars: type[tuple[Any, ...]]) -> str:
    """Of the op that steps a table: its tensors, the fields of ``scalars``, and whether it is to write at all."""
    fields = ", ".join(f"{kind.__name__} {field}" for field, kind in get_type_hints(scalars).items())
    return f"{name}({SCHEMA}, {fields}, Tensor? bad=None) -> ()"


class Flat(NamedTuple):
    """A table without its structure. ``states`` has those of the first row, then those of the second, and so on;
    ``layout`` has a row's numbers in the order in which :func:`_numbers` gives them."""

    params: list[Tensor]
    param_scales: list[Tensor]
    grads: list[Tensor]
    grad_scales: list[Tensor]
    states: list[Tensor]
    state_scales: list[Tensor]
    copies: list[Tensor]
    copy_scales: list[Tensor]
    residuals: list[Tensor]
    residual_amaxes: list[Tensor]
    layout: list[int]


def flatten(rows: Sequence[Row]) -> Flat:
    """The tensors and the numbers of a table."""
    flat = Flat(*([] for _ in Flat._fields))  # type: ignore[arg-type]
    for row in rows:
        flat.params.append(row.param.payload)
        flat.param_scales.append(row.param.scale_inv)
        flat.grads.append(row.grad.payload)
        flat.grad_scales.append(row.grad.scale_inv)
        flat.states.extend(state.payload for state in row.states)
        flat.state_scales.extend(state.scale_inv for state in row.states)
        if row.copy is not None:
            flat.copies.append(row.copy.payload)
            flat.copy_scales.append(row.copy.scale_inv)
        if row.residual is not None:
            flat.residuals.append(row.residual.payload)
            flat.residual_amaxes.append(row.residual.amax)
        flat.layout.extend(_numbers(row))
    return flat


def _numbers(row: Row) -> Iterator[int]:
    yield row.step
    yield from _of(row.param)
    yield from row.grad.block
    for state in row.states:
        yield from _of(state)
    yield row.residual is not None
    yield row.copy is not None
    if row.copy is not None:
        yield from row.copy.block


def _of(operand: Operand) -> Iterator[int]:
    yield from operand.block
    yield operand.noise is not None
    if operand.noise is not None:
        yield from operand.noise


def unflatten(flat: Flat) -> list[Row]:
    """The rows that :func:`flatten` was given."""
    numbers = iter(flat.layout)
    states = zip(flat.states, flat.state_scales, strict=True)
    copies = zip(flat.copies, flat.copy_scales, strict=True)
    residuals = zip(flat.residuals, flat.residual_amaxes, strict=True)
    width = len(flat.states) // max(1, len(flat.params))
    rows = []
    for param, param_scales, grad, grad_scales in zip(*flat[:4], strict=True):
        step = next(numbers)
        master = _operand(param, param_scales, numbers)
        gradient = Operand(grad, grad_scales, _block(numbers))
        kept = tuple(_operand(*next(states), numbers) for _ in range(width))
        residual = Residual(*next(residuals)) if next(numbers) else None
        copy = Operand(*next(copies), _block(numbers)) if next(numbers) else None
        rows.append(Row(master, gradient, kept, step, copy, residual))
    return rows


def _operand(payload: Tensor, scale_inv: Tensor, numbers: Iterator[int]) -> Operand:
    block = _block(numbers)
    noise = Noise(*(next(numbers) for _ in range(4))) if next(numbers) else None
    return Operand(payload, scale_inv, block, noise)


def _block(numbers: Iterator[int]) -> Block:
    return next(numbers), next(numbers)
