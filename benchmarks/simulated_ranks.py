"""Many ranks in one process: the product's own collectives over groups that hand tensors to each other.

A collective of :mod:`msamp_like.comm.collectives` is a generator that yields while bytes travel. :func:`simulate` gives
every rank a group with the interface of CountedGroup and steps all generators in turn, so that whatever a rank waits
for has been handed over by all others. Nothing of the arithmetic is repeated here: only the bytes are moved.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Exchange:
    """What the ranks of one group have handed over: by call, one tensor a rank."""

    def __init__(self) -> None:
        self.posted: dict[tuple[int, int], Tensor] = {}
        self.shared: dict[int, Tensor] = {}

    def post(self, call: int, rank: int, x: Tensor) -> None:
        self.posted[call, rank] = x

    def all(self, call: int, world: int) -> list[Tensor]:
        """Every rank's tensor of one call; KeyError where a rank has not come to it yet."""
        return [self.posted[call, rank] for rank in range(world)]


class Arrival:
    """A collective under way, in the form of Pending; :meth:`wait` fills its result in."""

    def __init__(self, fill: Callable[[], None]) -> None:
        self.wait = fill


class SimulatedGroup:
    """One rank's end of an :class:`Exchange`, called as CountedGroup is; with nodes, as TwoLevelGroup's hops are."""

    inside: SimulatedGroup
    across: SimulatedGroup

    def __init__(self, exchange: Exchange, rank: int, world: int) -> None:
        self.exchange, self.rank, self.world = exchange, rank, world
        self.calls = 0

    def _post(self, x: Tensor) -> int:
        call, self.calls = self.calls, self.calls + 1
        self.exchange.post(call, self.rank, x)
        return call

    def grid(self, splits: Sequence[int]) -> list[Sequence[int]]:
        """One number a rank as (nodes, places)."""
        places = self.inside.world
        return [splits[start : start + places] for start in range(0, self.world, places)]

    def all_to_all(
        self,
        x: Tensor,
        splits: Sequence[int] | None = None,
        received_splits: Sequence[int] | None = None,
        label: str = "",
    ) -> tuple[Tensor, Arrival]:
        """Part r of dim 0 goes to rank r."""
        parts = list(splits) if splits is not None else [x.shape[0] // self.world] * self.world
        arriving = list(received_splits) if received_splits is not None else [parts[self.rank]] * self.world
        received = x.new_empty(sum(arriving), *x.shape[1:])
        call = self._post(torch.stack([*x.split(parts)]) if len(set(parts)) == 1 else x)

        def fill() -> None:
            sent = self.exchange.all(call, self.world)
            own = [y[self.rank] if len(set(parts)) == 1 else y.split(parts)[self.rank] for y in sent]
            received.copy_(torch.cat(own))

        return received, Arrival(fill)

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None, label: str = "") -> tuple[Tensor, Arrival]:
        """Every rank's tensor along dim 0; all ranks share one result, to save memory."""
        call = self._post(x)
        rows = sum(sizes) if sizes is not None else self.world * x.shape[0]
        gathered = self.exchange.shared.setdefault(call, x.new_empty(rows, *x.shape[1:]))

        def fill() -> None:
            if self.rank == 0:
                torch.cat(self.exchange.all(call, self.world), out=gathered)

        return gathered, Arrival(fill)

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType, label: str = "") -> Arrival:
        """``x`` becomes the sum or maximum over all ranks."""
        call = self._post(x.clone())

        def fill() -> None:
            stacked = torch.stack(self.exchange.all(call, self.world))
            x.copy_(stacked.amax(0) if op == dist.ReduceOp.MAX else stacked.sum(0))

        return Arrival(fill)


def groups_of(world: int, per_node: int = 0) -> list[SimulatedGroup]:
    """The groups of all ranks; with ``per_node`` each has the groups of its node and of its place too."""
    exchange = Exchange()
    groups = [SimulatedGroup(exchange, rank, world) for rank in range(world)]
    if per_node:
        nodes, places = ([Exchange() for _ in range(count)] for count in (world // per_node, per_node))
        for group in groups:
            node, place = divmod(group.rank, per_node)
            group.inside = SimulatedGroup(nodes[node], place, per_node)
            group.across = SimulatedGroup(places[place], node, world // per_node)
    return groups


def simulate(world: int, start: Callable[[SimulatedGroup], Generator[None, None, T]], per_node: int = 0) -> list[T]:
    """``start(group)`` of every rank, all run to their ends in turn; their results by rank."""
    running = {group.rank: start(group) for group in groups_of(world, per_node)}
    results: dict[int, T] = {}
    while running:
        for rank, steps in list(running.items()):
            try:
                next(steps)
            except StopIteration as end:
                results[rank] = end.value
                del running[rank]
    return [results[rank] for rank in range(world)]
