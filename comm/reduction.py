"""What a reduction does with one bucket: packs the gradients, sends them, writes the means.

Each way is a generator that yields while bytes travel (see :mod:`.collectives`), so that several buckets are under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from msamp_like.comm.buckets import Layout
from msamp_like.comm.collectives import Steps, all_gather_quantized, reduce_scatter_quantized, stored_as
from msamp_like.comm.group import CountedGroup
from msamp_like.comm.hierarchical import NodeSums
from msamp_like.formats import BF16
from msamp_like.policy import Rule
from msamp_like.tensor import ScalingTensor, real, unscaled


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Parameters that travel together, as codes and scales with a ``layout``, as plain ``dtype`` without one.

    ``partial`` says that one rank's gradient is a part of a sum over the tensor-parallel ranks, not only over samples;
    ``scattered`` that other ranks hold what belongs to it (see :class:`.ScalingTensor`). With ``sums`` the codes of a
    layout are summed inside each node before they go to other nodes.
    """

    name: str
    parameters: Sequence[Tensor]
    dtype: torch.dtype
    device: torch.device
    partial: bool
    scattered: bool
    layout: Layout | None
    sums: NodeSums | None = None

    @property
    def num_elements(self) -> int:
        return sum(p.numel() for p in self.parameters)


def pack(bucket: Bucket, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor]:
    """The gradients of a bucket as they are sent: as stored already, or rounded once here; (codes, scales)."""
    with record_function(f"{bucket.name}/pack"):
        grads = [None if p.grad is None else stored_as(p.grad, rule) for p in bucket.parameters]
        return layout.pack(grads, rule.format, bucket.device)


def mean_of_shard(
    bucket: Bucket, layout: Layout, packed: tuple[Tensor, Tensor], group: CountedGroup
) -> Steps[tuple[Tensor, Tensor]]:
    """The FP32 mean of this rank's shard of packed gradients, and which of its scales any rank sent."""
    if bucket.sums is not None:
        return bucket.sums.reduce_scatter(*packed, bucket.name)
    return reduce_scatter_quantized(*packed, layout, group, bucket.name)


def reduce_scaled(bucket: Bucket, layout: Layout, rule: Rule, group: CountedGroup) -> Steps[None]:
    """Gradients as they are stored, or rounded once here; a scale of 0 stands for no gradient on this rank."""
    shard = yield from mean_of_shard(bucket, layout, pack(bucket, layout, rule), group)
    payload, scale_inv, present = yield from all_gather_quantized(*shard, layout, rule, group, bucket.name)
    with record_function(f"{bucket.name}/write"):
        means = zip(bucket.parameters, layout.slots, layout.unpack(payload, scale_inv), strict=True)
        for parameter, slot, mean in means:
            if parameter.grad is not None or bool(present[slot.first_scale]):  # reads the device for a missing one only
                write(parameter, ScalingTensor(*mean, rule.block, parameter.dtype), bucket.scattered)


def reduce_plain(bucket: Bucket, group: CountedGroup) -> Steps[None]:
    """A sum in the bucket's dtype of what each rank divided by their number, so that nothing overflows on the way."""
    return _all_reduce_plain(bucket, group, 1.0 / group.world, bucket.dtype, bucket.name)


def sum_partial(bucket: Bucket, group: CountedGroup) -> Steps[None]:
    """The sum over the tensor-parallel ranks, in FP32: each holds the part of its own samples' tokens."""
    return _all_reduce_plain(bucket, group, 1.0, torch.float32, f"{bucket.name}/partial")


def _all_reduce_plain(
    bucket: Bucket, group: CountedGroup, factor: float, dtype: torch.dtype, label: str
) -> Steps[None]:
    """The sum of ``factor`` times each rank's gradients; one more element a parameter says whether any rank had one."""
    with record_function(f"{label}/all_reduce"):
        flat = torch.zeros(bucket.num_elements + len(bucket.parameters), dtype=dtype, device=bucket.device)
        *views, present = flat.split([*(p.numel() for p in bucket.parameters), len(bucket.parameters)])
        for position, (parameter, view) in enumerate(zip(bucket.parameters, views, strict=True)):
            if parameter.grad is not None:
                if parameter.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"gradients are reduced as dense tensors, got {parameter.grad.layout}; "
                        "build the embedding with sparse=False"
                    )
                view.view(parameter.shape).copy_(real(parameter.grad, dtype))
                present[position] = 1
        work = group.all_reduce(flat.mul_(factor), dist.ReduceOp.SUM, label)
    yield
    with record_function(f"{label}/write"):
        work.wait()
        for position, (parameter, view) in enumerate(zip(bucket.parameters, views, strict=True)):
            if parameter.grad is not None or bool(present[position] > 0):
                total = view.view(parameter.shape)
                stored = isinstance(parameter, ScalingTensor)
                write(parameter, unscaled(total, parameter.dtype) if stored else total, bucket.scattered)


def add(a: Tensor, b: Tensor) -> Tensor:
    """Two gradients of one parameter; of stored ones the sum is BF16, and rounded once when it is stepped."""
    if isinstance(a, ScalingTensor):
        total = unscaled((real(a) + real(b)).to(BF16.dtype), a.dtype)
        total.scattered = a.scattered
        return total
    return a + b


def write(parameter: Tensor, mean: Tensor, scattered: bool) -> None:
    """The mean becomes ``.grad``; a gradient that is there stays the same object, for those who hold it."""
    if isinstance(mean, ScalingTensor):
        mean.scattered = scattered
    if parameter.grad is None:
        parameter.grad = mean
    elif isinstance(parameter.grad, ScalingTensor) and isinstance(mean, ScalingTensor):
        parameter.grad.replace_(mean).scattered = scattered
    else:
        parameter.grad.copy_(mean)
