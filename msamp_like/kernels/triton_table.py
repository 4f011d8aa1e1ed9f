"""Rows of an optimizer's table as a device reads them: which of them one launch takes, their addresses and numbers.

Three tables, each uploaded from pinned memory behind what the stream already does, none ever read back:

    programs    row and chunk of each program         by the rows' sizes alone
    addresses   where a row's tensors lie, its shape  kept as long as the addresses stay the same
    numbers     keys of the noise, rate, step         every step, 48 bytes a row

What is kept is a function of its arguments: the same numbers, device and stream give the table that is there.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from msamp_like.formats import Block, block_extent, format_of, matrix_shape
from msamp_like.kernels.reference import Operand
from msamp_like.kernels.reference_updates import Row
from msamp_like.kernels.triton_tiles import keys

MAX_BLOCK = 4096
"""A block is read, updated and written by one program, which holds a few FP32 values an element."""

_FLAT_BLOCK = 128
"""Elements cut off together where no operand has blocks."""

_ALIGNMENT = 16
"""Bytes that one thread loads at once."""

_ADDRESSES = struct.Struct("@16q")
_NUMBERS = struct.Struct("@6i5fi")


class Choice(NamedTuple):
    """How a launch is cut: the one place to tune, all of it unmeasured. Nothing here changes a bit.

    Sixteen elements a thread are 16 bytes of an 8-bit operand, so a tile of 2048 fills 4 warps. A program's tiles share
    one look into the tables; the launch that settles does next to nothing in most, so that it takes more of them.
    """

    elements: int = 2048  # of a tile, if one block is not larger
    tiles: int = 8
    settle_tiles: int = 32
    warps: int = 4
    converts: bool = False  # round to E4M3 by the device's instruction; to be compared with the reference there first


CHOICE = Choice()


class Combination(NamedTuple):
    """What a launch is compiled for: rows that agree in it are one launch. A mode is "blocks", "whole" (one scale for a
    format that needs one) or "none"."""

    PARAM: str
    PARAM_MODE: str
    PARAM_NOISY: bool
    PARAM_LOWER_HALF: bool
    FIRST: str
    FIRST_MODE: str
    FIRST_NOISY: bool
    FIRST_LOWER_HALF: bool
    SECOND: str
    SECOND_MODE: str
    SECOND_NOISY: bool
    SECOND_LOWER_HALF: bool
    GRAD: str
    GRAD_MODE: str
    COPY: str
    SPLIT: bool
    SHARED: bool  # the second moment's noise is the other half of the parameter's words
    EVEN: bool  # full blocks one behind the other, addresses that are multiples of 16
    BLOCK: int

    def measured(self, kind: str) -> bool:
        """Whether a scale has to be known before anything is written; of a master in two parts Adam has a bound."""
        whole = "whole" in (self.PARAM_MODE, self.FIRST_MODE, self.SECOND_MODE)
        return whole or (self.SPLIT and kind != "adam")

    def settled(self) -> bool:
        """Whether something is known only when all of a tensor has been read."""
        states = (self.FIRST_MODE,) if self.SECOND == "none" else (self.FIRST_MODE, self.SECOND_MODE)
        return {self.PARAM_MODE, *states} != {"blocks"} or self.COPY != "none" or self.SPLIT

    def options(self, choice: Choice, tiles: int) -> dict[str, Any]:
        """Launch options; contraction to a fused multiply-add would change last bits."""
        return {"GROUP": self.group(choice), "TILES": tiles, "num_warps": choice.warps, "enable_fp_fusion": False}

    def group(self, choice: Choice) -> int:
        """Blocks of a tile; of ragged ones few, for their places need registers."""
        return max(1, choice.elements // (self.BLOCK if self.EVEN else 4 * self.BLOCK))


class Geometry(NamedTuple):
    """A row's tensors as a matrix in blocks of one row."""

    num_blocks: int
    rows: int
    columns: int
    block_columns: int


class _Stored(NamedTuple):
    """What of an operand decides which kernel takes it."""

    dtype: torch.dtype
    block: Block
    num_scales: int
    half: int  # of its noise's words, 2 for the lower; -1 without noise


class Planned(NamedTuple):
    """A row that one pass takes, among those of its table."""

    place: int
    row: Row
    combination: Combination
    geometry: Geometry
    pointers: tuple[int, ...]


def plan(row: Row, place: int = 0) -> Planned | str:
    """How a pass takes a row, or why none does. A copy that it does not write is left out of the combination: one with
    blocks, with noise, or of the upper half of a master."""
    states = row.states
    operands = (row.param, states[0], states[-1], row.grad)
    copy = row.copy if row.copy is not None and _takes(row.copy) and row.residual is None else None
    # what a kernel is compiled without, it never reads
    listed = (*operands, copy or row.param, row.residual or row.param)
    tensors = [tensor for operand in listed for tensor in operand[:2]]
    if not all(tensor.is_contiguous() for tensor in tensors):
        return "a payload or its scales are not contiguous"
    pointers = tuple(tensor.data_ptr() for tensor in tensors)
    aligned = not any(pointer % _ALIGNMENT for pointer in pointers[::2])
    stored = tuple(_stored(operand) for operand in operands)
    copied = None if copy is None else copy.payload.dtype
    shape = row.param.payload.shape
    found = _plan(shape, stored, len(states), copied, row.residual is not None, _shares(row), aligned)
    return found if isinstance(found, str) else Planned(place, row, *found, pointers)


def _takes(copy: Operand) -> bool:
    """Whether a pass writes such a copy: one scale, rounded to nearest."""
    return copy.noise is None and copy.scale_inv.numel() == 1 and copy.payload.is_contiguous()


def _stored(operand: Operand) -> _Stored:
    half = -1 if operand.noise is None else operand.noise.role & 2
    return _Stored(operand.payload.dtype, operand.block, operand.scale_inv.numel(), half)


def _shares(row: Row) -> bool:
    """Whether parameter and second moment draw from one stream of words."""
    if len(row.states) < 2 or row.param.noise is None or row.states[1].noise is None:
        return False
    param, second = row.param.noise, row.states[1].noise
    return param[:3] == second[:3] and param.role & ~2 == second.role & ~2


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size,
    stored: tuple[_Stored, ...],
    num_states: int,
    copy: torch.dtype | None,
    split: bool,
    shared: bool,
    aligned: bool,
) -> tuple[Combination, Geometry] | str:
    extents = {_row_block(shape, operand.block) for operand in stored if operand.num_scales > 1}
    if None in extents or len(extents) > 1:
        blocks = ", ".join(str(operand.block) for operand in stored)
        return f"blocks must be one row of at most {MAX_BLOCK}, the same for all, got {blocks}"
    param, first, second, grad = stored
    if split and not (_name(param) == "e4m3" and param.num_scales == 1 and param.half != 2):
        return f"a master in two parts has an E4M3 weight of one scale, got {param.dtype}"
    rows, columns = matrix_shape(shape)
    block = extents.pop() if extents else None
    if block is None:
        rows, columns, block = 1, rows * columns, _FLAT_BLOCK
    elif columns % block == 0:
        rows, columns = 1, rows * columns
    padded = triton.next_power_of_2(block)
    even = aligned and rows == 1 and columns % padded == 0 and padded == block
    fields = {**_fields("PARAM", param), **_fields("FIRST", first)}
    fields |= _fields("SECOND", second if num_states == 2 else None)
    if split:
        fields["PARAM_MODE"] = "none"
    combination = Combination(
        **fields, GRAD=_name(grad), GRAD_MODE="blocks" if grad.num_scales > 1 else "none",
        COPY="none" if copy is None else format_of(copy).name, SPLIT=split, SHARED=shared, EVEN=even, BLOCK=padded,
    )  # fmt: skip
    return combination, Geometry(rows * triton.cdiv(columns, block), rows, columns, block)


def _fields(role: str, operand: _Stored | None) -> dict[str, Any]:
    """What a :class:`Combination` says of an operand, or of none."""
    name, mode = ("none", "none") if operand is None else (_name(operand), _mode(operand))
    noisy = operand is not None and operand.half >= 0 and name != "fp32"
    lower = operand is not None and operand.half == 2
    return {role: name, f"{role}_MODE": mode, f"{role}_NOISY": noisy, f"{role}_LOWER_HALF": lower}


def _name(operand: _Stored) -> str:
    return format_of(operand.dtype).name


def _mode(operand: _Stored) -> str:
    return "blocks" if operand.num_scales > 1 else "whole" if format_of(operand.dtype).scaled else "none"


def _row_block(shape: torch.Size, block: Block) -> int | None:
    """Columns of a block of one row that fits a program, as far as the tensor reaches; None for any other block."""
    rows, columns = matrix_shape(shape)
    block_rows, block_columns = block_extent(shape, block)
    block_columns = min(block_columns, columns)
    return block_columns if min(block_rows, rows) == 1 and block_columns <= MAX_BLOCK else None


# --- tables -----------------------------------------------------------------------------------------------------------


def addresses(rows: Sequence[Planned], device: torch.device) -> Tensor:
    """The table of addresses and shapes, int64, 16 a row."""
    packed = bytearray()
    for row in rows:
        packed += _ADDRESSES.pack(*row.pointers, *row.geometry)
    return _kept(bytes(packed), device, _stream(device))


def numbers(rows: Sequence[Planned], coefficients: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """The table of what changes each step, int32, 12 a row; ``coefficients`` are FP32 rate, eps, ratio, growth and
    increase of each row."""
    packed = bytearray()
    for (_, row, combination, *_), found in zip(rows, coefficients, strict=True):
        param, first = keys(row.param.noise), keys(row.states[0].noise)
        second = param if combination.SHARED else keys(row.states[-1].noise)
        packed += _NUMBERS.pack(*param, *first, *second, *found, row.step)
    return _uploaded(torch.frombuffer(packed, dtype=torch.int32), device)


def programs(rows: Sequence[Planned], blocks: int, device: torch.device) -> Tensor:
    """Row and chunk of each program, int32, (number of programs, 2); a chunk is ``blocks`` of one row."""
    sizes = tuple((row.place, triton.cdiv(row.geometry.num_blocks, blocks)) for row in rows)
    return _programs(sizes, device, _stream(device))


@functools.lru_cache(maxsize=64)  # gradients may move every step: few are worth keeping
def _kept(packed: bytes, device: torch.device, stream: int) -> Tensor:
    return _uploaded(torch.frombuffer(bytearray(packed), dtype=torch.int64), device)


@functools.lru_cache(maxsize=1024)
def _programs(sizes: tuple[tuple[int, int], ...], device: torch.device, stream: int) -> Tensor:
    places, counts = torch.tensor(sizes, dtype=torch.int32).unbind(1)
    ends = counts.cumsum(0)
    chunks = torch.arange(int(ends[-1])) - (ends - counts).repeat_interleave(counts)
    pairs = torch.stack((places.repeat_interleave(counts), chunks.int()), dim=1)
    return _uploaded(pairs.contiguous(), device)


def _stream(device: torch.device) -> int:
    """What is uploaded on a stream may be read there, and on no other without a wait."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _uploaded(table: Tensor, device: torch.device) -> Tensor:
    """The table on the device, without a wait; torch keeps the pinned memory until the copy is done.

    Raises RuntimeError where a CUDA graph is captured: its replay would step with these numbers again and again.
    """
    if device.type != "cuda":
        return table.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "an optimizer's step is uploaded anew each time, got one inside of the capture of a CUDA graph; "
            "capture forward and backward alone, and step outside"
        )
    return table.pin_memory().to(device, non_blocking=True)
