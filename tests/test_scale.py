"""The cost formulas against collectives played message by message, their limits, and the page that quotes them."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import costs, scale
from benchmarks.costs import Cluster, Group, Link, repeated
from benchmarks.scale import BUCKETS, cluster_of, data_group, page_table, step
from benchmarks.workloads import ACTIVATIONS, PLANS, SCHEMES, activation_bytes, cross_check, parameters
from msamp_like.models.gpt import GPT, PRESETS, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = cluster_of(scale.options().parse_args([]))
GROUPS = [(1, 1), (4, 4), (8, 2), (16, 4), (12, 4), (6, 1), (32, 8)]
BUFFER = 96 * 1024.0


def free(**changes):
    """The default cluster with other figures on both links."""
    inside, across = (
        Link(**{"bandwidth": link.bandwidth, "latency_s": link.latency_s, "gap_s": link.gap_s, **changes})
        for link in (CLUSTER.inside, CLUSTER.across)
    )
    return Cluster(node=8, inside=inside, across=across)


# --- message by message ---------------------------------------------------------------------------------------------


class Played:
    """Bytes and messages that each rank of a group sends, by kind of link."""

    def __init__(self, group):
        self.group = group
        self.inside, self.across, self.messages = Counter(), Counter(), Counter()

    def send(self, source, target, sent):
        kind = self.inside if source // self.group.per_node == target // self.group.per_node else self.across
        kind[source] += sent
        self.messages[source] += 1

    def mean(self, counter):
        return sum(counter.values()) / self.group.ranks


def played_ring(group, buffer):
    """``per_node`` rings, each with its share of every chunk; ring c leaves each node by place c."""
    played = Played(group)
    for channel in range(group.per_node):
        places = [(channel + 1 + i) % group.per_node for i in range(group.per_node)]
        order = [node * group.per_node + place for node in range(group.nodes) for place in places]
        for _ in range(group.ranks - 1):
            for position, rank in enumerate(order):
                target = order[(position + 1) % group.ranks]
                played.send(rank, target, buffer / group.ranks / group.per_node)
    return played


def played_flat(group, buffer):
    played = Played(group)
    for source in range(group.ranks):
        for target in range(group.ranks):
            if source != target:
                played.send(source, target, buffer / group.ranks)
    return played


def played_two_hops(group, buffer, factor):
    """Each element's way: to the place of its owner in the node, then to the owner; ``factor`` of it goes on."""
    played = Played(group)
    for source in range(group.ranks):
        node, place = divmod(source, group.per_node)
        for other in range(group.per_node):
            if other != place:
                played.send(source, node * group.per_node + other, buffer / group.per_node)
        for other in range(group.nodes):
            if other != node:
                played.send(source, other * group.per_node + place, factor * buffer / group.nodes)
    return played


def played_tree(group, buffer):
    """Up the chain of each node to its first place, up a binary tree of nodes, and both down again."""
    played = Played(group)
    for node in range(group.nodes):
        for place in range(1, group.per_node):
            first = node * group.per_node + place
            played.send(first, first - 1, buffer)
            played.send(first - 1, first, buffer)
        if node:
            played.send(node * group.per_node, (node - 1) // 2 * group.per_node, buffer)
            played.send((node - 1) // 2 * group.per_node, node * group.per_node, buffer)
    return played


@pytest.mark.parametrize(("ranks", "per_node"), GROUPS)
@pytest.mark.parametrize(
    ("formula", "play"),
    [
        (costs.ring, played_ring),
        (costs.flat, played_flat),
        (costs.tree, played_tree),
        (costs.forwarded, lambda group, buffer: played_two_hops(group, buffer, 1)),
        (
            lambda cluster, group, buffer: costs.summed(cluster, group, buffer, 2 * buffer),
            lambda group, buffer: played_two_hops(group, buffer, 2 / group.per_node if group.per_node > 1 else 1),
        ),
    ],
    ids=["ring", "flat", "tree", "forwarded", "summed"],
)
def test_bytes_are_those_of_every_message(formula, play, ranks, per_node):
    group = Group(ranks=ranks, per_node=per_node)
    cost, played = formula(CLUSTER, group, BUFFER), play(group, BUFFER)
    assert cost.inside_bytes == pytest.approx(played.mean(played.inside))
    assert cost.across_bytes == pytest.approx(played.mean(played.across))
    if formula is costs.flat or (play is not played_ring and formula is not costs.tree):
        assert cost.messages == played.mean(played.messages)


def test_a_played_ring_is_even():
    """Every rank sends as much across as every other: the premise of one share a rank."""
    played = played_ring(Group(ranks=16, per_node=4), BUFFER)
    assert len({round(sent, 6) for sent in played.across.values()}) == 1
    assert len(played.across) == 16


# --- seconds --------------------------------------------------------------------------------------------------------


def test_without_latency_only_bytes_count():
    """With alpha 0 the flat form takes its bytes' time, a ring an eighth of it across nodes of 8, at any number."""
    link = Link(bandwidth=1.0, latency_s=0.0, gap_s=0.0)
    cluster, group = Cluster(node=8, inside=free().inside, across=link), Group(ranks=4096, per_node=8)
    assert costs.flat(cluster, group, BUFFER).seconds == pytest.approx(BUFFER * 4088 / 4096)
    dry = free(latency_s=0.0, gap_s=0.0)
    ring = costs.ring(Cluster(node=8, inside=dry.inside, across=link), group, BUFFER).seconds
    assert ring == pytest.approx(BUFFER * 4095 / 4096 / 8)


def test_without_bytes_only_messages_count():
    """Of one rank a node: N - 1 gaps less the first against the root's number of them, and a ring waits N - 1 times."""
    cluster, group = free(bandwidth=math.inf), Group(ranks=1024, per_node=8)
    across, inside = cluster.across, cluster.inside
    assert costs.flat(cluster, group, BUFFER).seconds == pytest.approx(across.latency_s + 1015 * across.gap_s)
    hops = across.latency_s + 126 * across.gap_s + inside.latency_s + 6 * inside.gap_s
    assert costs.forwarded(cluster, group, BUFFER).seconds == pytest.approx(hops)
    ring = 127 * across.latency_s + 896 * inside.latency_s
    assert costs.ring(cluster, group, BUFFER).seconds == pytest.approx(ring)
    tree = 2 * (7 * across.latency_s + 7 * inside.latency_s)
    assert costs.tree(cluster, group, BUFFER).seconds == pytest.approx(tree)


@pytest.mark.parametrize("formula", [costs.ring, costs.flat, costs.forwarded, costs.tree])
def test_one_rank_and_one_node(formula):
    assert formula(CLUSTER, Group(ranks=1, per_node=1), BUFFER).seconds == 0
    cost = formula(CLUSTER, Group(ranks=8, per_node=8), BUFFER)
    assert cost.across_bytes == 0
    slow = Cluster(node=8, inside=CLUSTER.inside, across=Link(bandwidth=1.0, latency_s=1.0, gap_s=1.0))
    assert formula(slow, Group(ranks=8, per_node=8), BUFFER).seconds == cost.seconds


def test_one_rank_a_node_has_nothing_to_gain_from_two_hops():
    group = Group(ranks=64, per_node=1)
    flat = costs.flat(CLUSTER, group, BUFFER)
    for other in (costs.forwarded(CLUSTER, group, BUFFER), costs.summed(CLUSTER, group, BUFFER, 2 * BUFFER)):
        assert other.seconds == pytest.approx(flat.seconds)


def test_a_row_of_calls_takes_its_slowest_phase_each():
    """Played: call i's phase j starts when its own phase before and the call before have left the link."""
    cost = costs.summed(CLUSTER, Group(ranks=64, per_node=8), 1e7, 2e7)
    ends = [0.0] * len(cost.phases)
    for _ in range(5):
        clock = 0.0
        for j, phase in enumerate(cost.phases):
            clock = ends[j] = max(clock, ends[j]) + phase.seconds
    assert repeated(cost, 5) == pytest.approx(ends[-1])
    assert repeated(cost, 0) == 0


def test_groups_fill_nodes():
    with pytest.raises(ValueError, match="10 ranks, 4 a node; choose a multiple"):
        Group(ranks=10, per_node=4)
    for name, (ranks, per_node) in {"7B": (128, 8), "13B": (64, 4), "175B": (4, 1)}.items():
        assert data_group(CLUSTER, PLANS[name], 128) == Group(ranks=ranks, per_node=per_node)


# --- what is sent ---------------------------------------------------------------------------------------------------


def test_parameters_are_the_models():
    """From the presets' closed form: 12 C^2 a layer, V C for the table; and a small model counted whole."""
    for name in PLANS:
        config = PRESETS[name]
        assert parameters(name)["matrices"] == 12 * config.num_layers * config.dim**2
        assert parameters(name)["tables"] == config.vocab_size * config.dim
    kinds = parameters("tiny")
    assert kinds["matrices"] + kinds["tables"] + kinds["vectors"] == GPT(PRESETS["tiny"]).num_parameters()
    assert isinstance(PRESETS["tiny"], GPTConfig)


@pytest.mark.parametrize("name", PLANS)
def test_bytes_of_a_step(name):
    """At any world and bucket: FP8-LM and ours send about a third of BF16 with an FP32 scatter, within the tables."""
    plan = PLANS[name]
    for gpus in (128, 4096):
        for bucketing in BUCKETS.values():
            sent = {s: step(CLUSTER, plan, gpus, SCHEMES[s], bucketing)["sent_gb"] for s in SCHEMES}
            assert sent["bf16"] / sent["bf16_fp32"] == pytest.approx(4 / 6, rel=1e-6)
            assert 1 / 3 < sent["fp8_lm"] / sent["bf16_fp32"] < 0.38
            assert 1 / 3 < sent["flat"] / sent["bf16_fp32"] < 0.352


def test_the_published_bytes_come_out():
    """Three digits are published, so 0.4 % is their rounding; a second table in 16 bits accounts for FP8-LM's excess
    over 2 bytes, which without it is 6 to 11 % off (the control)."""
    check = cross_check()
    for name, row in check["weights"].items():
        within = 0.04 if name == "175B" else 0.006  # 175B: what pads its shards to the largest is not known
        assert abs(row["bf16"]["error"]) < within
        assert abs(row["fp8"]["error"]) < within
        assert row["fp8_tables_too"]["error"] < -0.06
    assert all(abs(row["error"]) < 0.011 for row in check["activations"].values())  # two digits are published


def test_activations_in_fp8_are_half():
    for plan in (PLANS["13B"], PLANS["175B"]):
        sent = {kind: activation_bytes(plan, kind) for kind in ACTIVATIONS}
        assert sent["ours"] / sent["bf16"] == pytest.approx(0.5156, abs=1e-4)
        assert sent["fp8_lm"] / sent["bf16"] == 0.75
    assert activation_bytes(PLANS["7B"], "ours") == 0


# --- the result and the page ----------------------------------------------------------------------------------------


def test_the_committed_result_is_what_the_model_says_now():
    result = json.loads((ROOT / "docs" / "results" / "scale.json").read_text())
    row = result["steps"]["13B"]["1024"]["grown"]
    for scheme, figures in row.items():
        now = step(CLUSTER, PLANS["13B"], 1024, SCHEMES[scheme], BUCKETS["grown"])
        assert figures == {key: float(f"{value:.4g}") for key, value in now.items()}
    assert result["cross_check"]["weights"] == cross_check()["weights"]


def test_the_page_shows_the_committed_result():
    result = json.loads((ROOT / "docs" / "results" / "scale.json").read_text())
    page = (ROOT / "docs" / "explanation" / "scale.md").read_text()
    for buckets in BUCKETS:
        assert page_table(result, buckets, scale.PAGE_GPUS) in page
    result["steps"]["7B"]["1024"]["grown"]["flat"]["scatter_s"] *= 2
    assert page_table(result, "grown", scale.PAGE_GPUS) not in page


def test_models_are_built_without_memory():
    """Counting 175B must not allocate it: the meta device is left as it was found."""
    parameters("175B")
    assert torch.empty(0).device.type == "cpu"
