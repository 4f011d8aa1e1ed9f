"""Activations on the wire: codes with their scales in one message, sums in FP32, one rounding a leg.

A rule says what travels. With a scale (O1 to O3, role PARTIAL_OUTPUT) a tensor is quantized in blocks of its last dim
and codes and scales are one message of bytes: no rank waits for an amax. Without one (O0) it travels in the rule's
format, and under no rule at all in its own dtype. Either way the sum is the receiver's, in FP32 and in rank order: it
has the same bits in every run, and every backend that moves bytes will do.

A whole tensor travels in one collective; or part by part, each to or from one other rank, so that the caller works on a
part while the next is on its way. What comes out has the same bits, and as many bytes are sent.

A rank's own part of a sum never travels and is not rounded. What is gathered is decoded from the message, the own part
too, so that all ranks hold identical bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from msamp_like import kernels
from msamp_like.comm.collectives import Steps, finish
from msamp_like.comm.group import CountedGroup, Pending
from msamp_like.formats import Block
from msamp_like.policy import Rule


def check_rule(rule: Rule) -> None:
    """Raises ValueError unless activations can travel as ``rule`` says."""
    if rule.history:
        raise ValueError(
            f"the scales of a partial output travel with it, got a rule with history={rule.history}; "
            "use Rule(..., history=0) for Role.PARTIAL_OUTPUT"
        )
    if rule.rounding != "nearest":
        raise ValueError(
            f"a partial output is rounded to nearest, got a rule with rounding={rule.rounding!r}; "
            "use Rule(..., rounding='nearest') for Role.PARTIAL_OUTPUT"
        )
    if rule.format.scaled and rule.block[0] not in (1, -1):
        raise ValueError(
            f"a block of a partial output has 1 row, or -1 for a whole part, got {rule.block}; for example (1, 128)"
        )


def message_bytes(rows: int, columns: int, rule: Rule | None, dtype: torch.dtype) -> int:
    """Bytes of one part of ``rows`` by ``columns`` elements as it travels, its scales included."""
    if rule is None or not rule.format.scaled:
        return rows * columns * (dtype.itemsize if rule is None else rule.format.bytes)
    block_columns = columns if rule.block[1] == -1 else rule.block[1]
    num_scales = (1 if rule.block[0] == -1 else rows) * math.ceil(columns / block_columns)
    return rows * columns * rule.format.bytes + num_scales * torch.float32.itemsize


def all_gather(
    x: Tensor, dim: int, rule: Rule | None, group: CountedGroup, label: str, dtype: torch.dtype | None = None
) -> Tensor:
    """Every rank's ``x`` side by side along ``dim``, the same bits on all, in ``dtype`` or else that of ``x``.

    Shapes are the same on all ranks. Sends world - 1 copies of the message.
    """
    with record_function(f"{label}/all_gather"):
        shape = (group.world, math.prod(x.shape[:-1]), x.shape[-1])
        group.plan("all_gather", label, (group.world - 1) * message_bytes(shape[1], shape[2], rule, x.dtype))
        gathered, work = group.all_gather(_encoded(x.reshape(1, *shape[1:]), rule), label=label)
        work.wait()
        stacked = _decoded(gathered, shape, rule, x.dtype).to(dtype or x.dtype).view(group.world, *x.shape)
        dim %= x.dim()
        return stacked.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(x: Tensor, dim: int, rule: Rule | None, group: CountedGroup, label: str) -> Tensor:
    """This rank's part, along ``dim``, of the sum of all ranks' ``x``; the sum is FP32, the result has ``x.dtype``.

    ``dim`` divides by the ranks. Sends (world - 1) / world of the message.
    """
    return finish(reduce_scatter_steps(x, dim, rule, group, label))


def reduce_scatter_steps(x: Tensor, dim: int, rule: Rule | None, group: CountedGroup, label: str) -> Steps[Tensor]:
    """As :func:`reduce_scatter`; yields once, while the message travels."""
    return (yield from _sum_of_own_part(x, dim, rule, group, label)).to(x.dtype)


def gather_parts(x: Tensor, rule: Rule | None, group: CountedGroup, label: str) -> Iterator[tuple[int, Tensor]]:
    """(rank, its ``x``) of every rank: this one's at once, the others' as they arrive; what :func:`all_gather` gives.

    All messages are under way when this returns. Sends world - 1 copies of the message, each in its own collective.
    """
    with record_function(f"{label}/all_gather"):
        shape = (1, math.prod(x.shape[:-1]), x.shape[-1])
        group.plan("all_to_all", label, (group.world - 1) * message_bytes(shape[1], shape[2], rule, x.dtype))
        message = _encoded(x.reshape(shape), rule)
        travelling = [(distance, *group.pass_on(message, distance, label)) for distance in range(1, group.world)]

    def arrivals() -> Iterator[tuple[int, Tensor]]:
        yield group.rank, _decoded(message, shape, rule, x.dtype).to(x.dtype).view(x.shape)
        for distance, received, work in travelling:
            work.wait()
            source = (group.rank - distance) % group.world
            yield source, _decoded(received, shape, rule, x.dtype).to(x.dtype).view(x.shape)

    return arrivals()


def reduce_scatter_parts(make: Callable[[int], Tensor], rule: Rule | None, group: CountedGroup, label: str) -> Tensor:
    """The sum of all ranks' ``make(r)``, (rows, columns), on every rank r; what :func:`reduce_scatter` gives.

    A part travels while the next is made, this rank's own last. Sends world - 1 parts, each in a collective of its own.
    """
    travelling: dict[int, tuple[Tensor, Pending]] = {}
    for distance in range(1, group.world):
        part = make((group.rank + distance) % group.world)
        with record_function(f"{label}/reduce_scatter"):
            rows, columns = part.shape
            group.plan("all_to_all", label, message_bytes(rows, columns, rule, part.dtype))
            message = _encoded(part.unsqueeze(0), rule)
            travelling[(group.rank - distance) % group.world] = group.pass_on(message, distance, label)
    own = make(group.rank)
    with record_function(f"{label}/sum"):
        for _, work in travelling.values():
            work.wait()
        received = {rank: message for rank, (message, _) in travelling.items()}
        return _sum(own, received, rule, group).to(own.dtype)


def all_reduce(x: Tensor, rule: Rule | None, group: CountedGroup, label: str) -> Tensor:
    """The sum of all ranks' ``x``, the same bits on all: both halves over its rows, so two roundings.

    Sends 2 (world - 1) / world of the message, as a ring does; rows that do not divide by the ranks are padded.
    """
    rows = x.reshape(-1, x.shape[-1])
    padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % group.world))
    own = finish(_sum_of_own_part(padded, 0, rule, group, label))
    if rule is None:
        own = own.to(x.dtype)
    return all_gather(own, 0, rule, group, label, x.dtype)[: rows.shape[0]].view(x.shape)


def own_part(x: Tensor, dim: int, group: CountedGroup) -> Tensor:
    """This rank's part of ``x`` along ``dim``, contiguous, of a tensor that every rank holds."""
    return x.chunk(group.world, dim)[group.rank].contiguous()


def _sum_of_own_part(x: Tensor, dim: int, rule: Rule | None, group: CountedGroup, label: str) -> Steps[Tensor]:
    with record_function(f"{label}/reduce_scatter"):
        dim %= x.dim()
        parts = x.unflatten(dim, (group.world, -1)).movedim(dim, 0).contiguous()
        matrices = parts.view(group.world, -1, x.shape[-1])
        group.plan(
            "all_to_all", label, (group.world - 1) * message_bytes(matrices.shape[1], matrices.shape[2], rule, x.dtype)
        )
        received, work = group.all_to_all(_encoded(matrices, rule), label=label)
    yield
    with record_function(f"{label}/sum"):
        work.wait()
        messages = dict(enumerate(received.split(1)))
        return _sum(matrices[group.rank], messages, rule, group).view(parts.shape[1:])


def _sum(own: Tensor, received: Mapping[int, Tensor], rule: Rule | None, group: CountedGroup) -> Tensor:
    """This rank's part and the others' messages, by rank, in FP32 and in rank order."""
    wide = torch.promote_types(own.dtype, torch.float32)
    total = torch.zeros_like(own, dtype=wide)
    for rank in range(group.world):
        total += own.to(wide) if rank == group.rank else _decoded(received[rank], (1, *own.shape), rule, own.dtype)[0]
    return total


# --- messages -------------------------------------------------------------------------------------------------------


def _block(rule: Rule, rows: int) -> Block:
    """The rule's block on parts that lie one below the other: the whole of each has its own scale."""
    return (rows if rule.block[0] == -1 else 1), rule.block[1]


def _encoded(x: Tensor, rule: Rule | None) -> Tensor:
    """(parts, rows, columns) as bytes, (parts, bytes): the codes of each part, then its scales."""
    parts, rows, _ = x.shape
    if rule is None or not rule.format.scaled:
        plain = x if rule is None else x.to(rule.format.dtype)
        return plain.contiguous().view(parts, -1).view(torch.uint8)
    codes, scale_inv, _ = kernels.quantize_current(
        x.contiguous(), rule.format, _block(rule, rows), rule.margin, rule.power_of_two
    )
    return torch.cat([codes.view(parts, -1).view(torch.uint8), scale_inv.view(parts, -1).view(torch.uint8)], dim=1)


def _decoded(message: Tensor, shape: tuple[int, int, int], rule: Rule | None, dtype: torch.dtype) -> Tensor:
    """What :func:`_encoded` made bytes of: values of ``shape``, in FP32 where they have a scale."""
    _, rows, columns = shape
    if rule is None or not rule.format.scaled:
        return message.view(dtype if rule is None else rule.format.dtype).view(shape)
    code_bytes = rows * columns * rule.format.bytes
    codes = message[:, :code_bytes].contiguous().view(rule.format.dtype).view(shape)
    # a copy, also of one part, whose scales may begin where no FP32 can
    scales = message[:, code_bytes:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    block = _block(rule, rows)
    blocks_of_a_row = 1 if block[1] == -1 else math.ceil(columns / block[1])
    return kernels.dequantize(codes, scales.view(-1, blocks_of_a_row), block, torch.float32)
