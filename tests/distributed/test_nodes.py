"""Training on four ranks as two nodes of two: gradients summed in the node, one more rounding on their way across."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from msamp_like import amp
from msamp_like.comm.data_parallel import DataParallel
from msamp_like.comm.group import CountedGroup
from msamp_like.comm.hierarchical import PARTIAL_SUMS, two_level
from msamp_like.comm.ledger import expected
from msamp_like.formats import E4M3
from msamp_like.policy import O2, Role, Rule
from msamp_like.tensor import ScalingTensor, real
from tests.closeness import sqnr
from tests.distributed.ranks import RankPool
from tests.distributed.spy import Call, Spy
from tests.distributed.test_data_parallel import Net, batch, grads, raised, same_bytes, stored_bytes

AXES = {"dp", "dp/inside", "dp/across"}


def started(rank: int, level: str, **options: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(rank)
    model = Net()
    return amp.initialize(model, torch.optim.AdamW(model.parameters(), lr=3e-2), level=level, **options)


# --- training -------------------------------------------------------------------------------------------------------


def train(rank: int, level: str, steps: int, **options: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Some steps that move the weights, with parameters that are frozen, never used, or left out by two ranks."""
    model, optimizer = started(rank, level, **options)
    for step in range(steps):
        optimizer.zero_grad()
        model(tokens=batch(10 * step + rank), branch="left" if (rank + step) % 2 else "right").backward()
        amp.clip_grad_norm_(model, 1.0)
        optimizer.step()
    return model, optimizer


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: real(p).detach().clone() for n, p in model.named_parameters()}


def trained(rank, world, group, level, stage, steps, on_mesh):
    options = {"mesh": init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))} if on_mesh else {}
    model, optimizer = train(rank, level, steps, zero_stage=stage, ranks_per_node=2, **options)
    ledger, wire = amp.wire_ledger(model), amp.wire_bytes(model)
    unsharded = values(train(rank, level, steps, zero_stage=0, ranks_per_node=2)[0]) if stage else None
    flat = train(rank, level, steps, zero_stage=stage)[0]
    torch.manual_seed(0)
    return {
        "weights": values(model),
        "unsharded": unsharded,
        "flat": values(flat),
        "start": values(Net()),
        "skipped": optimizer.skipped_steps,
        "axes": {line.axis for line in ledger},
        "unplanned": [str(line) for line in ledger if line.sent != line.expected],
        "of buckets": sum(line.sent for line in ledger if line.label.startswith("comm/")),
        "wire": wire,
        "flat wire": amp.wire_bytes(flat),
    }


@pytest.mark.parametrize(
    ("level", "stage", "steps", "on_mesh"),
    [("O2", 0, 4, False), ("O3", 1, 4, True), ("O3", 2, 4, False)],
)
def test_all_ranks_train_alike_and_send_what_is_planned(ranks, level, stage, steps, on_mesh):
    """Sharded or not has the same bits here too: an element's sums do not depend on where it lies in its bucket."""
    answers = ranks(4, trained, level, stage, steps, on_mesh)
    first = answers[0]
    for answer in answers:
        assert answer["skipped"] == 0
        assert answer["axes"] == AXES
        assert not answer["unplanned"]
        assert answer["wire"]["sent"] == answer["of buckets"]
        assert answer["wire"]["sent"] > answer["flat wire"]["sent"]  # what crosses nodes has been inside first
        assert all(answer["wire"][key] == answer["flat wire"][key] for key in ("bf16", "fp8_bf16"))
        for name, value in answer["weights"].items():
            assert torch.equal(value, first["weights"][name]), name
            assert stage == 0 or torch.equal(value, answer["unsharded"][name]), name
    moved = {n for n, value in first["weights"].items() if not torch.equal(value, first["start"][n])}
    assert {"embed.weight", "wide.weight", "left.weight", "right.weight", "one.bias", "norm.weight"} <= moved
    assert any(not torch.equal(value, first["flat"][n]) for n, value in first["weights"].items())  # it is another sum


def saved(rank, world, group):
    """A state saved by ranks that know their nodes goes on where no rank does: it holds nothing of them."""
    model, optimizer = train(rank, "O3", 2, ranks_per_node=2)
    other, ours = started(rank, "O3")
    amp.load_state_dict(other, ours, amp.state_dict(model, optimizer))
    same = all(torch.equal(a, b) for a, b in zip(values(model).values(), values(other).values(), strict=True))
    other(tokens=batch(rank)).backward()
    ours.step()
    return same, {line.axis for line in amp.wire_ledger(other)}


def test_a_saved_state_does_not_depend_on_nodes(ranks):
    assert ranks(4, saved) == [(True, {"dp"})] * 4


# --- the mean -------------------------------------------------------------------------------------------------------


def reduced(rank, world, group, branches, between):
    """Local gradients, as they are sent, and their mean by sums and flat, in several buckets."""
    answers = []
    for counted, rule in ((two_level(2, group), between), (CountedGroup(group), None)):
        torch.manual_seed(0)
        model = amp.initialize(Net(), level="O2", data_parallel=False)[0]
        reducer = DataParallel(
            model.named_parameters(), rule=O2[Role.GRAD_WEIGHT], group=counted, between=rule, bucket_bytes=4000
        )
        with reducer.no_sync():
            model(tokens=batch(rank), branch=branches[rank]).backward()
        local = grads(model)
        model.zero_grad()
        model.never.weight.grad = kept = model.never.weight.detach().clone()
        model(tokens=batch(rank), branch=branches[rank]).backward()
        assert model.never.weight.grad is kept
        model.never.weight.grad = None
        assert {(e.axis, e.collective, e.label): e.sent for e in counted.ledger} == expected(reducer, [])
        answers.append((grads(model), stored_bytes(model)))
    return local, *answers


def decibels(answers: list, name: str) -> tuple[float, float, float]:
    """Of the mean by sums against the exact one, of the flat one against that, and of both against each other."""
    _, (sums, _), (flat, _) = answers[0]
    parts = [torch.zeros_like(sums[name]) if part[name] is None else part[name] for part, _, _ in answers]
    exact = torch.stack(parts).double().mean(0)
    return sqnr(exact, sums[name]), sqnr(exact, flat[name]), sqnr(flat[name], sums[name])


@pytest.mark.parametrize("branches", [("left", "right", "left", "left"), ("left", "left", "right", "right")])
def test_a_gradient_is_the_mean_of_what_ranks_have(ranks, branches):
    """A branch is left out by one rank of a node, by a whole node, and by three ranks.

    Flat, one rounding is left, E4M3's 31 dB. A node's sums round to BF16 at 55 dB, which beside it is 0.02 dB. Against
    the flat mean the result is a whole step off, at 20 dB, where that tips an element over to the next code: one of
    some hundred, so 40 dB at least.
    """
    answers = ranks(4, reduced, branches, PARTIAL_SUMS)
    assert same_bytes([stored for _, (_, stored), _ in answers])
    for name in ("left.weight", "right.weight", "wide.weight", "embed.weight"):
        sums, flat, both = decibels(answers, name)
        assert sums > 30, name
        assert both > 40, name
        assert sums == flat or abs(sums - flat) < 0.1, name  # both are exact where one rank has it
    for _, (found, _), (flat, _) in answers:
        assert {n for n, g in found.items() if g is None} == {n for n, g in flat.items() if g is None}


def test_a_coarser_sum_is_seen(ranks):
    """The negative control: E4M3 between nodes is a second rounding like the first, and 3 dB less."""
    answers = ranks(4, reduced, ("left",) * 4, Rule(format=E4M3))
    for name in ("left.weight", "wide.weight", "embed.weight"):
        sums, flat, both = decibels(answers, name)
        assert sums < 30 < flat, name
        assert both < 35, name


def poisoned(rank, world, group, level, stage):
    model, optimizer = started(rank, level, zero_stage=stage, ranks_per_node=2)
    before = values(model)
    loss = model(tokens=batch(rank))
    (loss * float("nan") if rank == 3 else loss).backward()
    stored = [p.grad for p in model.parameters() if isinstance(p.grad, ScalingTensor)]
    flagged = all(bool(g.scale_inv.isinf().all()) for g in stored)
    norm = amp.clip_grad_norm_(model, 1.0)
    optimizer.step()
    same = all(torch.equal(a, b) for a, b in zip(before.values(), values(model).values(), strict=True))
    return flagged, bool(torch.isfinite(norm)), optimizer.skipped_steps, same


@pytest.mark.parametrize(("level", "stage"), [("O2", 0), ("O3", 1)])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(ranks, level, stage):
    assert ranks(4, poisoned, level, stage) == [(True, False, 1, True)] * 4


# --- bytes between nodes --------------------------------------------------------------------------------------------


class Border(Spy):
    """Counts in all-to-alls the bytes that go to ranks of other nodes, whichever group they are issued on."""

    def __init__(self, world: int, rank: int, per_node: int) -> None:
        super().__init__(world, rank)
        self.per_node = per_node
        self.crossed = 0

    def _seen(self, name: str, args: tuple[object, ...]) -> Call:
        if name != "alltoall_base":
            return super()._seen(name, args)
        _, sent, group, _, splits, *_ = args
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        row_bytes = sent.nbytes // sum(splits)
        crossing = [n for n, to in zip(splits, ranks, strict=True) if to // self.per_node != self.rank // self.per_node]
        self.crossed += sum(crossing) * row_bytes
        return Call(name, sent.dtype, sent.nbytes, sum(splits) * row_bytes)


NUM_LAYERS, DIM = 8, 256


def traffic(rank, world, group, per_node):
    """Bytes to other nodes in the backward of one step, as the ledger has them and as the dispatcher saw them."""
    crossed, counted = [], 0
    for ranks_per_node in (per_node, None):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(DIM, DIM, bias=False) for _ in range(NUM_LAYERS)))
        model, _ = amp.initialize(
            model, torch.optim.AdamW(model.parameters()), level="O3", ranks_per_node=ranks_per_node
        )
        with Border(world, rank, per_node) as border:
            model(torch.randn(4, DIM)).square().mean().backward()
        crossed.append(border.crossed)
        counted += sum(line.sent for line in amp.wire_ledger(model) if line.axis == "dp/across")
    return crossed[0], counted, crossed[1]


def check_traffic(answers: list[tuple[int, int, int]], per_node: int) -> None:
    """Flat, a rank sends a byte of every element that other nodes own. By sums it sends the elements of its place
    alone, one in ``per_node``, in BF16: 2 bytes, and a byte a line of 128 that says whether there are any."""
    world, elements = len(answers), NUM_LAYERS * DIM * DIM
    across = elements * (world - per_node) / world
    for crossed, counted, flat in answers:
        assert crossed == counted == across / per_node * (2 + 1 / 128)
        assert across < flat < 1.01 * across  # and scales


def test_sums_divide_the_bytes_across_nodes_by_the_ranks_of_one(ranks):
    check_traffic(ranks(4, traffic, 2), 2)


@pytest.mark.nightly
def test_with_four_ranks_a_node_half_of_the_bytes_are_left():
    pool = RankPool(size=8, timeout_s=300)
    try:
        check_traffic(pool.run(8, traffic, 4), 4)
    finally:
        pool.close()


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(rank, world, group):
    model = Net()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))

    def tried(ranks_per_node: int, **options: object) -> str:
        return raised(lambda: amp.initialize(model, level="O3", ranks_per_node=ranks_per_node, **options))

    found = {str(n): tried(n) for n in (0, 1, 3, 4, 8, -2)}
    found["alone"] = tried(2, data_parallel=False)
    found["one node"] = tried(2, mesh=mesh)
    found["differ"] = raised(lambda: amp.initialize(model, level="O3", ranks_per_node=None if rank == 1 else 2))
    unchanged = type(model) is Net and not any(isinstance(p, ScalingTensor) for p in model.parameters())
    converted = amp.initialize(Net(), level="O2", data_parallel=False)[0]
    options = {"rule": O2[Role.GRAD_WEIGHT], "group": CountedGroup(group), "between": PARTIAL_SUMS}
    found["flat group"] = raised(lambda: DataParallel(converted.named_parameters(), **options))
    return found, unchanged


def test_nodes_that_ranks_do_not_fill_are_refused_before_anything_is_changed(ranks):
    words = {str(n): ("at least 2", f"got {n} for 4", "leave it out") for n in (0, 1, 3, 4, 8, -2)} | {
        "alone": ("got 2 for 1",),
        "one node": ("got 2 for 2",),
        "differ": ("ranks_per_node", "2 on ranks 0, 2-3", "None on rank 1"),
        "flat group": ("two_level()", "dp 4"),
    }
    for found, unchanged in ranks(4, refused):
        assert unchanged
        for case, expected_words in words.items():
            assert found[case].startswith("ValueError")
            assert all(word in found[case] for word in expected_words), found[case]
