"""Two hops on four ranks as two nodes of two: the same bits where codes are forwarded, one more rounding where not."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from msamp_like import amp
from msamp_like.comm.buckets import Layout
from msamp_like.comm.collectives import all_reduce_fp8, finish, reduce_scatter_quantized
from msamp_like.comm.data_parallel import DataParallel
from msamp_like.comm.group import CountedGroup
from msamp_like.comm.hierarchical import NodeSums, TwoLevelGroup, by_columns, two_level
from msamp_like.formats import BF16, E4M3, WHOLE
from msamp_like.policy import O2, Role, Rule
from msamp_like.scaling import quantize
from tests.closeness import same_bits, sqnr

SHAPES = [(3, 5), (257, 129), (64, 256), (0, 4), (1000,)]
CPU = torch.device("cpu")


def tensors_of(rank):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator) * 10.0**-i for i, shape in enumerate(SHAPES)]


def test_columns_of_a_grid():
    x = torch.arange(10)
    assert by_columns(x, [[1, 2, 3], [2, 1, 1]]).tolist() == [0, 6, 7, 1, 2, 8, 3, 4, 5, 9]
    assert by_columns(x[:6], [[1, 1, 1], [1, 1, 1]]).tolist() == [0, 3, 1, 4, 2, 5]
    assert by_columns(x.view(10, 1)[:4], [[1, 1], [1, 1]]).view(-1).tolist() == [0, 2, 1, 3]


# --- forwarded ------------------------------------------------------------------------------------------------------


def exchanged(rank, world, group, per_node):
    """Results of both forms for equal parts, for other sizes and for scales, and who sent how much."""
    two, one = two_level(per_node, group), CountedGroup(group)
    answers = []
    rows = [3, 0, 2, 5][:world]
    for x, splits in (
        (torch.arange(8 * world).view(2 * world, 4) + 1000 * rank, None),
        (torch.arange(sum(rows)) + 100 * rank, rows),
        (torch.randn(world, 2, 3, generator=torch.Generator().manual_seed(rank)), None),
    ):
        (found, work), (expected, flat_work) = (g.all_to_all(x, splits, label="x") for g in (two, one))
        work.wait()
        work.wait()  # a second wait sends nothing more
        flat_work.wait()
        answers.append((found, expected))
    return answers, two.inside.sent, two.across.sent, two.sent, one.sent, [e.axis for e in two.ledger]


@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_two_hops_bring_what_one_brings(ranks, per_node):
    for answers, inside, across, sent, flat, axes in ranks(4, exchanged, per_node):
        assert all(same_bits(found, expected) for found, expected in answers)
        assert sent == inside + across
        assert set(axes) <= {"dp/inside", "dp/across"}
        if per_node in (1, 4):
            assert sent == flat  # one of the hops has one rank
        else:
            assert sent > flat  # what crosses nodes has been inside first


def reduced(rank, world, group, block, hops):
    rule = Rule(format=E4M3, block=block)
    means = all_reduce_fp8(tensors_of(rank), rule, two_level(2, group) if hops == 2 else CountedGroup(group))
    return [(m.payload.view(torch.uint8), m.scale_inv) for m in means]


@pytest.mark.parametrize("block", [WHOLE, (1, 128)])
def test_a_reduction_in_two_hops_has_the_bits_of_the_flat_one(ranks, block):
    two, one = ranks(4, reduced, block, 2), ranks(4, reduced, block, 1)
    for mine, flat in zip(two, one):
        for (codes, scales), (codes1, scales1) in zip(mine, flat):
            assert same_bits(codes, codes1)
            assert same_bits(scales, scales1)


def backward(rank, world, group, hops):
    """Gradients of six layers in six buckets, several under way at once, and the ledger's axes."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(6)))
    model = amp.initialize(model, level="O2", data_parallel=False)[0]
    counted = two_level(2, group) if hops == 2 else CountedGroup(group)
    reducer = DataParallel(model.named_parameters(), rule=O2[Role.GRAD_WEIGHT], group=counted, bucket_bytes=32 * 32)
    model(torch.randn(4, 32, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
    reducer.remove()
    stored = [(p.grad.payload.view(torch.uint8), p.grad.scale_inv) for p in model.parameters()]
    return stored, sorted({(entry.axis, entry.collective) for entry in counted.ledger})


def test_a_backward_in_two_hops_has_the_bits_of_the_flat_one(ranks):
    """The second hop is issued when the first is waited for: in one order on all ranks, others under way."""
    two, one = ranks(4, backward, 2), ranks(4, backward, 1)
    for (stored, axes), (expected, flat_axes) in zip(two, one):
        for (codes, scales), (codes1, scales1) in zip(stored, expected, strict=True):
            assert same_bits(codes, codes1)
            assert same_bits(scales, scales1)
        assert {("dp/inside", "all_to_all"), ("dp/across", "all_to_all")} <= set(axes)
        assert ("dp", "all_to_all") in flat_axes
        assert ("dp", "all_to_all") not in axes


def wrong_nodes(rank, world, group):
    """Rank 0's place is shared with rank 2; here its groups are made the other way around."""
    right = two_level(2, group)
    work = right.all_to_all(torch.zeros(4))[1]
    work.wait()
    assert work.group is right.inside.group  # whose ranks are asked where it fails
    with pytest.raises(ValueError, match=r"two_level\(\)"):
        TwoLevelGroup(group, right.across.group, right.inside.group)
    with pytest.raises(ValueError, match="4 ranks, 3 a node"):
        two_level(3, group)
    with pytest.raises(ValueError, match="1 nodes of 4; use reduce_scatter_quantized"):
        NodeSums(Layout([torch.Size((8,))], WHOLE, world, rank), Rule(format=E4M3), two_level(4, group))
    dist.barrier(group)


def test_groups_in_another_order_are_refused(ranks):
    ranks(4, wrong_nodes)


# --- summed in the node ---------------------------------------------------------------------------------------------


def halves(rank, world, group, block, between, absent):
    """This rank's shard summed in two levels and flat, and the bytes of both."""
    rule = Rule(format=E4M3, block=block)
    layout = Layout([torch.Size(s) for s in SHAPES], block, world, rank)
    stored = [None if i in absent.get(rank, ()) else quantize(x, rule) for i, x in enumerate(tensors_of(rank))]
    packed = layout.pack(stored, rule.format, CPU)
    two, one = two_level(2, group), CountedGroup(group)
    sums = NodeSums(layout, rule, two, between)
    found = finish(sums.reduce_scatter(*packed))
    again = finish(sums.reduce_scatter(*packed))
    assert same_bits(found[0], again[0])
    flat = finish(reduce_scatter_quantized(*packed, layout, one))
    lined = layout.scale_index.unique()  # an empty tensor has a scale and no line to carry it
    found, flat = ((values, present[lined]) for values, present in (found, flat))
    return found, flat, two.across.sent // 2, one.sent


@pytest.mark.parametrize("block", [WHOLE, (1, 128)])
@pytest.mark.parametrize(("between", "least", "most"), [(BF16, 55, 80), (E4M3, 30, 35)])
def test_a_sum_in_the_node_costs_one_rounding(ranks, block, between, least, most):
    """Against the flat FP32 sum: BF16 rounds at 55 dB, E4M3 at 31.5; better here, where many sums of two codes of 4
    bits are exact. The two are 25 dB apart. Shards hold parts of several tensors."""
    answers = ranks(4, halves, block, Rule(format=between), {})
    for (found, present), (expected, expected_present), _, _ in answers:
        assert least < sqnr(expected, found) < most
        assert torch.equal(present, expected_present)


def test_bytes_across_nodes_halve_with_two_ranks_a_node(ranks):
    """Flat: 2 of 4 parts of one byte go to the other node. Summed: 1 part, with a scale of 4 bytes a line of 128."""
    answers = ranks(4, halves, WHOLE, Rule(format=E4M3), {})
    elements = sum(Layout([torch.Size(s) for s in SHAPES], WHOLE, 4, 0).line_splits) * 128
    for _, _, across, flat in answers:
        assert across == elements / 4 * (1 + 4 / 128)
        assert flat >= elements * 3 / 4


def test_a_gradient_that_some_ranks_lack_counts_as_zeros(ranks):
    """Tensor 1 is missing on one rank of a node, tensor 2 on a whole node, tensor 4 everywhere. Zeros stay zeros, and
    the rest is as far off as one more rounding."""
    absent = {0: (1, 2, 4), 1: (2, 4), 2: (4,), 3: (4,)}
    answers = ranks(4, halves, WHOLE, Rule(format=E4M3), absent)
    for (found, present), (expected, expected_present), _, _ in answers:
        assert torch.equal(present, expected_present)
        assert (found[expected == 0] == 0).all()
        assert sqnr(expected, found) > 29
    assert not all(present.all() for (_, present), _, _, _ in answers)


def empty_first(rank, world, group):
    """A bucket that starts with an empty tensor, whose scale no line has; then one larger by far than the next."""
    rule, tensors = Rule(format=E4M3), [torch.ones(0, 4), torch.full((4, 64), 1000.0), torch.full((4, 64), 0.001)]
    layout = Layout([t.shape for t in tensors], WHOLE, world, rank)
    packed = layout.pack([quantize(x, rule) for x in tensors], rule.format, CPU)
    flat = finish(reduce_scatter_quantized(*packed, layout, CountedGroup(group)))[0]
    return finish(NodeSums(layout, rule, two_level(2, group)).reduce_scatter(*packed))[0], flat


def test_an_empty_tensor_does_not_shift_the_scales_of_the_next(ranks):
    for found, expected in ranks(4, empty_first):
        assert sqnr(expected, found) > 55


def owned(rank, world, group, owners):
    """The same with whole tensors at their owners, one of whom may have none."""
    rule, shapes = Rule(format=E4M3, block=(1, 128)), [torch.Size(s) for s in SHAPES]
    layout = Layout(shapes, rule.block, world, rank, owners=owners)
    packed = layout.pack([quantize(x, rule) for x in tensors_of(rank)], rule.format, CPU)
    two = two_level(2, group)
    found = finish(NodeSums(layout, rule, two).reduce_scatter(*packed))[0]
    forwarded = finish(reduce_scatter_quantized(*packed, layout, two))[0]
    return found, forwarded, finish(reduce_scatter_quantized(*packed, layout, CountedGroup(group)))[0]


@pytest.mark.parametrize("owners", [[0, 1, 2, 3, 3], [0, 0, 2, 2, 3]])
def test_whole_tensors_reach_their_owners(ranks, owners):
    """Shards of very different length: 3 lines, 514, 128, none."""
    for rank, (found, forwarded, expected) in enumerate(ranks(4, owned, owners)):
        assert same_bits(forwarded, expected)
        assert found.shape == expected.shape
        assert (rank in owners) == bool(len(expected))
        assert not len(expected) or sqnr(expected, found) > 55


def counted(rank, world, group):
    """The ledger over two steps."""
    two, x = two_level(2, group), torch.zeros(8)
    for _ in range(2):
        two.all_to_all(x, label="a")[1].wait()
        two.all_to_all(x, label="a/scales")[1].wait()
        two.all_gather(x, label="b")[1].wait()
        two.end_step()
    return two.sent, two.sent_under(["a"]), two.sent_under(["b"]), len(two.ledger)


def test_a_ledger_holds_one_step(ranks):
    """Each all-to-all of 32 bytes sends half of them on either hop; the gather all of them to three ranks."""
    assert ranks(4, counted) == [(2 * 32 + 96, 64, 96, 5)] * 4


def flagged(rank, world, group):
    """A non-finite gradient on one rank."""
    rule, x = Rule(format=E4M3), torch.ones(64, 64)
    if rank == 3:
        x[0, 0] = float("nan")
    layout = Layout([x.shape], WHOLE, world, rank)
    two = two_level(2, group)
    packed = layout.pack([quantize(x, rule)], rule.format, CPU)
    return [finish(NodeSums(layout, rule, two, Rule(format=f)).reduce_scatter(*packed))[0] for f in (BF16, E4M3)]


def test_a_non_finite_gradient_stays_non_finite(ranks):
    for answers in ranks(4, flagged):
        assert not any(torch.isfinite(values).any() for values in answers)
