"""Sums of stored tensors over ranks: near the FP32 mean, the same bits everywhere, and no arithmetic on codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msamp_like import kernels
from msamp_like.comm.buckets import Layout, assign
from msamp_like.comm.collectives import (
    all_gather_quantized,
    all_reduce_fp8,
    broadcast_from_first,
    finish,
    reduce_scatter_quantized,
)
from msamp_like.comm.group import CountedGroup, ring_bytes
from msamp_like.formats import E4M3, E5M2, FP16, ROW, WHOLE
from msamp_like.policy import Rule
from msamp_like.scaling import quantize
from msamp_like.tensor import ScalingTensor
from tests.distributed.spy import Spy

BLOCKS = [WHOLE, ROW, (1, 128), (1, 32), (128, 128), (4, -1), (-1, 16)]
CPU = torch.device("cpu")
SHAPES = [(1,), (3, 5), (257, 129), (64, 256), (2, 3, 40), (0, 4), (1, 1000)]


def db(error: Tensor, signal: Tensor) -> float:
    """Signal over error in dB."""
    return float(10 * torch.log10(signal.double().square().sum() / error.double().square().sum()))


def locals_of(rank: int, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Each rank's own gradients: N(0, 1) times another power of ten for every tensor."""
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randn(shape, generator=generator) * 10.0 ** (2 - i) for i, shape in enumerate(shapes)]


# --- layout, in one process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("owned", [False, True])
def test_every_line_has_the_scale_of_its_elements(block, world, owned):
    """Dequantizing by lines is dequantizing by blocks, and what was packed comes back, for every rank's shard."""
    stored = [quantize(x, Rule(format=E4M3, block=block)) for x in locals_of(0, SHAPES)]
    owners = sorted(i * i % world for i in range(len(stored))) if owned else None
    layouts = [Layout([s.shape for s in stored], block, world, rank, owners=owners) for rank in range(world)]
    payload, scales = layouts[0].pack(stored, E4M3, CPU)
    shards = []
    for layout, shard in zip(layouts, payload.split(layouts[0].line_splits)):
        line_scale = scales[layout.own_scales][layout.scale_index].unsqueeze(1)
        shards.append(kernels.dequantize(shard, line_scale, ROW, torch.float32))
    values, parts = layouts[0].unpack(torch.cat(shards), scales), layouts[0].unpack(payload, scales)
    for (value, _), (codes, grid), tensor in zip(values, parts, stored):
        assert torch.equal(value, tensor.dequantize(torch.float32))
        assert torch.equal(codes.view(torch.uint8), tensor.payload.view(torch.uint8))
        assert torch.equal(grid, tensor.scale_inv)


def test_whole_tensors_come_back_as_views():
    layout = Layout([torch.Size(s) for s in SHAPES], WHOLE, 2, 0)
    bucket, scales = layout.pack([None] * len(SHAPES), E4M3, CPU)
    start = bucket.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() == start for part, _ in layout.unpack(bucket, scales))
    assert bucket.nbytes <= sum(-(-torch.Size(s).numel() // 128) * 128 for s in SHAPES) + 128


def test_buckets_are_neighbours_of_one_kind_in_order_of_completion():
    sizes = [("a", 40), ("b", 1), ("a", 40), ("a", 40), ("b", 1), ("a", 500), ("b", 1)]
    assert assign(sizes, 100) == [[0, 2], [3], [5], [1, 4, 6]]
    assert assign(sizes, 1) == [[0], [1], [2], [3], [4], [5], [6]]
    assert assign([], 100) == []


# --- on ranks -------------------------------------------------------------------------------------------------------


def reduced(rank, world, group, rule, shapes):
    means = all_reduce_fp8(locals_of(rank, shapes), rule)
    return [(m.payload.view(torch.uint8), m.scale_inv, m.dequantize()) for m in means]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("block", [WHOLE, (1, 128), (128, 128), (-1, 16)])
def test_mean_has_the_same_bits_on_all_ranks_and_two_roundings(ranks, world, block):
    """E4M3 rounds N(0, 1) at about 31 dB, once on each leg; independent errors add up to 28. A tensor of a few elements
    has a few errors, so those are judged against the largest element: 2^-4 of it, once or twice, is an ulp's half."""
    rule = Rule(format=E4M3, block=block)
    answers = ranks(world, reduced, rule, SHAPES)
    for answer in answers[1:]:
        for (codes, scales, _), (codes0, scales0, _) in zip(answer, answers[0]):
            assert torch.equal(codes, codes0)
            assert torch.equal(scales, scales0)
    every = [locals_of(rank, SHAPES) for rank in range(world)]
    for i, shape in enumerate(SHAPES):
        mean = torch.stack([one[i] for one in every]).mean(0)
        found = answers[0][i][2]
        assert found.shape == torch.Size(shape)
        if mean.numel() > 1000:
            assert db(found - mean, mean) > 27.5, shape
        elif mean.numel():
            largest = max(one[i].abs().max() for one in every)
            assert (found - mean).abs().max() <= 2 * 2**-4 * largest


@pytest.mark.parametrize(("rule", "least"), [(Rule(format=FP16), 70), (Rule(format=E5M2), 21)])
def test_other_formats(ranks, rule, least):
    """Each bit of mantissa is worth 6 dB; E5M2 stands near 25 a rounding, FP16 near 74."""
    answers = ranks(2, reduced, rule, [(64, 256)])
    mean = (locals_of(0, [(64, 256)])[0] + locals_of(1, [(64, 256)])[0]) / 2
    assert torch.equal(answers[0][0][0], answers[1][0][0])
    assert db(answers[0][0][2] - mean, mean) > least


def exact_half(rank, world, group, rule, shapes):
    """The reduce-scatter half alone, and every rank's stored tensors."""
    counted = CountedGroup()
    layout = Layout([torch.Size(s) for s in shapes], rule.block, world, rank)
    stored = [quantize(x, rule) for x in locals_of(rank, shapes)]
    values, present = finish(reduce_scatter_quantized(*layout.pack(stored, rule.format, CPU), layout, counted))
    return values, present, [s.dequantize() for s in stored]


def test_the_first_half_is_the_fp32_sum_bit_for_bit(ranks):
    shapes, world = [(33, 65), (7,)], 4
    answers = ranks(world, exact_half, Rule(format=E4M3), shapes)
    layout = Layout([torch.Size(s) for s in shapes], WHOLE, world, 0)
    found = layout.unpack(torch.stack([values for values, _, _ in answers]), torch.ones(len(shapes)))
    for i, (tensor, _) in enumerate(found):
        total = answers[0][2][i].clone()
        for rank in range(1, world):
            total += answers[rank][2][i]
        assert torch.equal(tensor, total / world)
    assert all(present.all() for _, present, _ in answers)


def test_a_sum_of_codes_is_not_a_sum(ranks):
    """The negative control: what adding bytes, or values under unlike scales, gives is nowhere near the mean."""
    every = [locals_of(rank, [(64, 256)])[0] * 3.0 ** (rank + 1) for rank in range(2)]
    stored = [quantize(x, Rule(format=E4M3)) for x in every]
    mean = (every[0] + every[1]) / 2
    codes = stored[0].payload.view(torch.uint8) + stored[1].payload.view(torch.uint8)
    of_codes = codes.view(torch.float8_e4m3fn).float().nan_to_num() * stored[0].scale_inv / 2
    of_payloads = (stored[0].payload.float() + stored[1].payload.float()) * stored[0].scale_inv / 2
    assert db(of_codes - mean, mean) < 5
    assert db(of_payloads - mean, mean) < 10


def chain_in_e4m3(stored: list[ScalingTensor], scale_inv: Tensor) -> Tensor:
    """A ring's sum in E4M3 under a shared scale, rounded after every hop."""
    total = torch.zeros(stored[0].shape)
    for tensor in stored:
        total = (total + tensor.dequantize() / scale_inv).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return total * scale_inv / len(stored)


def test_rounding_after_every_hop_fails_the_same_check():
    """The negative control of the 27.5 dB above: without the FP32 sum, eight ranks are below it."""
    every = [locals_of(rank, [(64, 256)])[0] for rank in range(8)]
    stored = [quantize(x, Rule(format=E4M3)) for x in every]
    mean = torch.stack(every).mean(0)
    shared = quantize(torch.stack(every).sum(0), Rule(format=E4M3)).scale_inv * 2
    assert db(chain_in_e4m3(stored, shared) - mean, mean) < 27.5


def partly(rank, world, group, special):
    """Three tensors: one that rank 1 lacks, one that all lack, one that is not finite on the last rank."""
    counted, rule = CountedGroup(), Rule(format=E4M3)
    shapes = [torch.Size((40, 50)), torch.Size((3, 4)), torch.Size((30, 30))]
    x = [torch.full((40, 50), float(rank + 1)), None, torch.ones(30, 30)]
    if rank == 1:
        x[0] = None
    if rank == world - 1:
        x[2][3, 4] = special
    stored = [None if t is None else quantize(t, rule) for t in x]
    layout = Layout(shapes, WHOLE, world, rank)
    values, present = finish(reduce_scatter_quantized(*layout.pack(stored, E4M3, CPU), layout, counted))
    payload, scales, sent = finish(all_gather_quantized(values, present, layout, rule, counted))
    return [p.float() * s for p, s in layout.unpack(payload, scales)], scales, sent


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_absence_counts_as_zero_and_a_flag_reaches_all(ranks, special):
    for (present, absent, _), scales, sent in ranks(3, partly, special):
        assert torch.allclose(present, torch.full((40, 50), (1 + 3) / 3), rtol=2**-4)
        assert not absent.any()
        assert sent.tolist() == [True, False, True]
        assert scales.isinf().tolist() == [False, False, True]


def spied(rank, world, group, rule, shapes):
    counted = CountedGroup()
    with Spy(world, rank) as spy:
        all_reduce_fp8(locals_of(rank, shapes), rule, counted)
    return spy.calls, counted.sent


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("block", "most"), [(WHOLE, 0.505), ((1, 128), 0.53)])
def test_what_travels_is_counted_and_no_code_is_summed(ranks, world, block, most):
    shapes = [(256, 256), (129, 128), (1, 7)]
    for calls, counted in ranks(world, spied, Rule(format=E4M3, block=block), shapes):
        assert [c.name for c in calls] == ["alltoall_base", "alltoall_base", "allreduce", "allgather_base"]
        assert [c.dtype for c in calls] == [torch.uint8, torch.float32, torch.float32, torch.uint8]
        assert counted == sum(c.sent for c in calls)
        elements = sum(torch.Size(s).numel() for s in shapes)
        assert counted / ring_bytes(2 * elements, world) < most


def copies(rank, world, group):
    torch.manual_seed(rank)
    tensors = [
        torch.randn(3),
        torch.tensor(rank),
        torch.tensor([bool(rank)] * 3),
        quantize(torch.randn(5, 7), Rule(format=FP16, block=(1, 4))),
        torch.randn(4, 6).t(),
        torch.empty(0),
        torch.randn(1000),
    ]
    broadcast_from_first(tensors, CountedGroup(), chunk_bytes=100)
    return [t.dequantize() if isinstance(t, ScalingTensor) else t for t in tensors]


def test_broadcast_copies_bytes_of_every_kind(ranks):
    first, *others = ranks(3, copies)
    assert first[1].item() == 0
    assert first[4].stride() == (1, 6)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))
