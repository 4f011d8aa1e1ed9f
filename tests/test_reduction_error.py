"""benchmarks/reduction_error.py: the simulated ranks are the real ones, and the peers sum as they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import reduction_error
from benchmarks.fp8_sums import fp8_lm, fp8_sums, ring, rounded, tree
from benchmarks.reduction_error import inputs, judge, measure, product, row_figures
from benchmarks.simulated_ranks import simulate
from msamp_like.comm.buckets import Layout
from msamp_like.comm.collectives import all_reduce_fp8, finish, reduce_scatter_quantized
from msamp_like.comm.group import CountedGroup
from msamp_like.comm.hierarchical import NodeSums, two_level
from msamp_like.formats import E4M3, WHOLE
from msamp_like.policy import Rule
from msamp_like.scaling import quantize
from tests.closeness import same_bits, sqnr

SHAPE = (32, 256)
RESULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "reduction_error.json"


# --- the simulation is the product ----------------------------------------------------------------------------------


def on_ranks(rank, world, group, kind, block):
    """This rank's shard after the first half, and the mean after both; and the shard summed in two levels."""
    rule = Rule(format=E4M3, block=block)
    mine = inputs(kind, world, SHAPE)[rank]
    layout = Layout([torch.Size(SHAPE)], block, world, rank)
    packed = layout.pack([quantize(mine, rule)], rule.format, mine.device)
    shard, _ = finish(reduce_scatter_quantized(*packed, layout, CountedGroup(group)))
    mean = all_reduce_fp8([mine], rule, CountedGroup(group))[0].dequantize()
    if world == 2:
        return shard, mean, None
    sums = NodeSums(layout, rule, two_level(2, group), Rule(format=E4M3))
    return shard, mean, finish(sums.reduce_scatter(*packed))[0]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("kind", "block"), [("student_t", WHOLE), ("rows", (1, 128))])
def test_simulated_ranks_give_the_bits_of_gloo_ranks(ranks, world, kind, block):
    answers = ranks(world, on_ranks, kind, block)
    found = product(inputs(kind, world, SHAPE), block)
    layout = Layout([torch.Size(SHAPE)], block, world, 0)
    whole = [
        layout.unpack(torch.stack(shards), torch.ones(layout.num_scales))[0][0]
        for shards in zip(*((shard, summed) for shard, _, summed in answers))
        if shards[0] is not None
    ]
    assert same_bits(found["reduce_scatter"], whole[0])
    assert all(same_bits(found["all_reduce"], mean) for _, mean, _ in answers)
    if world == 4:
        in_nodes = product(inputs(kind, world, SHAPE), block, E4M3)["reduce_scatter"]
        assert same_bits(in_nodes, whole[1])
        assert not same_bits(in_nodes, whole[0])
    other = product(inputs(kind, world, SHAPE, seed=1), block)
    assert not same_bits(other["all_reduce"], found["all_reduce"])  # the comparison can fail


def test_a_simulated_exchange_is_a_transpose():
    def steps(group):
        parts, work = group.all_to_all(torch.tensor([10 * group.rank + r for r in range(3)]))
        uneven, more = group.all_to_all(torch.full((6,), group.rank), [1, 2, 3])
        yield
        work.wait()
        more.wait()
        return parts.tolist(), uneven.tolist()

    answers = simulate(3, steps)
    assert [parts for parts, _ in answers] == [[0, 10, 20], [1, 11, 21], [2, 12, 22]]
    assert [len(uneven) for _, uneven in answers] == [3, 6, 9]
    assert answers[1][1] == [0, 0, 1, 1, 2, 2]


def test_a_rank_that_waits_too_early_is_found():
    """A wait before the others have come to the call would hang on a real group; here it raises."""

    def steps(group):
        group.all_to_all(torch.zeros(2))[1].wait()
        yield

    with pytest.raises(KeyError):
        simulate(2, steps)


# --- the peers ------------------------------------------------------------------------------------------------------


def test_a_ring_without_rounding_is_the_sum_in_any_order():
    x = torch.randint(-8, 8, (5, 33)).float()  # small integers: exact in every order
    total, largest = ring(x, rounding=False)
    assert torch.equal(total, x.sum(0))
    assert (largest >= total.abs()).all()


def test_a_ring_rounds_after_every_hop():
    """Chunk 0 of three ranks is added in the order 1, 2, 0: 16 + 1 rounds to 16 (E4M3 has steps of 2 there), twice."""
    codes = torch.tensor([[1.0, 0, 0], [16.0, 0, 0], [1.0, 0, 0]])
    assert ring(codes)[0][0] == 16
    assert ring(codes, rounding=False)[0][0] == 18
    assert tree(torch.tensor([[16.0], [1.0], [1.0], [1.0]]))[0] == 18  # (16 + 1 = 16) + (1 + 1 = 2)


def test_a_sum_in_fp8_saturates_and_mu_makes_room():
    """Eight equal ranks: without mu the codes of the sum would be eight times too large."""
    same = inputs("identical", 8, SHAPE)
    stored = quantize(same[0], Rule(format=E4M3))
    assert (ring(rounded(stored.dequantize() / stored.scale_inv).flatten().repeat(8, 1))[0] == 448).any()
    mean, mu = fp8_lm(same)
    assert mu == 1 / 8
    assert sqnr(same[0], mean) > 20  # the ring's own roundings alone: three hops of eight do not fit a power of two


def test_sums_in_fp8_lose_with_the_world_and_ours_do_not():
    """A ring rounds partial sums of k = 2 ... N of N(0, 1): noise about N^2 / 2 units against a signal of N, so 3 dB a
    doubling. Ours: one rounding (31.5 dB), two (28.5). 0.7 dB covers 8,192 elements and the partial binades."""
    for world, expected in ((4, 31.5 - 5.6), (16, 31.5 - 10.5)):
        values = inputs("normal", world, SHAPE)
        exact = values.double().mean(0)
        sums = fp8_sums(values, 0)
        assert sqnr(exact, sums["ring"]) == pytest.approx(expected, abs=0.7)
        assert sqnr(exact, sums["ring"]) < sqnr(exact, sums["tree"]) < 27
        ours = product(values, WHOLE)
        assert sqnr(exact, ours["reduce_scatter"]) == pytest.approx(31.5, abs=0.3)
        assert sqnr(exact, ours["all_reduce"]) == pytest.approx(28.4, abs=0.5)


def test_small_rows_survive_in_blocks_only():
    whole, blocks = (measure("rows", 4, block, SHAPE)["all_reduce"] for block in (WHOLE, (1, 128)))
    assert whole["p5_row_db"] < 10
    assert whole["zeroed_share"] > 0.1
    assert blocks["p5_row_db"] > 27
    assert blocks["zeroed_share"] < 0.02


def test_row_figures_of_known_rows():
    exact = torch.ones(3, 4)
    found = exact.clone()
    found[0] *= 1.1
    found[1] *= 1.01
    found[2] = 0
    figures = row_figures(exact, found)
    assert figures["median_row_db"] == pytest.approx(20, abs=0.1)
    assert figures["zeroed_share"] == pytest.approx(1 / 3, abs=1e-6)


# --- the verdict ----------------------------------------------------------------------------------------------------


def test_the_committed_verdict_follows_from_the_committed_figures():
    result = json.loads(RESULT.read_text())
    assert judge(result["sqnr_db"]) == {"reached": True, "control_fails": True}
    assert set(result["sqnr_db"]["normal"]["whole tensor"]) == {str(w) for w in reduction_error.WORLDS}


@pytest.mark.parametrize(("world", "figure"), [("64", 26.9), ("2", 33.0)])
def test_a_fall_or_a_slope_would_be_seen(world, figure):
    results = json.loads(RESULT.read_text())["sqnr_db"]
    results["student_t"]["whole tensor"][world]["all_reduce"] = figure
    assert not judge(results)["reached"]
