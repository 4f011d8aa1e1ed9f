"""Two hops where one does not scale: first inside a node, then across nodes between GPUs of the same place.

In a flat all-to-all over N ranks a rank sends N - 1 messages, and a node of L ranks sends L times what a sum over its
ranks would need. Two remedies, for groups with several ranks a node (``docs/explanation/scale.md`` has the figures):

    TwoLevelGroup   forwards codes unchanged: L - 1 large messages inside, N / L - 1 across; the same bits as the flat
                    form and the same bytes across. Where it is used, everything else stays as it is.
    NodeSums        sums inside the node in FP32, rounds the partial sums once more as ``between`` says, and sends
                    those: 1 / L of the bytes across. In BF16 the rounding is far below E4M3's; in E4M3 it costs 3 dB.

Wang et al., "ZeRO++: Extremely Efficient Collective Communication for Giant Model Training", 2023,
https://arxiv.org/abs/2306.10209, do the second with integers. Left out: a gather in two hops, which NCCL does in rings.

[Note: places] Rank n * L + p is place p of node n. A bucket's parts lie in the order of ranks, a grid (nodes, places).
Sent inside by columns, place p gets column p of its node's ranks; sent across by rows, each part reaches its owner, and
what arrives there is in the order of ranks again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from msamp_like import kernels
from msamp_like.comm.buckets import Layout
from msamp_like.comm.collectives import Steps
from msamp_like.comm.group import CountedGroup, Entry, Pending
from msamp_like.formats import BF16, ROW
from msamp_like.policy import Rule

Grid = Sequence[Sequence[int]]

PARTIAL_SUMS = Rule(format=BF16)
"""How a node's sums travel to the others: their rounding, at 55 dB, is lost beside E4M3's at 31."""


class TwoLevelGroup(CountedGroup):
    """A CountedGroup whose all-to-all takes two hops; ``inside`` and ``across`` are its rank's node and its place.

    All-gather, all-reduce and broadcast go over ``group`` as ever. :func:`two_level` makes the groups.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        inside: dist.ProcessGroup | None,
        across: dist.ProcessGroup | None,
        axis: str = "dp",
    ) -> None:
        super().__init__(group, axis)
        self.inside = CountedGroup(inside, f"{axis}/inside")
        self.across = CountedGroup(across, f"{axis}/across")
        ranks = dist.get_process_group_ranks(group)
        node, place = divmod(self.rank, self.inside.world)
        found = [dist.get_process_group_ranks(inside), dist.get_process_group_ranks(across)]
        expected = [
            ranks[node * self.inside.world : (node + 1) * self.inside.world],
            ranks[place :: self.inside.world],
        ]
        if found != expected:
            raise ValueError(
                f"rank {self.rank} of {ranks} shares a node with {expected[0]} and its place with {expected[1]}, got "
                f"{found[0]} and {found[1]}; make the groups with two_level()"
            )

    def __str__(self) -> str:
        return f"{super().__str__()} in {self.across.world} nodes of {self.inside.world}"

    @property
    def hops(self) -> tuple[CountedGroup, CountedGroup]:
        """Both hops, in their order."""
        return self.inside, self.across

    @property
    def sent(self) -> int:
        """Bytes that this rank sent in this step, on both hops and over the whole group."""
        return super().sent + sum(hop.sent for hop in self.hops)

    def sent_under(self, labels: Collection[str]) -> int:
        """Bytes of the collectives under these labels and what is below them, on both hops and over the whole group."""
        return super().sent_under(labels) + sum(hop.sent_under(labels) for hop in self.hops)

    @property
    def ledger(self) -> list[Entry]:
        """What was sent in this step; the two hops have axes of their own."""
        return [*super().ledger, *(entry for hop in self.hops for entry in hop.ledger)]

    def end_step(self) -> None:
        """The next collective of each hop, and of the whole group, starts its count anew."""
        super().end_step()
        for hop in self.hops:
            hop.end_step()

    def grid(self, splits: Sequence[int]) -> Grid:
        """One number a rank as (nodes, places)."""
        places = self.inside.world
        return [splits[start : start + places] for start in range(0, self.world, places)]

    def all_to_all(
        self,
        x: Tensor,
        splits: Sequence[int] | None = None,
        received_splits: Sequence[int] | None = None,
        label: str = "",
    ) -> tuple[Tensor, Pending]:
        """As CountedGroup's, with the same result, in two hops; the second is issued when the work is waited for.

        With ``received_splits`` no rank knows what others of its node send, so that form stays flat.
        """
        if received_splits is not None:
            return super().all_to_all(x, splits, received_splits, label)
        x = x.contiguous()
        sizes = list(splits) if splits is not None else [x.shape[0] // self.world] * self.world
        grid = self.grid(sizes)
        place = [row[self.inside.rank] for row in grid]
        first, first_work = self.inside.all_to_all(by_columns(x, grid), [sum(c) for c in zip(*grid)], label=label)
        received = x.new_empty(self.world * sizes[self.rank], *x.shape[1:])

        def forward() -> None:
            parts = by_columns(first, [place] * self.inside.world)
            arrived, work = self.across.all_to_all(parts, [self.inside.world * size for size in place], label=label)
            work.wait()
            received.copy_(arrived)

        return received, _TwoHops(first_work, forward)


class _TwoHops(Pending):
    """The first hop under way, and what follows it."""

    def __init__(self, first: Pending, forward: Callable[[], None]) -> None:
        super().__init__(first.work, first.what, first.group)
        self._forward: Callable[[], None] | None = forward

    def wait(self) -> None:
        """Returns when the second hop's result is there; issues that hop at its first call."""
        super().wait()
        forward, self._forward = self._forward, None
        if forward is not None:
            forward()


def by_columns(x: Tensor, sizes: Grid) -> Tensor:
    """Parts of dim 0 that lie row by row in a grid, ``sizes[i][j]`` long, column by column; see [Note: places]."""
    num_rows, num_columns = len(sizes), len(sizes[0])
    if len({size for row in sizes for size in row}) == 1:
        return x.reshape(num_rows, num_columns, -1).transpose(0, 1).reshape(x.shape)
    parts = x.split([size for row in sizes for size in row])
    return torch.cat([parts[i * num_columns + j] for j in range(num_columns) for i in range(num_rows)])


def two_level(per_node: int, group: dist.ProcessGroup | None = None, axis: str = "dp") -> TwoLevelGroup:
    """The group with its two hops, ``per_node`` neighbouring ranks a node; every rank of ``group`` calls it at once.

    Raises ValueError where the ranks do not fill nodes of that size.
    """
    ranks = dist.get_process_group_ranks(group)
    if per_node < 1 or len(ranks) % per_node:
        raise ValueError(f"ranks must fill their nodes, got {len(ranks)} ranks, {per_node} a node; pass a divisor")
    node, place = divmod(dist.get_rank(group), per_node)
    inside, across = (
        dist.new_group(members, use_local_synchronization=True)  # members alone take part, wherever the rest are
        for members in (ranks[node * per_node : (node + 1) * per_node], ranks[place::per_node])
    )
    return TwoLevelGroup(group, inside, across, axis)


def check_nodes(ranks_per_node: int, world: int) -> None:
    """Raise ValueError unless ``world`` data-parallel ranks fill several nodes of several ranks."""
    if ranks_per_node < 2 or world % ranks_per_node or world == ranks_per_node:
        raise ValueError(
            "ranks_per_node must be at least 2 and divide the data-parallel ranks into more than one node, got "
            f"{ranks_per_node} for {world} data-parallel ranks; count the ranks of one dp axis that share a node, and "
            "leave it out where that is one of them or all"
        )


class NodeSums:
    """The mean of buckets of one ``layout`` by sums inside the node, then across; made once, used every step.

    ``rule`` is the rule of what is reduced, ``between`` that of the partial sums on their way across: unscaled as BF16,
    or scaled by line. Raises ValueError where one of the hops has one rank: the flat form then sends as little.
    """

    def __init__(self, layout: Layout, rule: Rule, group: TwoLevelGroup, between: Rule | None = None) -> None:
        if 1 in (group.inside.world, group.across.world):
            raise ValueError(
                "sums in a node need several ranks a node and several nodes, got "
                f"{group.across.world} nodes of {group.inside.world}; use reduce_scatter_quantized"
            )
        self.layout, self.group = layout, group
        self.between = between or PARTIAL_SUMS
        self.grid = group.grid(layout.line_splits)
        shapes = [slot.shape for slot in layout.slots]
        whole = Layout(shapes, rule.block, 1, 0)  # of one rank, so of all lines
        every = (whole.scale_index + whole.own_scales.start).to(torch.int32)
        lines = sum(layout.line_splits)
        padded = torch.nn.functional.pad(every, (0, max(0, lines - len(every))), value=max(0, layout.num_scales - 1))
        self.scale_of_line = padded[:lines].to(layout.scale_index.device)

    def reduce_scatter(self, payload: Tensor, scale_inv: Tensor, label: str = "comm") -> Steps[tuple[Tensor, Tensor]]:
        """What ``reduce_scatter_quantized`` returns of the same bucket, with one more rounding.

        A scale of 0 says that this rank has nothing; that of an empty tensor, which has no line, reads as sent by
        none. Sends (L - 1) / L of the codes and of one FP32 scale a line
        inside a node of L ranks, and 1 / L of the partial sums across, less its own node's.
        """
        places, width = self.group.inside.world, self.layout.width
        columns = [sum(column) for column in zip(*self.grid)]
        with record_function(f"{label}/inside"):
            code_bytes = by_columns(payload.view(torch.uint8), self.grid)
            codes, codes_work = self.group.inside.all_to_all(code_bytes, columns, label=label)
            line_scales = by_columns(scale_inv.index_select(0, self.scale_of_line), self.grid)
            scales, scales_work = self.group.inside.all_to_all(line_scales, columns, label=f"{label}/scales")
        yield
        with record_function(f"{label}/across"):
            codes_work.wait()
            scales_work.wait()
            scales = scales.view(places, -1, 1)
            partial = _total(codes.view(payload.dtype).view(places, -1, width), scales)
            parts, part_scales = self._rounded(partial, (scales != 0).any(dim=0))
            rows = [row[self.group.inside.rank] for row in self.grid]
            codes, codes_work = self.group.across.all_to_all(parts.view(torch.uint8), rows, label=label)
            scales, scales_work = self.group.across.all_to_all(part_scales, rows, label=f"{label}/scales")
        yield
        with record_function(f"{label}/sum"):
            codes_work.wait()
            scales_work.wait()
            scales = scales.view(self.group.across.world, -1, 1)
            total = _total(codes.view(parts.dtype).view(self.group.across.world, -1, width), scales)
            present = (scales != 0).any(dim=0).view(-1).float()
            own_scales = torch.zeros(self.layout.own_scales.stop - self.layout.own_scales.start, device=total.device)
            own_scales.scatter_reduce_(0, self.layout.scale_index, present, "amax")
            return total.mul_(1.0 / self.group.world), own_scales > 0

    def _rounded(self, partial: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Partial sums as ``between`` stores them, and a scale a line: 0 where no rank of the node has any."""
        if not self.between.format.scaled:
            return partial.to(self.between.format.dtype), present.to(torch.uint8)
        payload, scale_inv, _ = kernels.quantize_current(
            partial, self.between.format, ROW, self.between.margin, self.between.power_of_two
        )
        return payload, torch.where(present, scale_inv, 0.0)


def _total(shards: Tensor, scales: Tensor) -> Tensor:
    """The FP32 sum over dim 0 of (ranks, lines, width), in the order of ranks; scales (ranks, lines, 1)."""
    total = _real(shards[0], scales[0])
    for shard, scale in zip(shards[1:], scales[1:], strict=True):
        total += _real(shard, scale)
    return total


def _real(shard: Tensor, scale: Tensor) -> Tensor:
    """FP32 values; scales that are no FP32 are flags of lines whose values need none."""
    if scale.dtype != torch.float32:
        return shard.float()
    return kernels.dequantize(shard, scale, ROW, torch.float32)
