"""The CPU twin of :mod:`.reference_updates`: all rows of a table in one call of the library.

Rows are packed as cpu_types.h declares them; threads share out chunks of all rows. A row whose operands have one scale
each, or one for each run of the same length of at most 2048 elements, is read and written once; an FP16 or 8-bit
operand with one scale for all costs a second pass, for its scale must be known before it is written. Any other row is
the reference's, bit for bit the same.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msamp_like.formats import block_extent, format_of, matrix_shape
from msamp_like.kernels import reference_updates
from msamp_like.kernels.cpu import TYPES, checked_scales, native, threads
from msamp_like.kernels.reference import Operand, noise_keys
from msamp_like.kernels.reference_updates import (
    AdamScalars,
    LionScalars,
    Row,
    SgdScalars,
    bounds,
    corrected,
    is_bad,
    largest_ratio,
)

_TILE = 2048  # the longest run that a step holds in the cache
_BLOCK = 128  # what operands without blocks are cut into
_STORED = "QQ3I3ifI"
_ROW = struct.Struct("@" + _STORED * 5 + "QQ3q5fi")
_ADAM, _LION, _SGD = struct.Struct("@6fi"), struct.Struct("@6f"), struct.Struct("@4fi")
_NOTHING = (0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0)
_NO_STATE = (0, 0, 0, 0, 0, 0, 0, 1, 0.0, 0)  # per_tile: no scale to look for


def adam_steps_(rows: Sequence[Row], scalars: AdamScalars, bad: Tensor | None = None) -> None:
    """See :func:`.reference_updates.adam_steps_`; one pass over the bytes of all rows, bit-equal."""
    if is_bad(bad):
        return
    s = scalars
    coefficients = _ADAM.pack(
        1 - s.lr * s.weight_decay, s.weight_decay, s.beta1, 1 - s.beta1, s.beta2, 1 - s.beta2, s.decoupled
    )

    def of_step(step: int) -> tuple[float, ...]:
        ratio = largest_ratio(s, step)
        return *corrected(s, step), ratio, *bounds(s, step, ratio)

    definition = functools.partial(reference_updates.adam_steps_, scalars=s)
    _steps_(rows, native().adam, coefficients, definition, of_step)


def lion_steps_(rows: Sequence[Row], scalars: LionScalars, bad: Tensor | None = None) -> None:
    """See :func:`.reference_updates.lion_steps_`; bit-equal. A master in two parts costs a second pass."""
    if is_bad(bad):
        return
    s = scalars
    coefficients = _LION.pack(1 - s.lr * s.weight_decay, s.beta1, 1 - s.beta1, s.beta2, 1 - s.beta2, s.lr)
    _steps_(rows, native().lion, coefficients, functools.partial(reference_updates.lion_steps_, scalars=s))


def sgd_steps_(rows: Sequence[Row], scalars: SgdScalars, bad: Tensor | None = None) -> None:
    """See :func:`.reference_updates.sgd_steps_`; bit-equal. A master in two parts costs a second pass."""
    if is_bad(bad):
        return
    s = scalars
    coefficients = _SGD.pack(s.weight_decay, s.momentum, 1 - s.dampening, s.lr, s.nesterov)
    _steps_(rows, native().sgd, coefficients, functools.partial(reference_updates.sgd_steps_, scalars=s))


def _no_bound(step: int) -> tuple[float, ...]:
    return (0.0,) * 5


def _steps_(
    rows: Sequence[Row],
    step: Callable[..., None],
    coefficients: bytes,
    definition: Callable[[list[Row]], None],
    of_step: Callable[[int], tuple[float, ...]] = _no_bound,
) -> None:
    """``step``, a function of the library, on all rows that it takes, ``definition`` on the others."""
    kept = []  # what a packed row points into lives until the call returns
    packed = bytearray()
    for row in rows:
        row = row._replace(grad=_contiguous(row.grad))
        tile = _common_tile(row)
        if tile is None:
            definition([row])
        else:
            kept.append(row)
            packed += _packed(row, tile, of_step(row.step))
    if kept:
        table = torch.frombuffer(packed, dtype=torch.uint8)
        step(table.data_ptr(), len(kept), coefficients, native().simd, threads())


def _contiguous(operand: Operand) -> Operand:
    return operand._replace(payload=operand.payload.contiguous(), scale_inv=operand.scale_inv.contiguous())


def _packed(row: Row, tile: int, of_step: tuple[float, ...]) -> bytes:
    operands = (row.param, *row.states, row.grad)
    # With one scale each the rows mean nothing, and one long row makes full tiles.
    cut = any(operand.scale_inv.numel() > 1 for operand in operands)
    rows, columns = matrix_shape(row.param.payload.shape) if cut else (1, row.param.payload.numel())
    if columns % tile == 0:
        rows, columns = 1, rows * columns
    stored = [_stored(row.param), *(_stored(state) for state in row.states)]
    stored += [_NO_STATE] * (3 - len(stored))
    stored += [_stored(row.grad), _NOTHING if row.copy is None else _stored(row.copy)]
    residual = (0, 0) if row.residual is None else (row.residual.payload.data_ptr(), row.residual.amax.data_ptr())
    numbers = (number for operand in stored for number in operand)
    return _ROW.pack(*numbers, *residual, rows, columns, tile, *of_step, row.step)


def _stored(operand: Operand) -> tuple[float, ...]:
    keys = (0, 0, 0, 0) if operand.noise is None else (*noise_keys(operand.noise), operand.noise.role & 2, 1)
    payload, scale_inv = operand.payload, operand.scale_inv
    return (payload.data_ptr(), scale_inv.data_ptr(), *keys, TYPES[payload.dtype], scale_inv.numel() > 1, 0.0, 0)


def _common_tile(row: Row) -> int | None:
    """Elements in the tiles of a row's step, or None where its operands' blocks have no tile in common."""
    written = (row.param, *row.states, *(() if row.copy is None else (row.copy,)))
    tensors = [tensor for operand in written for tensor in operand[:2]]
    tensors += [] if row.residual is None else list(row.residual)
    if row.param.payload.numel() == 0 or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    if any(operand.payload.dtype not in TYPES for operand in (*written, row.grad)):
        return None
    if row.copy is not None and (row.copy.noise is not None or row.copy.scale_inv.numel() > 1):
        return None
    if row.residual is not None and not _splits(row.param):
        return None
    tiles = set()
    for operand in (*written, row.grad):
        checked_scales(operand.scale_inv, operand.payload.shape, operand.block)
        if operand.scale_inv.numel() > 1:
            tiles.add(block_extent(operand.payload.shape, operand.block))
    if not tiles:
        return _BLOCK if row.param.payload.numel() % _BLOCK == 0 else _TILE
    (block_rows, tile), *others = tiles
    return tile if not others and block_rows == 1 and tile <= _TILE else None


def _splits(weight: Operand) -> bool:
    """Whether the library knows the residual of such a weight, whose noise is the upper half of a word."""
    upper = weight.noise is None or not weight.noise.role & 2
    return upper and weight.scale_inv.numel() == 1 and format_of(weight.payload.dtype).name == "e4m3"
