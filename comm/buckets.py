"""Buckets: which gradients travel together, and how they lie in one buffer.

A buffer of scaled tensors is a matrix of *lines*. All elements of a line share one scale, so one kernel call handles a
whole bucket, however many small tensors are in it:

    bucket (lines, width):    a range of lines for each rank, its shard: all as long, or whole tensors with their owners
    tensor, one scale:        its elements in order, the last line padded with zeros
    tensor, blocks (r, c):    row by row, each row padded to a multiple of the width c

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

BUCKET_BYTES = 8 << 20
"""As many FP8 gradients as fill torch DDP's default bucket of 25 MiB in FP32, about."""

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
    """The lines of tensors of the given shapes and one block, which rank has which, and which scale each line has.

    Without ``owners`` the lines are cut into equal shards, the last padded. With them tensor i lies wholly in the shard
    of rank ``owners[i]``; tensors then come in the order of their owners. ``line_splits[r]`` is the length of rank r's
    shard, ``scale_ranges[r]`` says which scales of the bucket it needs, and ``scale_index`` (lines of the own shard,)
    which of those each line has.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        block: Block,
        world: int,
        rank: int,
        device: torch.device | None = None,
        owners: Sequence[int] | None = None,
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
        self.line_splits = [max(1, -(-line // world))] * world if owners is None else self._owned(owners)
        self.tail = (sum(self.line_splits) - line) * self.width
        self.own_slots = [] if owners is None else [s for s, r in zip(self.slots, owners, strict=True) if r == rank]
        scale_of_line = torch.full((sum(self.line_splits),), max(0, scale - 1))  # the last tensor's also past its end
        for slot in self.slots:
            scale_of_line[slot.first_line : slot.first_line + slot.num_lines] = _scales_of_lines(slot, block)
        shards = scale_of_line.split(self.line_splits)
        self.scale_ranges = [(int(s.min()), int(s.max()) + 1) if len(s) else (0, 0) for s in shards]
        self.own_scales = slice(*self.scale_ranges[rank])
        self.scale_index = (shards[rank] - self.own_scales.start).to(device)

    def _owned(self, owners: Sequence[int]) -> list[int]:
        return [
            sum(slot.num_lines for slot, owner in zip(self.slots, owners, strict=True) if owner == rank)
            for rank in range(self.world)
        ]

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
        """Payloads in their places, (lines, width), and all scales, (scales,); both 0 for None, and between."""
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
        return torch.cat(parts).view(format.dtype).view(-1, self.width), torch.cat(scales)

    def unpack(self, bucket: Tensor, scale_inv: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each tensor's payload and grid of scales: views, but for a payload whose rows are padded, which is copied."""
        return self._cut(self.slots, bucket.view(-1)[: bucket.numel() - self.tail], scale_inv)

    def unpack_own(self, shard: Tensor, scale_inv: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The same of the tensors that this rank owns, from its shard and its scales."""
        return self._cut(self.own_slots, shard.view(-1), scale_inv)

    def _cut(self, slots: Sequence[Slot], elements: Tensor, scale_inv: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = elements.split([slot.num_lines * self.width for slot in slots])
        grids = scale_inv.split([slot.num_scales for slot in slots])
        return [(slot.cut(part), grid.view(slot.grid)) for slot, part, grid in zip(slots, parts, grids, strict=True)]


def _scales_of_lines(slot: Slot, block: Block) -> Tensor:
    """The scale of every line of one tensor, counted from the bucket's first."""
    block_rows = slot.rows if block == WHOLE else block_extent(slot.shape, block)[0]
    rows = torch.arange(slot.rows) // max(1, block_rows) * slot.grid[1]
    columns = torch.arange(slot.lines_per_row) if block[1] > 0 else torch.zeros(slot.lines_per_row, dtype=torch.int64)
    return slot.first_scale + (rows[:, None] + columns[None, :]).view(-1)


def default_bucket_bytes(world: int, model_bytes: int) -> int:
    """What a bucket of ``world`` ranks holds where nobody says otherwise; ``model_bytes`` is what travels in all."""
    # An eighth of the model, so that most of it leaves while backward goes on. But each rank's part is a message of its
    # own, and one below some 90 KB costs more time than its bytes take (docs/explanation/scale.md); and rings, of
    # world - 1 dependent steps, gain nothing from more than a megabyte a rank.
    least, most = max(1 << 18, world << 17), max(BUCKET_BYTES, world << 20)
    return min(max(model_bytes // 8, least), most)


def check_bucket_bytes(bucket_bytes: int | None) -> None:
    """Raise ValueError for a bucket that could hold nothing; None is the default."""
    if bucket_bytes is not None and bucket_bytes < 1:
        raise ValueError(
            f"bucket_bytes must be at least 1, got {bucket_bytes}; leave it out for the default, an eighth of the "
            f"model and at most {BUCKET_BYTES} up to 8 ranks"
        )


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
