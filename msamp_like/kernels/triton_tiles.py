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
from msamp_like.kernels.reference import Noise

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
def random_bits(
    blocks, start, rows, columns, block_rows, block_columns, seed, tensor, step, role,
    SHARED: tl.constexpr, PADDED: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """16 bits an element of the tile that starts at element ``start``, int32: ``reference.random_bits`` at its offsets.

    SHARED: eight elements lie side by side wherever a block is cut, so one Philox counter serves eight, as it is meant
    to; otherwise each element computes its own counter, eight times the arithmetic for the same bits.
    """
    if SHARED:
        elements = start + tl.arange(0, ELEMENTS // 8) * 8
        offsets, _ = block_offsets(blocks, elements, rows, columns, block_rows, block_columns, PADDED)
        word0, word1, word2, word3 = _philox(offsets, seed, tensor, step, role)
        # Element i takes half i % 2 of word i % 8 // 2; interleaving splits on the low bit of i last.
        low = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3)) & 0xFFFF
        high = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3)) >> 16
        bits = tl.interleave(low, high)
    else:
        elements = start + tl.arange(0, ELEMENTS)
        offsets, _ = block_offsets(blocks, elements, rows, columns, block_rows, block_columns, PADDED)
        word0, word1, word2, word3 = _philox(offsets, seed, tensor, step, role)
        part = (offsets % 8).to(tl.int32)
        word = tl.where(part < 4, tl.where(part < 2, word0, word1), tl.where(part < 6, word2, word3))
        bits = tl.where(part % 2 == 0, word & 0xFFFF, word >> 16)
    return bits.to(tl.int32)


@triton.jit
def _philox(offsets, seed, tensor, step, role):
    """Four words of counter (offset // 8, step, role, 0) under key (seed, tensor), ten rounds."""
    counter = (offsets // 8).to(tl.uint32)
    zero = counter * 0
    step = zero + step.to(tl.uint32, bitcast=True)
    role = zero + role.to(tl.uint32, bitcast=True)
    key0 = zero + seed.to(tl.uint32, bitcast=True)
    key1 = zero + tensor.to(tl.uint32, bitcast=True)
    return tl.philox_impl(counter, step, role, zero, key0, key1)


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

    @property
    def shared(self) -> bool:
        """Whether eight elements that share a Philox counter always lie in one block, side by side."""
        rows, columns, _, block_columns = self.matrix
        return block_columns % 8 == 0 and (rows == 1 or columns % 8 == 0)

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


def words(noise: Noise | None) -> tuple[int, int, int, int]:
    """The four words of ``noise`` as signed 32-bit integers, so that a kernel compiles for one argument type."""
    values = [value & 0xFFFFFFFF for value in noise or (0, 0, 0, 0)]
    seed, tensor, step, role = (value - (1 << 32) if value >= 1 << 31 else value for value in values)
    return seed, tensor, step, role
