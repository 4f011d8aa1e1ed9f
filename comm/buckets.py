"""Buckets: which gradients travel together, and how they lie in one buffer.

A buffer of scaled tensors is a matrix of *lines*. All elements of a line share one scale, so one kernel call handles a
whole bucket, however many small tensors are in it:

    bucket (world, lines, width):   rank r owns bucket[r], its shard
    tensor, one scale:              its elements in order, the last line padded with zeros
    tensor, blocks (r, c):          row by row, each row padded to a multiple of the width c

The padding costs at most ``width - 1`` elements a tensor, or a row of a tensor with blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from msamp_like.formats import WHOLE, Block, Format, block_extent, grid_shape, matrix_shape
from msamp_like.tensor import ScalingTensor

LINE = 128
"""Elements of a line where the rule's block does not set it."""

K = TypeVar("K")


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one tensor lies: ``rows`` of ``columns`` elements, each row padded to whole lines."""

    shape: torch.Size
    rows: int
    columns: int
    first_line: int
    lines_per_row: int
    first_scale: int
    grid: tuple[int, int]
    padding: int  # elements at the end of each row

    @property
    def num_lines(self) -> int:
        return self.rows * self.lines_per_row

    @property
    def num_scales(self) -> int:
        return self.grid[0] * self.grid[1]

    def cut(self, part: Tensor) -> Tensor:
        """The tensor without its padding; a view where it has one row or no padding."""
        if self.padding:
            part = part.view(self.rows, self.columns + self.padding)[:, : self.columns]
        return part.reshape(self.shape)


class Layout:
    """The lines of tensors of the given shapes and one block, and which scale each line has.

    ``scale_index`` (lines,) is the scale of each line of this rank's shard, counted from the first scale that the shard
    needs; ``scale_ranges[r]`` says which scales of the bucket those are for rank r.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], block: Block, world: int, rank: int, device: torch.device | None = None
    ) -> None:
        self.world = world
        self.width = block[1] if block[1] > 0 else LINE
        self.slots: list[Slot] = []
        line = scale = 0
        for shape in shapes:
            slot = self._slot(shape, block, line, scale)
            self.slots.append(slot)
            line, scale = line + slot.num_lines, scale + slot.num_scales
        self.num_scales = scale
        self.lines = max(1, -(-line // world))
        self.tail = (world * self.lines - line) * self.width
        owners = torch.full((world * self.lines,), max(0, scale - 1))  # the last tensor's also past its end
        for slot in self.slots:
            owners[slot.first_line : slot.first_line + slot.num_lines] = _scales_of_lines(slot, block)
        shards = owners.view(world, self.lines)
        low, high = shards.amin(dim=1).tolist(), shards.amax(dim=1).tolist()
        self.scale_ranges: list[tuple[int, int]] = [(a, b + 1) for a, b in zip(low, high, strict=True)]
        self.own_scales = slice(*self.scale_ranges[rank])
        self.scale_index = (shards[rank] - low[rank]).to(device)

    def _slot(self, shape: torch.Size, block: Block, line: int, scale: int) -> Slot:
        rows, columns = (1, math.prod(shape)) if block == WHOLE else matrix_shape(shape)
        return Slot(
            shape=shape,
            rows=rows,
            columns=columns,
            first_line=line,
            lines_per_row=-(-columns // self.width),
            first_scale=scale,
            grid=grid_shape(shape, block),
            padding=-columns % self.width,
        )

    def pack(
        self, stored: Sequence[ScalingTensor | None], format: Format, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Payloads in their places, (world, lines, width), and all scales, (scales,); both 0 for None, and between."""
        parts: list[Tensor] = []
        scales: list[Tensor] = []
        for slot, tensor in zip(self.slots, stored, strict=True):
            if tensor is None:
                parts.append(torch.zeros(slot.num_lines * self.width * format.bytes, dtype=torch.uint8, device=device))
                scales.append(torch.zeros(slot.num_scales, device=device))
                continue
            code_bytes = tensor.payload.reshape(slot.rows, slot.columns).view(torch.uint8)
            if slot.padding:
                code_bytes = torch.nn.functional.pad(code_bytes, (0, slot.padding * format.bytes))
            parts.append(code_bytes.view(-1))
            scales.append(tensor.scale_inv.view(-1))
        parts.append(torch.zeros(self.tail * format.bytes, dtype=torch.uint8, device=device))
        return torch.cat(parts).view(format.dtype).view(self.world, self.lines, self.width), torch.cat(scales)

    def unpack(self, bucket: Tensor, scale_inv: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each tensor's payload and grid of scales: views, but for a payload whose rows are padded, which is copied."""
        *parts, _ = bucket.view(-1).split([*(slot.num_lines * self.width for slot in self.slots), self.tail])
        grids = scale_inv.split([slot.num_scales for slot in self.slots])
        return [
            (slot.cut(part), grid.view(slot.grid)) for slot, part, grid in zip(self.slots, parts, grids, strict=True)
        ]


def _scales_of_lines(slot: Slot, block: Block) -> Tensor:
    """The scale of every line of one tensor, counted from the bucket's first."""
    block_rows = slot.rows if block == WHOLE else block_extent(slot.shape, block)[0]
    rows = torch.arange(slot.rows) // max(1, block_rows) * slot.grid[1]
    columns = torch.arange(slot.lines_per_row) if block[1] > 0 else torch.zeros(slot.lines_per_row, dtype=torch.int64)
    return slot.first_scale + (rows[:, None] + columns[None, :]).view(-1)


def assign(sizes: Sequence[tuple[K, int]], bucket_bytes: int) -> list[list[int]]:
    """Which tensors, by position, share a bucket: neighbours of one kind, until a bucket would exceed ``bucket_bytes``.

    ``sizes`` holds (kind, bytes) in the order in which backward is expected to finish the tensors. Buckets come in the
    order in which they are expected to be complete: by their last tensor. A tensor larger than a bucket gets its own.
    """
    buckets: list[list[int]] = []
    open_buckets: dict[K, tuple[list[int], int]] = {}
    for position, (kind, size) in enumerate(sizes):
        members, filled = open_buckets.get(kind, ([], 0))
        if not members or filled + size > bucket_bytes:
            members, filled = [], 0
            buckets.append(members)
        members.append(position)
        open_buckets[kind] = members, filled + size
    return sorted(buckets, key=lambda members: members[-1])
