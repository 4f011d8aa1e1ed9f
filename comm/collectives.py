"""Collectives on scaled tensors: codes and scales travel, sums are taken in FP32.

Peng et al., "FP8-LM: Training FP8 Large Language Models", 2023, https://arxiv.org/abs/2310.18313, section 2.1, send
gradients in FP8 and sum them in FP8, inside a patched NCCL. Here any backend will do, and the sum is exact in FP32. An
all-reduce is two halves around that sum:

    reduce_scatter_quantized   each rank sends every other the codes of its shard, with the sender's own scales;
                               the owner dequantizes and sums in FP32, times 1/world
    all_gather_quantized       one MAX all-reduce of amax agrees on the scales; requantize, all-gather the codes

Codes travel as uint8, whatever they mean: gloo refuses float8 tensors, and no sum or maximum of codes means anything.
Every shard is summed by one rank in rank order and copied to all, so the result has the same bits everywhere.

Each half is a generator that yields while bytes travel, so that a caller keeps several going; :func:`finish` runs one
to its end. Collectives are then issued in the order of the caller's steps, which has to be the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from msamp_like import kernels
from msamp_like.comm.agreement import agree, described
from msamp_like.comm.buckets import Layout
from msamp_like.comm.group import CountedGroup
from msamp_like.formats import ROW
from msamp_like.policy import Rule
from msamp_like.scaling import quantize
from msamp_like.tensor import ScalingTensor

T = TypeVar("T")
Steps = Generator[None, None, T]


def finish(steps: Steps[T]) -> T:
    """Run the steps of a collective to the end and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


# --- the two halves -------------------------------------------------------------------------------------------------


def reduce_scatter_quantized(
    payload: Tensor, scale_inv: Tensor, layout: Layout, group: CountedGroup, label: str = "comm"
) -> Steps[tuple[Tensor, Tensor]]:
    """The FP32 mean of this rank's shard of a packed bucket, and which of its scales any rank sent.

    ``payload`` (lines, width) and ``scale_inv`` (scales,) are this rank's own; a scale of 0 says that this rank has
    nothing for those elements, which then count as zeros. Returns (lines of the shard, width) FP32 and, over
    ``layout.own_scales``, bool. Sends the codes and scales of all shards but its own.
    """
    with record_function(f"{label}/all_to_all"):
        codes, codes_work = group.all_to_all(payload.view(torch.uint8), layout.line_splits, label=label)
        ranges = layout.scale_ranges
        splits = [end - start for start, end in ranges]
        needed = torch.cat([scale_inv[start:end] for start, end in ranges])
        scales, scales_work = group.all_to_all(needed, splits, label=f"{label}/scales")
    yield
    with record_function(f"{label}/sum"):
        codes_work.wait()
        scales_work.wait()
        shards = codes.view(payload.dtype).view(layout.world, -1, layout.width)
        scales = scales.view(layout.world, -1)
        line_scales = scales.index_select(1, layout.scale_index).unsqueeze(2)
        total = kernels.dequantize(shards[0], line_scales[0], ROW, torch.float32)
        for shard, line_scale in zip(shards[1:], line_scales[1:], strict=True):
            total += kernels.dequantize(shard, line_scale, ROW, torch.float32)
        return total.mul_(1.0 / layout.world), (scales != 0).any(dim=0)


def all_gather_quantized(
    values: Tensor, present: Tensor, layout: Layout, rule: Rule, group: CountedGroup, label: str = "comm"
) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    """Every rank's shard of FP32 values on all ranks, quantized with scales that all agree on.

    ``values`` (lines, width) and ``present`` are as :func:`reduce_scatter_quantized` returns them. Returns the payload
    (lines of all, width), the scales (scales,), +inf where a value was not finite, and which scales any rank sent.
    Sends the codes of its shard to each other rank, and one FP32 amax a scale in a MAX all-reduce.
    """
    with record_function(f"{label}/amax"):
        amax = torch.full((layout.num_scales,), -1.0, device=values.device)  # below every amax: no rank sent this scale
        amax[layout.own_scales] = torch.where(
            present, _amax_by_scale(values, layout.scale_index, present.numel()), -1.0
        )
        work = group.all_reduce(amax, dist.ReduceOp.MAX, f"{label}/scales")
    yield
    with record_function(f"{label}/all_gather"):
        work.wait()
        scale_inv, codes = _quantized_lines(values, amax[layout.own_scales], layout, rule)
        gathered, work = group.all_gather(codes.view(torch.uint8), layout.line_splits, label)
    yield
    work.wait()
    scale_inv = kernels.scale_inv_from_amax(amax.clamp(min=0), rule.format, rule.margin, rule.power_of_two)
    return gathered.view(codes.dtype), scale_inv, amax >= 0


def quantize_own(values: Tensor, present: Tensor, layout: Layout, rule: Rule) -> list[tuple[Tensor, Tensor]]:
    """What :func:`reduce_scatter_quantized` returns, as (payload, scales) of each tensor that this rank owns.

    The same bits as :func:`all_gather_quantized` gives, for an owner has all of a tensor: there is nothing to agree on.
    """
    amax = _amax_by_scale(values, layout.scale_index, present.numel())
    scale_inv, codes = _quantized_lines(values, amax, layout, rule)
    return layout.unpack_own(codes, scale_inv)


def _quantized_lines(values: Tensor, amax: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor]:
    """The shard's scales (scales of the shard,) and its codes (lines, width)."""
    scale_inv = kernels.scale_inv_from_amax(amax.clamp(min=0), rule.format, rule.margin, rule.power_of_two)
    line_scale = scale_inv.index_select(0, layout.scale_index).unsqueeze(1)
    return scale_inv, kernels.quantize(values, line_scale, rule.format, ROW)


def _amax_by_scale(values: Tensor, index: Tensor, num_scales: int) -> Tensor:
    """Largest magnitude under each scale; +inf for a NaN, which would not survive gloo's MAX."""
    lines = kernels.amax(values, ROW).view(-1)
    lines = torch.where(torch.isfinite(lines), lines, torch.inf)
    return torch.zeros(num_scales, device=values.device).scatter_reduce_(0, index, lines, "amax")


def all_reduce_quantized(
    payload: Tensor, scale_inv: Tensor, layout: Layout, rule: Rule, group: CountedGroup, label: str = "comm"
) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    """Both halves: the mean over ranks of a packed bucket, as :func:`all_gather_quantized` returns it."""
    values, present = yield from reduce_scatter_quantized(payload, scale_inv, layout, group, label)
    return (yield from all_gather_quantized(values, present, layout, rule, group, label))


def stored_as(tensor: Tensor, rule: Rule) -> ScalingTensor:
    """``tensor`` as the rule stores it: itself where it is so already, else rounded once."""
    if isinstance(tensor, ScalingTensor) and tensor.format is rule.format and tensor.block == rule.block:
        return tensor
    return quantize(tensor, rule)


def all_reduce_fp8(tensors: Sequence[Tensor], rule: Rule, group: CountedGroup | None = None) -> list[ScalingTensor]:
    """The mean of each tensor over all ranks, stored as ``rule`` says, the same bits on every rank.

    The tensors may be plain or stored already; shapes are the same on every rank. Sends about 2 (world - 1) / world
    bytes an element in an 8-bit format, half of what a ring all-reduce in BF16 sends.
    """
    group = group or CountedGroup()
    device = tensors[0].device
    layout = Layout([t.shape for t in tensors], rule.block, group.world, group.rank, device)
    stored = [stored_as(t, rule) for t in tensors]
    packed = layout.pack(stored, rule.format, device)
    payload, scale_inv, _ = finish(all_reduce_quantized(*packed, layout, rule, group))
    means = zip(layout.unpack(payload, scale_inv), tensors, strict=True)
    return [ScalingTensor(*mean, rule.block, tensor.dtype) for mean, tensor in means]


# --- replicas -------------------------------------------------------------------------------------------------------


def replicate(named: Sequence[tuple[str, Tensor]], group: CountedGroup) -> None:
    """Every rank's tensors become the first rank's; raises ValueError on every rank if they are not the same kinds."""
    if group.world > 1:
        agree({"tensor": described(named)}, group, named[0][1].device if named else torch.device("cpu"))
        broadcast_from_first([tensor for _, tensor in named], group)


def broadcast_from_first(tensors: Iterable[Tensor], group: CountedGroup, chunk_bytes: int = 64 << 20) -> None:
    """Every tensor becomes the first rank's, bit for bit, in place; a ScalingTensor's payload and scales alike."""
    with torch.no_grad():
        for chunk in _chunks(_stored(tensors), chunk_bytes):
            flat = torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in chunk])
            group.broadcast(flat, label="replicate")
            for tensor, raw in zip(chunk, flat.split([t.nbytes for t in chunk]), strict=True):
                aligned = raw.clone()  # a slice may start where the dtype cannot
                tensor.copy_(aligned.view(tensor.dtype).view(tensor.shape))


def _stored(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        if isinstance(tensor, ScalingTensor):
            tensor.drop_casts()
            yield from (tensor.payload, tensor.scale_inv)
        elif tensor.numel():
            yield tensor.detach()


def _chunks(tensors: Iterable[Tensor], chunk_bytes: int) -> Iterator[list[Tensor]]:
    chunk: list[Tensor] = []
    for tensor in tensors:
        if chunk and sum(t.nbytes for t in chunk) + tensor.nbytes > chunk_bytes:
            yield chunk
            chunk = []
        chunk.append(tensor)
    if chunk:
        yield chunk
