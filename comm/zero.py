"""ZeRO with whole tensors: each matrix has one owner, who alone has its gradient's mean, its states and its master.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020,
https://arxiv.org/abs/1910.02054, cut the parameters into equal shards. A tensor with one scale cannot be cut without
agreeing on the scale again, so Peng et al., "FP8-LM: Training FP8 Large Language Models", 2023,
https://arxiv.org/abs/2310.18313, Algorithm 1, give out whole tensors, the largest first, each to the rank that has
least. One step:

    backward    a gradient's codes go to its owner, who sums them in FP32, rounds the mean once: 1 byte an element
    step        the owner steps; masters and moments are nowhere else
    weights     the owner's new bytes go to all, as they are stored: 1 byte an element of an E4M3 weight

Everything that a rank computes here an unsharded run computes too, in the same order: the weights are the same bits.

Stage 1 keeps local gradients until they are reduced, so a gradient that accumulates over micro-batches under
``no_sync()`` is sent once. Stage 2 sends every micro-batch's and adds up at the owner: less memory, more bytes.

Left out: a tensor is never split, so a rank has at least the largest one. With many layers the loads differ by little;
a model whose embedding outweighs a rank's share should be split along its rows by tensor parallelism instead.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from msamp_like.comm.buckets import Layout, assign
from msamp_like.comm.collectives import Steps, quantize_own
from msamp_like.comm.data_parallel import DataParallel, Wire
from msamp_like.comm.group import CountedGroup, Pending
from msamp_like.comm.reduction import Bucket, mean_of_shard, pack, write
from msamp_like.tensor import ScalingTensor

WEIGHTS = "comm/weights"
"""What the labels of new weights begin with."""


def assign_owners(sizes: Sequence[int], world: int) -> list[int]:
    """The owner of each tensor: largest first, each to the rank with the least so far, the lowest of equals.

    No rank gets more than 4/3 of what the best placement would give its fullest (Graham, "Bounds on Multiprocessing
    Timing Anomalies", 1969). Depends on the sizes alone, so every rank finds the same.
    """
    owners = [0] * len(sizes)
    loads = [(0, rank) for rank in range(world)]
    for position in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, rank = heapq.heappop(loads)
        owners[position] = rank
        heapq.heappush(loads, (load + sizes[position], rank))
    return owners


class Zero(DataParallel):
    """Data parallelism whose means go to each parameter's owner alone; elsewhere ``.grad`` is None after backward."""

    def __init__(
        self, parameters: Iterable[tuple[str, Tensor]], *, stage: int, group: CountedGroup | None = None, **options: Any
    ) -> None:
        named = list(parameters)
        self.stage = stage
        group = group or CountedGroup()
        # a tied parameter has one owner; a norm or bias has none: every rank steps it, and nothing has to return
        trained = list({id(p): p for _, p in named if p.requires_grad and p.dim() >= 2}.values())
        owners = assign_owners([p.numel() for p in trained], group.world)
        self._owner = {id(p): rank for p, rank in zip(trained, owners, strict=True)}
        super().__init__(named, group=group, **{**options, "scattered": trained})

    @property
    def wire(self) -> Wire:
        """As for data parallelism, the new weights that left this rank included: both are what a step costs."""
        weights = (
            sum(entry.sent for entry in self.group.ledger if entry.label.startswith(WEIGHTS)) if self.world > 1 else 0
        )
        found = super().wire
        return replace(found, sent=found.sent + weights)

    def has_owner(self, parameter: Tensor) -> bool:
        """Whether one rank steps the parameter; one of a single dim is stepped by all."""
        return id(parameter) in self._owner

    def owner(self, parameter: Tensor) -> int:
        """The rank that steps the parameter, or this one where all do."""
        return self._owner.get(id(parameter), self.group.rank)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Stage 1: gradients stay on their rank and add up, the next backward outside sends the sum. Stage 2: each
        backward sends its own all the same, and they add up at their owners."""
        return contextlib.nullcontext() if self.stage >= 2 else super().no_sync()

    def _sets_aside(self, parameter: Tensor) -> bool:
        return True

    def _placed(self, members: list[Tensor], scaled: bool, device: torch.device) -> tuple[list[Tensor], Layout | None]:
        if not scaled:  # all-reduced in the order of an unsharded run: a ring's sum depends on the place in the buffer
            return members, None
        members = sorted(members, key=self.owner)
        owners = [self.owner(p) for p in members]
        return members, Layout([p.shape for p in members], self.rule.block, self.world, self.group.rank, device, owners)

    def _mean(self, bucket: Bucket) -> Steps[None]:
        if bucket.layout is None:
            yield from super()._mean(bucket)
        else:
            yield from self._mean_to_owners(bucket, bucket.layout)
        for parameter in bucket.parameters:
            if self.owner(parameter) != self.group.rank:
                parameter.grad = None

    def _mean_to_owners(self, bucket: Bucket, layout: Layout) -> Steps[None]:
        packed = pack(bucket, layout, self.rule)
        own = [p for p in bucket.parameters if self.owner(p) == self.group.rank]
        for parameter in bucket.parameters:
            if self.owner(parameter) != self.group.rank:
                parameter.grad = None  # it is on its way: from here on this rank holds nothing of it
        values, present = yield from mean_of_shard(bucket, layout, packed, self.group)
        with record_function(f"{bucket.name}/write"):
            means = quantize_own(values, present, layout, self.rule)
            seen = present.split([slot.num_scales for slot in layout.own_slots])
            for parameter, mean, sent in zip(own, means, seen, strict=True):
                if parameter.grad is not None or bool(sent[0]):  # reads the device for a missing one only
                    write(parameter, ScalingTensor(*mean, self.rule.block, parameter.dtype), bucket.scattered)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Some parameters of an optimizer, neighbours in the order of its step, whose new bytes travel together."""

    parameters: Sequence[Tensor]
    owners: Sequence[int]
    last: int  # position of the last of them in the step

    def stored(self, rank: int) -> Iterator[Tensor]:
        """The tensors behind the parameters that ``rank`` owns."""
        for parameter, owner in zip(self.parameters, self.owners, strict=True):
            if owner == rank:
                yield from _stored(parameter)


class OwnedWeights:
    """Where one optimizer's parameters are stepped, and how their new bytes reach the other ranks.

    The optimizer passes all its parameters in one order on every rank; as soon as it has passed the last of a part, the
    part's bytes leave, while the next is stepped; a part is as large as a bucket of gradients. When :meth:`finish`
    returns every rank holds all new weights; with ``overlap_forward`` those of matrices may still be on their way, and
    whoever reads one first waits for its part.
    """

    def __init__(self, parameters: Sequence[Tensor], zero: Zero, *, overlap_forward: bool = False) -> None:
        self.zero = zero
        self.overlap_forward = overlap_forward
        self._parameters = parameters
        trained = [(i, p) for i, p in enumerate(parameters) if p.requires_grad and zero.has_owner(p)]
        sizes = [((p.device, _format(p)), sum(t.nbytes for t in _stored(p))) for _, p in trained]
        self._parts = [
            _Part(
                parameters=[trained[m][1] for m in members],
                owners=[zero.owner(trained[m][1]) for m in members],
                last=max(trained[m][0] for m in members),
            )
            for members in assign(sizes, zero.bucket_bytes)
        ]
        self._ends = {part.last for part in self._parts}
        self._launched = 0
        self._running: list[tuple[_Part, Tensor, Pending]] = []
        # a wait, and the writes behind it, belong to no compiled graph
        self._arrived = torch.compiler.disable(self._receive_part) if overlap_forward else self._receive_part

    def owns(self, parameter: Tensor) -> bool:
        """Whether this rank steps the parameter."""
        return self.zero.owner(parameter) == self.zero.group.rank

    def ends_part(self, position: int) -> bool:
        """Whether the last parameter of a part has this position."""
        return position in self._ends

    def passed(self, position: int) -> None:
        """The optimizer has stepped, or left out, its parameter number ``position``."""
        if not self._launched:
            self._receive_all()  # what nobody has read since the last step
        while self._launched < len(self._parts) and self._parts[self._launched].last <= position:
            self._launch(self._parts[self._launched])
            self._launched += 1

    @property
    def sizes(self) -> list[int]:
        """Bytes of this rank's share of each part, in the order in which the parts leave."""
        return [sum(t.nbytes for t in part.stored(self.zero.group.rank)) for part in self._parts]

    def gather_states(self, states: Mapping[int, Any]) -> dict[int, Any]:
        """Every rank's states by the position of their parameter; those of other ranks on the CPU. A collective."""
        group = self.zero.group
        owners = [self.zero.owner(p) if self.zero.has_owner(p) else 0 for p in self._parameters]
        own = {i: _dumps(state) for i, state in states.items() if owners[i] == group.rank}
        sizes = torch.zeros(len(owners), dtype=torch.int64, device=self._parameters[0].device)
        for i, raw in own.items():
            sizes[i] = raw.numel()
        group.all_reduce(sizes, dist.ReduceOp.SUM, "states").wait()
        gathered: dict[int, Any] = {}
        for i, size in enumerate(sizes.tolist()):
            if size:
                raw = own[i].to(sizes.device) if i in own else torch.empty(size, dtype=torch.uint8, device=sizes.device)
                group.broadcast(raw, owners[i], "states")
                gathered[i] = states[i] if i in states else _loads(raw)
        return gathered

    def finish(self) -> None:
        """Every rank has all new weights, or knows what to wait for."""
        self._launched = 0
        if not self.overlap_forward:
            self._receive_all()
            return
        for part, _, _ in list(self._running):
            for parameter in part.parameters:
                if not isinstance(parameter, ScalingTensor):
                    self._receive_part(part)
                    break
                parameter.arrival = functools.partial(self._arrived, part)

    def _receive_all(self) -> None:
        for part, _, _ in list(self._running):
            self._receive_part(part)

    def _receive_part(self, part: _Part) -> None:
        """The new weights of one part are here."""
        for position, running in enumerate(self._running):
            if running[0] is part:
                self._receive(*self._running.pop(position))
                return

    def _launch(self, part: _Part) -> None:
        group, label = self.zero.group, f"{WEIGHTS}{self._launched}"
        with record_function(f"{label}/all_gather"):
            sizes = [sum(t.nbytes for t in part.stored(rank)) for rank in range(group.world)]
            own = [t.view(-1).view(torch.uint8) for t in part.stored(group.rank)]
            sent = torch.cat(own) if own else torch.empty(0, dtype=torch.uint8, device=part.parameters[0].device)
            self._running.append((part, *group.all_gather(sent, sizes, label)))
        if len(self._running) > 2 and not self.overlap_forward:  # the two newest go on travelling
            self._receive(*self._running.pop(0))

    def _receive(self, part: _Part, gathered: Tensor, work: Pending) -> None:
        for parameter in part.parameters:
            if isinstance(parameter, ScalingTensor):
                parameter.arrival = None
        work.wait()
        offset = 0
        for rank in range(self.zero.world):
            for tensor in part.stored(rank):
                raw = gathered[offset : offset + tensor.nbytes]
                offset += tensor.nbytes
                if rank != self.zero.group.rank:
                    aligned = raw if tensor.element_size() == 1 else raw.clone()  # may start where the dtype cannot
                    tensor.copy_(aligned.view(tensor.dtype).view(tensor.shape))
        for parameter in part.parameters:
            if isinstance(parameter, ScalingTensor):
                parameter.drop_casts()


def _dumps(state: Any) -> Tensor:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _loads(raw: Tensor) -> Any:
    return torch.load(io.BytesIO(raw.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


def _stored(parameter: Tensor) -> tuple[Tensor, ...]:
    """The plain tensors behind a parameter."""
    if isinstance(parameter, ScalingTensor):
        return parameter.payload, parameter.scale_inv
    return (parameter.detach(),)


def _format(parameter: Tensor) -> str:
    """What travels together is of one kind, so that a ledger tells them apart."""
    return parameter.format.name if isinstance(parameter, ScalingTensor) else str(parameter.dtype)
