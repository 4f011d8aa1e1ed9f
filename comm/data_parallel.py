"""Data parallelism: every rank holds the model, ``.grad`` is the mean over all ranks when ``backward()`` returns.

A hook per parameter tells when its gradient is there. Buckets of parameters, fixed at construction, are reduced in one
fixed order while backward goes on: a launch first sends the next bucket, then moves each earlier one a step further, so
every rank issues the same collectives in the same order whatever its own timing. What is left follows at the end of
backward. A parameter that the loss did not touch on this rank counts as zero in the mean; one that it touched on none
keeps the ``.grad`` it had.

Matrices whose rule has a scale travel in that format (see :mod:`.collectives`); the others, and plain parameters, in an
ordinary all-reduce in their own dtype. A gradient that is neither sent nor zeroed is added to, as with torch's
DistributedDataParallel: after ``no_sync()`` the sum of the micro-batches is sent, rounded once; a second ``backward()``
without ``zero_grad()`` reduces the sum of the last mean and the new gradient.

Left out, against torch's DistributedDataParallel: buffers are broadcast at construction only, and a rank that has run
out of data has to be given some. A rank whose loss reaches no parameter at all would keep the others waiting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from msamp_like.comm.buckets import Layout, assign
from msamp_like.comm.collectives import Steps, all_reduce_quantized, replicate, stored_as
from msamp_like.comm.group import CountedGroup, ring_bytes
from msamp_like.formats import BF16
from msamp_like.policy import Rule
from msamp_like.tensor import ScalingTensor, real, unscaled

BUCKET_BYTES = 8 << 20
"""As many FP8 gradients as fill torch DDP's default bucket of 25 MiB in FP32, about."""


@dataclass(frozen=True, kw_only=True)
class Wire:
    """Bytes that this rank sent in the last reduced backward, and what a ring all-reduce in BF16 would have sent.

    ``fp8_*`` is the share of the scaled buckets; ``scaler_sent`` what :meth:`DataParallel.reduce_max` sent since, which
    is not in ``sent``.
    """

    sent: int
    bf16: int
    fp8_sent: int
    fp8_bf16: int
    scaler_sent: int


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Parameters that travel together, as codes and scales with a ``layout``, as plain ``dtype`` without one."""

    name: str
    parameters: Sequence[Tensor]
    dtype: torch.dtype
    device: torch.device
    layout: Layout | None

    @property
    def num_elements(self) -> int:
        return sum(p.numel() for p in self.parameters)


class DataParallel:
    """Reduces the gradients of one model's parameters over a process group, from hooks, as ``rule`` stores gradients.

    Construction checks that all ranks hold the same tensors and copies the first rank's values to all. With one rank it
    does nothing. ``wire`` tells what the last reduced backward sent.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        buffers: Iterable[tuple[str, Tensor]] = (),
        *,
        rule: Rule,
        group: dist.ProcessGroup | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        _check_settings(rule, bucket_bytes)
        self.rule = rule
        self.scaled_group, self.plain_group, self.scaler_group = (CountedGroup(group) for _ in range(3))
        self.world = self.scaled_group.world
        named = {id(p): (name, p) for name, p in reversed(list(parameters))}  # a tied parameter once, by its first name
        named_parameters = list(named.values())[::-1]
        self._parameters = [p for _, p in reversed(named_parameters) if p.requires_grad]
        self._frozen = [(name, p) for name, p in named_parameters if not p.requires_grad]
        self._names = {id(p): name for name, p in named_parameters}
        self._buckets: list[Bucket] = []
        self._bucket_of: list[int] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._synced = True
        self._active = False
        self._launched = 0
        self._waiting: list[int] = []
        self._seen: set[int] = set()
        self._running: list[Steps[None]] = []
        if self.world > 1 and named_parameters:
            replicate([*named_parameters, *buffers], self.plain_group)
            self._build_buckets(bucket_bytes)
            self._handles = [
                p.register_post_accumulate_grad_hook(partial(self._on_gradient, position))
                for position, p in enumerate(self._parameters)
            ]

    # --- construction -----------------------------------------------------------------------------------------------

    def _build_buckets(self, bucket_bytes: int) -> None:
        """Buckets in the reverse order of the parameters, which is about the order in which backward finishes them."""
        sizes = []
        for p in self._parameters:
            scaled = isinstance(p, ScalingTensor) and self.rule.format.scaled
            dtype = self.rule.format.dtype if isinstance(p, ScalingTensor) else p.dtype
            sizes.append(((scaled, dtype, p.device), p.numel() * dtype.itemsize))
        self._bucket_of = [0] * len(sizes)
        for number, members in enumerate(assign(sizes, bucket_bytes)):
            (scaled, dtype, device), _ = sizes[members[0]]
            members_parameters = [self._parameters[position] for position in members]
            shapes = [p.shape for p in members_parameters]
            rank = self.scaled_group.rank
            layout = Layout(shapes, self.rule.block, self.world, rank, device) if scaled else None
            self._buckets.append(
                Bucket(
                    name=f"comm/bucket{number}",
                    parameters=members_parameters,
                    dtype=dtype,
                    device=device,
                    layout=layout,
                )
            )
            for position in members:
                self._bucket_of[position] = number

    # --- during backward --------------------------------------------------------------------------------------------

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
        for group in (self.scaled_group, self.plain_group, self.scaler_group):
            group.reset()

    @torch.no_grad()
    def _launch(self) -> None:
        """Send the next bucket, then move each earlier one a step further: the oldest is the furthest along."""
        bucket = self._buckets[self._launched]
        self._launched += 1
        earlier = self._running
        self._running = [self._reduce(bucket)]
        next(self._running[0])
        self._running = [*(steps for steps in earlier if _advance(steps)), *self._running]

    def _finish(self) -> None:
        """The end of backward: launch what waits for gradients that will not come, and wait for all."""
        while self._launched < len(self._buckets):
            self._launch()
        with torch.no_grad():
            while self._running:
                self._running = [steps for steps in self._running if _advance(steps)]
        self._active = False

    def _reduce(self, bucket: Bucket) -> Steps[None]:
        if bucket.layout is not None:
            return _reduce_scaled(bucket, bucket.layout, self.rule, self.scaled_group)
        return _reduce_plain(bucket, self.plain_group)

    # --- for the caller ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of a backward inside stay on their rank and add up; the next one outside sends the sum."""
        before, self._synced = self._synced, False
        try:
            yield
        finally:
            self._synced = before

    def reduce_max(self, tensor: Tensor) -> None:
        """FP32 ``tensor`` becomes the maximum over all ranks, in place; NaN must have become +inf before."""
        if self.world > 1:
            self.scaler_group.all_reduce(tensor, dist.ReduceOp.MAX, "scalers").wait()

    @property
    def wire(self) -> Wire:
        """Bytes of the last reduced backward; zeros before the first, and with one rank."""
        started = bool(self._waiting)
        scaled, plain = (
            sum(ring_bytes(b.num_elements * BF16.bytes, self.world) for b in self._buckets if started and is_scaled(b))
            for is_scaled in (lambda b: b.layout is not None, lambda b: b.layout is None)
        )
        fp8_sent, plain_sent = (self.scaled_group.sent, self.plain_group.sent) if started else (0, 0)
        return Wire(
            sent=fp8_sent + plain_sent,
            bf16=scaled + plain,
            fp8_sent=fp8_sent,
            fp8_bf16=scaled,
            scaler_sent=self.scaler_group.sent,
        )

    def remove(self) -> None:
        """Take all hooks away; gradients stay local from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _advance(steps: Steps[None]) -> bool:
    """One step of a reduction; whether there are more."""
    return next(steps, StopIteration) is not StopIteration


def _check_settings(rule: Rule, bucket_bytes: int) -> None:
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be at least 1, got {bucket_bytes}; the default is {BUCKET_BYTES}")
    if rule.rounding != "nearest":
        raise ValueError(
            f"gradients are rounded to nearest when they are sent, got a rule with rounding={rule.rounding!r}; "
            "use Rule(..., rounding='nearest') for Role.GRAD_WEIGHT"
        )


# --- one bucket -----------------------------------------------------------------------------------------------------


def _reduce_scaled(bucket: Bucket, layout: Layout, rule: Rule, group: CountedGroup) -> Steps[None]:
    """Gradients as they are stored, or rounded once here; a scale of 0 stands for no gradient on this rank."""
    with record_function(f"{bucket.name}/pack"):
        grads = [None if p.grad is None else stored_as(p.grad, rule) for p in bucket.parameters]
        packed = layout.pack(grads, rule.format, bucket.device)
        del grads
    payload, scale_inv, present = yield from all_reduce_quantized(*packed, layout, rule, group, bucket.name)
    with record_function(f"{bucket.name}/write"):
        means = zip(bucket.parameters, layout.slots, layout.unpack(payload, scale_inv), strict=True)
        for parameter, slot, mean in means:
            if parameter.grad is not None or bool(present[slot.first_scale]):  # reads the device for a missing one only
                _write(parameter, ScalingTensor(*mean, rule.block, parameter.dtype))


def _reduce_plain(bucket: Bucket, group: CountedGroup) -> Steps[None]:
    """A sum in the bucket's dtype of what each rank divided by their number, so that nothing overflows on the way.

    One more element a parameter says whether any rank had a gradient.
    """
    with record_function(f"{bucket.name}/all_reduce"):
        flat = torch.zeros(bucket.num_elements + len(bucket.parameters), dtype=bucket.dtype, device=bucket.device)
        *views, present = flat.split([*(p.numel() for p in bucket.parameters), len(bucket.parameters)])
        for position, (parameter, view) in enumerate(zip(bucket.parameters, views, strict=True)):
            if parameter.grad is not None:
                if parameter.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"gradients are reduced as dense tensors, got {parameter.grad.layout}; "
                        "build the embedding with sparse=False"
                    )
                view.view(parameter.shape).copy_(real(parameter.grad, bucket.dtype))
                present[position] = 1
        work = group.all_reduce(flat.mul_(1.0 / group.world), dist.ReduceOp.SUM, bucket.name)
    yield
    with record_function(f"{bucket.name}/write"):
        work.wait()
        for position, (parameter, view) in enumerate(zip(bucket.parameters, views, strict=True)):
            if parameter.grad is not None or bool(present[position] > 0):
                mean = view.view(parameter.shape)
                _write(parameter, unscaled(mean, parameter.dtype) if isinstance(parameter, ScalingTensor) else mean)


def _write(parameter: Tensor, mean: Tensor) -> None:
    """The mean becomes ``.grad``; a gradient that is there stays the same object, for those who hold it."""
    if parameter.grad is None:
        parameter.grad = mean
    elif isinstance(parameter.grad, ScalingTensor) and isinstance(mean, ScalingTensor):
        parameter.grad.replace_(mean)
    else:
        parameter.grad.copy_(mean)
