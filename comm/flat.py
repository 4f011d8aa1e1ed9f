"""A reduce-scatter of flat buffers in which some stretches are scaled and others plain.

A host that shards a model by itself (PyTorch's FSDP2) hands over one flat buffer a group of parameters, row r of which
goes to rank r. Stretches of matrices whose rule has a scale are cut into lines of 128 elements, each quantized with its
own scale; codes and scales go to the owner, who sums in FP32 in rank order. Plain stretches go as they are and are
summed alike, so the result does not depend on a backend's own order. No line crosses from one stretch into the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from msamp_like import kernels
from msamp_like.comm.buckets import LINE
from msamp_like.comm.collectives import Steps
from msamp_like.comm.group import CountedGroup
from msamp_like.formats import ROW
from msamp_like.policy import Rule


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """``numel`` neighbouring elements of one parameter's shard, and whether they travel scaled."""

    numel: int
    scaled: bool


def reduce_scatter_flat(
    buffer: Tensor, stretches: Sequence[Stretch], rule: Rule, group: CountedGroup, label: str = "flat"
) -> Steps[Tensor]:
    """The FP32 sum over ranks of this rank's row of ``buffer`` (world, elements); ``stretches`` fill a row.

    Sends, to each other rank, one code an element and one FP32 scale a line of the scaled stretches (at most 127 zeros
    fill up the last line of each), and the plain ones in the buffer's dtype. A non-finite value makes its line NaN.
    """
    parts = list(zip(stretches, buffer.split([s.numel for s in stretches], dim=1), strict=True))
    scaled = _sum_scaled([part for s, part in parts if s.scaled], rule, group, label)
    plain = _sum_plain([part for s, part in parts if not s.scaled], group, label)
    next(scaled)
    next(plain)
    yield
    sums = {True: (yield from scaled), False: (yield from plain)}
    return torch.cat([sums[s.scaled].pop(0) for s in stretches])


def _sum_scaled(parts: Sequence[Tensor], rule: Rule, group: CountedGroup, label: str) -> Steps[list[Tensor]]:
    if not parts:
        yield
        return []
    with record_function(f"{label}/quantize"):
        lines = torch.cat([torch.nn.functional.pad(part, (0, -part.shape[1] % LINE)) for part in parts], dim=1)
        payload, scale_inv, _ = kernels.quantize_current(
            lines.view(-1, LINE), rule.format, ROW, rule.margin, rule.power_of_two
        )
        codes, codes_work = group.all_to_all(payload.view(torch.uint8).view(group.world, -1), label=label)
        scales, scales_work = group.all_to_all(scale_inv.view(group.world, -1, 1), label=f"{label}/scales")
    yield
    with record_function(f"{label}/sum"):
        codes_work.wait()
        scales_work.wait()
        payloads = codes.view(payload.dtype).view(group.world, -1, LINE)
        rows = (kernels.dequantize(p, s, ROW, torch.float32) for p, s in zip(payloads, scales, strict=True))
        filled = _total(rows).view(-1).split([part.shape[1] + -part.shape[1] % LINE for part in parts])
        return [line[: part.shape[1]] for line, part in zip(filled, parts, strict=True)]


def _sum_plain(parts: Sequence[Tensor], group: CountedGroup, label: str) -> Steps[list[Tensor]]:
    if not parts:
        yield
        return []
    received, work = group.all_to_all(torch.cat(list(parts), dim=1), label=f"{label}/plain")
    yield
    work.wait()
    total = _total(row.to(torch.float32, copy=True) for row in received)
    return list(total.split([part.shape[1] for part in parts]))


def _total(rows: Iterable[Tensor]) -> Tensor:
    """The sum in the order given, in the first one's memory."""
    remaining = iter(rows)  # one at a time: all of them would be as many buffers as there are ranks
    total = next(remaining)
    for row in remaining:
        total += row
    return total
