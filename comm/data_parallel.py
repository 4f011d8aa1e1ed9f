"""Data parallelism: every rank holds the model, ``.grad`` is the mean over all ranks when ``backward()`` returns.

A hook per parameter tells when its gradient is there. Buckets of parameters, fixed at construction, are reduced in one
fixed order while backward goes on: a launch first sends the next bucket, then moves those that left some launches ago a
step further, so every rank issues the same collectives in the same order whatever its own timing. What is left follows
at the end of backward. A parameter that the loss did not touch on this rank counts as zero in the mean; one that it
touched on none keeps the ``.grad`` it had.

Matrices whose rule has a scale travel in that format (see :mod:`.collectives`), and where nodes are told of in two hops
(:mod:`.hierarchical`); the others, and plain parameters, in an ordinary all-reduce in their own dtype. A gradient that
is neither sent nor zeroed is added to, as with torch's DistributedDataParallel: after ``no_sync()`` the sum of the
micro-batches is sent, rounded once; a second ``backward()`` without ``zero_grad()`` reduces the sum of the last mean
and the new gradient.

Left out, against torch's DistributedDataParallel: parameters and buffers are the caller's to make equal before (see
:func:`.collectives.replicate`), and a rank that has run out of data has to be given some. A rank whose loss reaches no
parameter keeps the others waiting; its step raises.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msamp_like.comm.buckets import Layout, assign, check_bucket_bytes, default_bucket_bytes
from msamp_like.comm.collectives import Steps
from msamp_like.comm.group import CountedGroup, ring_bytes
from msamp_like.comm.hierarchical import NodeSums, TwoLevelGroup
from msamp_like.comm.reduction import Bucket, add, reduce_plain, reduce_scaled, sum_partial
from msamp_like.formats import BF16
from msamp_like.policy import Rule
from msamp_like.tensor import ScalingTensor

TRAVELLING = 4
"""Buckets that are left to travel behind the newest: to wait for one too early stops backward, not overlaps with it."""


@dataclass(frozen=True, kw_only=True)
class Wire:
    """Bytes that this rank sent for the gradients of the step, and what a ring all-reduce in BF16 would have sent.

    ``fp8_*`` is the share of the scaled buckets.
    """

    sent: int
    bf16: int
    fp8_sent: int
    fp8_bf16: int


class DataParallel:
    """Reduces the gradients of one model's parameters over a process group, from hooks, as ``rule`` stores gradients.

    All ranks pass the same named parameters with the same values. ``partial`` are those whose gradient is a part of a
    sum over ``tensor_group`` too (norms on a shard of the sequence), ``scattered`` those split over it. With one rank
    and nothing partial it does nothing.
    Over a :class:`.TwoLevelGroup`, ``between`` is the rule of the sums that nodes send each other instead of each
    rank's codes (:class:`.NodeSums`); None forwards the codes. Plain buckets go in one all-reduce over all either way.
    ``wire`` tells what a step's gradients sent, ``backwards`` counts the reduced ones.

    A sum must not be summed again: where a reduction is more than a mean of equal addends (``_sets_aside``), an earlier
    result that ``.grad`` still holds stands aside during the next reduction and is added to its result.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        *,
        rule: Rule,
        group: CountedGroup | None = None,
        partial: Iterable[Tensor] = (),
        tensor_group: CountedGroup | None = None,
        scattered: Iterable[Tensor] = (),
        between: Rule | None = None,
        bucket_bytes: int | None = None,
    ) -> None:
        check_bucket_bytes(bucket_bytes)
        _check_rounding(rule)
        self.rule = rule
        self._group = group
        self.tensor_group = tensor_group
        self.between = between
        self.world = 1 if group is None else group.world
        self.bucket_bytes = 0 if bucket_bytes is None else bucket_bytes
        named = {id(p): (name, p) for name, p in reversed(list(parameters))}  # a tied parameter once, by its first name
        named_parameters = list(named.values())[::-1]
        self._partial, self._scattered = {id(p) for p in partial}, {id(p) for p in scattered}
        self._parameters = [p for _, p in reversed(named_parameters) if p.requires_grad and self._reduces(p)]
        self._frozen = [(name, p) for name, p in named_parameters if not p.requires_grad]
        self._names = {id(p): name for name, p in named_parameters}
        self._buckets: list[Bucket] = []
        self._bucket_of: list[int] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.backwards = 0
        self.on_mean: Callable[[Tensor], object] | None = None  # called with each parameter whose mean is in its .grad
        self._synced = True
        self._active = False
        self._launched = 0
        self._waiting: list[int] = []
        self._seen: set[int] = set()
        self._running: list[Steps[None]] = []
        self._reduced: set[int] = set()
        self._aside: dict[int, Tensor] = {}
        if self._parameters:
            self._build_buckets()
            self._add_hooks()

    def _add_hooks(self) -> None:
        for position, p in enumerate(self._parameters):
            on_gradient = functools.partial(self._on_gradient, position)
            self._handles.append(p.register_post_accumulate_grad_hook(on_gradient))
            if self._sets_aside(p):
                self._handles.append(p.register_hook(functools.partial(self._before_gradient, position)))

    def _sets_aside(self, parameter: Tensor) -> bool:
        return id(parameter) in self._partial

    def _reduces(self, parameter: Tensor) -> bool:
        return self.world > 1 or id(parameter) in self._partial

    @property
    def group(self) -> CountedGroup:
        """The data-parallel ranks; raises RuntimeError where there are none."""
        if self._group is None:
            raise RuntimeError("gradients are averaged over data-parallel ranks, got none; give group=")
        return self._group

    # --- construction -----------------------------------------------------------------------------------------------

    def _build_buckets(self) -> None:
        """Buckets in the reverse order of the parameters, which is about the order in which backward finishes them."""
        sizes = []
        for p in self._parameters:
            scaled = isinstance(p, ScalingTensor) and self.rule.format.scaled
            dtype = self.rule.format.dtype if isinstance(p, ScalingTensor) else p.dtype
            kind = (scaled, dtype, p.device, id(p) in self._partial, id(p) in self._scattered)
            sizes.append((kind, p.numel() * dtype.itemsize))
        self.bucket_bytes = self.bucket_bytes or default_bucket_bytes(self.world, sum(size for _, size in sizes))
        self._bucket_of = [0] * len(sizes)
        for number, members in enumerate(assign(sizes, self.bucket_bytes)):
            (scaled, dtype, device, partial, scattered), _ = sizes[members[0]]
            parameters, layout = self._placed([self._parameters[position] for position in members], scaled, device)
            self._buckets.append(
                Bucket(
                    name=f"comm/bucket{number}",
                    parameters=parameters,
                    dtype=dtype,
                    device=device,
                    partial=partial,
                    scattered=scattered,
                    layout=layout,
                    sums=self._sums(layout),
                )
            )
            for position in members:
                self._bucket_of[position] = number

    def _placed(self, members: list[Tensor], scaled: bool, device: torch.device) -> tuple[list[Tensor], Layout | None]:
        """A bucket's parameters in the order in which they lie in it, and the layout of a scaled one."""
        shapes = [p.shape for p in members]
        if not scaled or self.world == 1:
            return members, None
        return members, Layout(shapes, self.rule.block, self.world, self.group.rank, device)

    def _sums(self, layout: Layout | None) -> NodeSums | None:
        if layout is None or self.between is None:
            return None
        if not isinstance(self.group, TwoLevelGroup):
            raise ValueError(
                f"sums between nodes need a group that knows its nodes, got {self.group} and between="
                f"{self.between.format}; make the group with two_level(), or leave between out"
            )
        return NodeSums(layout, self.rule, self.group, self.between)

    # --- during backward --------------------------------------------------------------------------------------------

    def _before_gradient(self, position: int, grad: Tensor) -> None:
        self._set_aside(self._parameters[position])

    def _set_aside(self, parameter: Tensor) -> None:
        if parameter.grad is not None and id(parameter) in self._reduced:
            self._aside[id(parameter)], parameter.grad = parameter.grad, None
        self._reduced.discard(id(parameter))

    def _on_gradient(self, position: int, parameter: Tensor) -> None:
        if not self._synced:
            return
        if not self._active:
            self._start()
        if position in self._seen:
            raise RuntimeError(
                f"a parameter gets one gradient per backward, {self._names[id(parameter)]} got a second one after its "
                "bucket was counted; use torch.utils.checkpoint with use_reentrant=False, and after a backward that "
                "raised, restart all ranks: they may have exchanged different buckets"
            )
        self._seen.add(position)
        self._waiting[self._bucket_of[position]] -= 1
        while self._launched < len(self._buckets) and self._waiting[self._launched] == 0:
            self._launch()

    def _start(self) -> None:
        for name, p in self._frozen:
            if p.requires_grad:
                raise RuntimeError(
                    f"the parameters to reduce are fixed by amp.initialize, {name} was frozen then and is not now; "
                    "set requires_grad before amp.initialize"
                )
        try:
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        except RuntimeError as error:
            raise RuntimeError(
                "gradients are reduced while backward() runs, got a gradient outside of it; call loss.backward()"
            ) from error
        self._active, self._launched = True, 0
        self._seen.clear()
        self._running.clear()
        self._waiting = [len(bucket.parameters) for bucket in self._buckets]

    @torch.no_grad()
    def _launch(self) -> None:
        """Send the next bucket, then move those a step further that have travelled for a while."""
        bucket = self._buckets[self._launched]
        self._launched += 1
        started = self._reduce(bucket)
        next(started)
        due, travelling = self._running[:-TRAVELLING], self._running[-TRAVELLING:]
        self._running = [*(steps for steps in due if _advance(steps)), *travelling, started]

    def _finish(self) -> None:
        """The end of backward: launch what waits for gradients that will not come, and wait for all."""
        while self._launched < len(self._buckets):
            self._launch()
        with torch.no_grad():
            while self._running:
                self._running = [steps for steps in self._running if _advance(steps)]
        self._active = False
        self.backwards += 1

    def _reduce(self, bucket: Bucket) -> Steps[None]:
        apart = [p for p in bucket.parameters if self._sets_aside(p)]
        for parameter in apart:  # those that this backward did not reach have not been asked yet
            self._set_aside(parameter)
        if bucket.partial and self.tensor_group is not None:
            yield from sum_partial(bucket, self.tensor_group)
        if self.world > 1:
            yield from self._mean(bucket)
        for parameter in apart:
            earlier = self._aside.pop(id(parameter), None)
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else add(earlier, parameter.grad)
            self._reduced.add(id(parameter))
        if self.on_mean is not None:
            for parameter in bucket.parameters:
                self.on_mean(parameter)

    def _mean(self, bucket: Bucket) -> Steps[None]:
        if bucket.layout is not None:
            return reduce_scaled(bucket, bucket.layout, self.rule, self.group)
        return reduce_plain(bucket, self.group)

    # --- for the caller ---------------------------------------------------------------------------------------------

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Gradients of a backward inside stay on their rank and add up; the next one outside sends the sum."""
        return self._unsynced()

    @contextlib.contextmanager
    def _unsynced(self) -> Iterator[None]:
        before, self._synced = self._synced, False
        try:
            yield
        finally:
            self._synced = before

    @property
    def wire(self) -> Wire:
        """Bytes of the present step's gradients, or of the last one's after it; zeros with one rank."""
        if self.world == 1:
            return Wire(sent=0, bf16=0, fp8_sent=0, fp8_bf16=0)
        scaled = {bucket.name for bucket in self._buckets if bucket.layout is not None}
        plain = {bucket.name for bucket in self._buckets} - scaled
        sizes = {bucket.name: ring_bytes(bucket.num_elements * BF16.bytes, self.world) for bucket in self._buckets}
        calls = {entry.label: entry.calls for entry in self.group.ledger}  # as often in each hop and half of a bucket
        bf16 = [(name, calls.get(name, 0) * size) for name, size in sizes.items()]
        fp8_sent = self.group.sent_under(scaled)
        return Wire(
            sent=fp8_sent + self.group.sent_under(plain),
            bf16=sum(size for _, size in bf16),
            fp8_sent=fp8_sent,
            fp8_bf16=sum(size for label, size in bf16 if label in scaled),
        )

    @property
    def buckets(self) -> Sequence[Bucket]:
        """The plan of what travels together, in the order of the launches."""
        return tuple(self._buckets)

    def remove(self) -> None:
        """Take all hooks away; gradients stay local from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _advance(steps: Steps[None]) -> bool:
    """One step of a reduction; whether there are more."""
    return next(steps, StopIteration) is not StopIteration


def _check_rounding(rule: Rule) -> None:
    if rule.rounding != "nearest":
        raise ValueError(
            f"gradients are rounded to nearest when they are sent, got a rule with rounding={rule.rounding!r}; "
            "use Rule(..., rounding='nearest') for Role.GRAD_WEIGHT"
        )
