"""How the Triton twins walk a tensor, and how they are launched.

Every kernel sees a matrix of (rows, columns) in blocks of (block_rows, block_columns), ragged at the edges. A program
takes GROUP blocks, and ELEMENTS of each at a time, as one (GROUP, ELEMENTS) tile, TILES times. PADDED is block_columns
rounded up to a power of two.
"""

# The compiler reads these sources: annotations stay objects, and a kernel argument has none.
# mypy: allow-untyped-defs, allow-incomplete-defs
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from msamp_like.formats import Block, block_extent, grid_shape, matrix_shape
from msamp_like.kernels.reference import Noise, noise_keys

TILE_ELEMENTS = 4096
"""Elements a program holds at a time, unless one block is larger."""

MAX_TILE_ELEMENTS = 16384
"""A (128, 128) block still fits and is read once."""

_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


# --- on the device ----------------------------------------------------------------------------------------------------


@triton.jit
def block_offsets(blocks, elements, rows, columns, block_rows, block_columns, PADDED: tl.constexpr):
    """Offsets of ``elements`` of each of ``blocks``, and which of them exist; both of shape (GROUP, ELEMENTS).

    Offsets are int64: a tensor of more than 2^31 elements is a normal embedding table.
    """
    grid_columns = tl.cdiv(columns, block_columns)
    row = elements // PADDED
    column = elements % PADDED
    first_row = (blocks // grid_columns).to(tl.int64) * block_rows
    first_column = (blocks % grid_columns).to(tl.int64) * block_columns
    corner = first_row * columns + first_column
    offsets = corner[:, None] + (row.to(tl.int64) * columns + column)[None, :]
    inside = (row < block_rows)[None, :] & (column < block_columns)[None, :]
    inside = inside & (first_row[:, None] + row[None, :] < rows)
    return offsets, inside & (first_column[:, None] + column[None, :] < columns)


@triton.jit
def num_blocks(rows, columns, block_rows, block_columns):
    """Blocks of the matrix, ragged ones included."""
    return tl.cdiv(rows, block_rows) * tl.cdiv(columns, block_columns)


@triton.jit
def random_bits(offsets, key0, key1, LOWER_HALF: tl.constexpr):
    """16 bits an element, int32: ``reference.random_bits`` at ``offsets``."""
    word = offsets.to(tl.uint32) * 0x9E3779B9 + key0.to(tl.uint32, bitcast=True)
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15) ^ key1.to(tl.uint32, bitcast=True)) * 0x846CA68B
    word = word ^ (word >> 16)
    return ((word & 0xFFFF) if LOWER_HALF else (word >> 16)).to(tl.int32)


# --- on the host ------------------------------------------------------------------------------------------------------


class Tiling(NamedTuple):
    """How a kernel walks one tensor; the module docstring defines the words."""

    matrix: tuple[int, int, int, int]  # rows, columns, block_rows, block_columns
    padded: int
    elements: int
    group: int
    single: bool  # one scale for the whole tensor

    @property
    def num_programs(self) -> int:
        rows, columns, block_rows, block_columns = self.matrix
        return triton.cdiv(triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns), self.group)

    @property
    def num_tiles(self) -> int:
        return triton.cdiv(self.matrix[2] * self.padded, self.elements)

    def options(self) -> dict[str, Any]:
        """Constants and launch options; contraction to a fused multiply-add would change last bits."""
        num_warps = min(16, max(4, self.group * self.elements // 1024))
        constants = {"PADDED": self.padded, "ELEMENTS": self.elements, "GROUP": self.group, "TILES": self.num_tiles}
        return {**constants, "num_warps": num_warps, "enable_fp_fusion": False}


def tile(shape: torch.Size | tuple[int, ...], block: Block) -> Tiling:
    """The tiling of a tensor of this shape, in blocks of this shape.

    One scale for the whole tensor: the tensor is one long row, cut where it suits. Blocks of one row that divide the
    columns: likewise, and consecutive blocks are consecutive in memory.
    """
    rows, columns = matrix_shape(shape)
    block_rows, block_columns = block_extent(shape, block)
    single = grid_shape(shape, block) == (1, 1)
    if single:
        rows, columns, block_rows, block_columns = 1, rows * columns, 1, TILE_ELEMENTS
    elif block_rows == 1 and columns % block_columns == 0:
        rows, columns = 1, rows * columns
    padded = triton.next_power_of_2(block_columns)
    if block_rows * padded >= 1 << 31:  # places in a block are 32-bit numbers
        raise ValueError(f"a block holds fewer than 2^31 elements, got {block} of shape {tuple(shape)}; cut it smaller")
    elements = min(triton.next_power_of_2(block_rows * padded), MAX_TILE_ELEMENTS)
    group = max(1, TILE_ELEMENTS // elements)
    return Tiling((rows, columns, block_rows, block_columns), padded, elements, group, single)


def launch(kernel: Any, like: Tensor, num_programs: int, *arguments: Any, **options: Any) -> None:
    """``kernel`` on the device of ``like``, which need not be the current one."""
    with torch.cuda.device_of(like):
        kernel[(num_programs,)](*arguments, **options)


def raw(stored: Tensor) -> Tensor:
    """The bits of a stored tensor, as integers of its width."""
    return stored.view(_RAW[stored.element_size()])


def keys(noise: Noise | None) -> tuple[int, int]:
    """The keys of a stream as signed 32-bit integers, so that a kernel compiles for one argument type."""
    found = (0, 0) if noise is None else noise_keys(noise)
    first, second = (key - (1 << 32) if key >= 1 << 31 else key for key in found)
    return first, second
