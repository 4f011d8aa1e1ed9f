"""Everything at once: data, tensor and sequence parallelism and ZeRO, with accumulation, recomputation, compilation."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Set

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from msamp_like import amp
from msamp_like.comm.tensor_parallel import full_state_dict, parallelize, plan_gpt
from msamp_like.models.gpt import GPT, GPTConfig
from msamp_like.tensor import ScalingTensor, real
from tests.closeness import sqnr
from tests.distributed.ranks import RankPool
from tests.distributed.test_data_parallel import raised

CONFIG = GPTConfig(vocab_size=64, context=32, dim=64, num_layers=2, num_heads=4)
BATCH = 8
"""Sequences of a step, over all data-parallel ranks and micro-batches."""


def fresh() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that a few steps from random weights have something to lose
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))


def data(step: int) -> Tensor:
    return torch.randint(64, (BATCH, 33), generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module, optimizer: object, *, part: int, parts: int, micro_batches: int, steps: int
) -> list[Tensor]:
    """Mean loss on this rank's part of each step's batch, and the norm that it was clipped by."""
    figures = []
    for step in range(steps):
        own = data(step).chunk(parts)[part].chunk(micro_batches)
        loss = torch.zeros(())
        for i, tokens in enumerate(own):
            with model.no_sync() if i < micro_batches - 1 else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16):
                    one = model(tokens[:, :-1], tokens[:, 1:])[1] / micro_batches
                one.backward()
            loss += one.detach()
        norm = amp.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        figures.append(torch.stack([loss, norm]))
    return figures


def recompute(model: GPT) -> None:
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def combined(rank, world, group, dims, stage, micro_batches, way, sequence=True):
    """Three steps on a mesh, and the same three in one process on all data."""
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("dp", "tp"))
    model = parallelize(fresh(), mesh["tp"], plan_gpt(CONFIG), sequence=sequence)
    options = {"mesh": mesh, "zero_stage": stage, "ranks_per_node": 2 if way == "nodes" else None}
    model, optimizer = amp.initialize(model, optimizer_of(model), level="O3", **options)
    if way == "recomputed":
        recompute(model)
    if way == "compiled":
        model.blocks[0].compile(backend="aot_eager")
    part = mesh.get_local_rank("dp")
    figures = train(model, optimizer, part=part, parts=dims[0], micro_batches=micro_batches, steps=3)
    torch._dynamo.reset()
    ledger = amp.wire_ledger(model)
    losses = torch.stack([loss for loss, _ in figures])
    dist.all_reduce(losses, group=mesh.get_group("dp"))
    weights = full_state_dict(model)
    found = {
        "losses": losses / dims[0],
        "norms": torch.stack([norm for _, norm in figures]),
        "weights": weights,
        "report": [(row.name, row.product) for row in amp.fp8_report(model).rows],
        "unplanned": [str(line) for line in ledger if line.sent != line.expected],
        "axes": {line.axis for line in ledger},
        "states": sum(s.numel() for state in optimizer.state.values() for s in state.values() if isinstance(s, Tensor)),
    }
    if rank == 0:
        alone, optimizer = amp.initialize(model := fresh(), optimizer_of(model), level="O3", data_parallel=False)
        figures = train(alone, optimizer, part=0, parts=1, micro_batches=1, steps=3)
        found["expected"] = (torch.stack(figures), {n: real(p).detach() for n, p in alone.named_parameters()})
        found["start"] = dict(fresh().named_parameters())
        found["expected report"] = [(row.name, row.product) for row in amp.fp8_report(alone).rows]
    return found


def check(answers: list[dict[str, object]], hops: Set[str] = frozenset()) -> None:
    first = answers[0]
    expected, weights = first["expected"]
    for answer in answers:
        assert not answer["unplanned"]
        assert answer["axes"] == {"dp", "tp"} | hops
        assert torch.equal(answer["losses"], first["losses"])
        assert torch.equal(answer["norms"], first["norms"])
        for name, value in answer["weights"].items():
            assert torch.equal(real(value), real(first["weights"][name])), name
    # a product is good to 24 dB, 6 %, and so are its gradients; their norm averages most of it away
    torch.testing.assert_close(first["losses"], expected[:, 0], rtol=0, atol=0.02)
    torch.testing.assert_close(first["norms"], expected[:, 1], rtol=0.05, atol=0)
    moved = {n: real(first["weights"][n]) - first["start"][n] for n in weights}
    for name, value in weights.items():
        if value.dim() == 2:  # three steps move a weight by little more than E4M3's step, in which both are stored
            assert sqnr(value - first["start"][name], moved[name]) > 3, name
    assert sorted(first["report"]) == sorted(first["expected report"])


@pytest.mark.parametrize(
    ("stage", "micro_batches", "way"),
    [(0, 1, "plain"), (1, 2, "plain"), (2, 2, "plain"), (1, 1, "recomputed"), (1, 1, "compiled")],
)
def test_on_four_ranks_training_is_that_of_one_process(ranks, stage, micro_batches, way):
    answers = ranks(4, combined, (2, 2), stage, micro_batches, way)
    check(answers)
    states = [answer["states"] for answer in answers]
    if stage:  # a rank of two has about half of the states, and the two of a tp axis the same share
        assert max(states) < 0.62 * (states[0] + states[2])


def test_whole_sequences_on_four_ranks_train_as_one_process(ranks):
    check(ranks(4, combined, (2, 2), 1, 1, "plain", False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "way"),
    [
        ((4, 2), "plain"),
        pytest.param((4, 2), "nodes", marks=pytest.mark.nightly),
        pytest.param((2, 4), "plain", marks=pytest.mark.nightly),
    ],
)
def test_on_eight_ranks_training_is_that_of_one_process(dims, way):
    """As two nodes of four ranks a dp axis has two ranks a node: 0 and 2, and 4 and 6."""
    pool = RankPool(size=8, timeout_s=300)
    try:
        check(pool.run(8, combined, dims, 1, 1, way), {"dp/inside", "dp/across"} if way == "nodes" else set())
    finally:
        pool.close()


def poisoned(rank, world, group):
    """One rank's loss is not finite: all ranks of both axes skip."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize(fresh(), mesh["tp"], plan_gpt(CONFIG), sequence=True)
    model, optimizer = amp.initialize(model, optimizer_of(model), level="O3", mesh=mesh)
    before = {n: real(p).detach().clone() for n, p in model.named_parameters()}
    tokens = data(0).chunk(2)[mesh.get_local_rank("dp")]
    loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    (loss * float("inf") if rank >= 2 else loss).backward()
    norm = amp.clip_grad_norm_(model, 1.0)
    optimizer.step()
    same = all(torch.equal(real(p), before[n]) for n, p in model.named_parameters())
    return bool(torch.isfinite(norm)), optimizer.skipped_steps, same


def test_a_step_is_skipped_on_all_axes_or_none(ranks):
    assert ranks(4, poisoned) == [(False, 1, True)] * 4


def saved(rank, world, group):
    """A state saved on a mesh goes on there bit for bit."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = parallelize(fresh(), mesh["tp"], plan_gpt(CONFIG), sequence=True)
        return amp.initialize(model, optimizer_of(model), level="O3", mesh=mesh)

    options = {"part": mesh.get_local_rank("dp"), "parts": 2, "micro_batches": 1, "steps": 2}
    model, optimizer = start()
    train(model, optimizer, **options)
    other, ours = start()
    amp.load_state_dict(other, ours, copy.deepcopy(amp.state_dict(model, optimizer)))
    a, b = train(model, optimizer, **options), train(other, ours, **options)
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_saved_state_goes_on_bit_for_bit_on_a_mesh(ranks):
    assert ranks(4, saved) == [True] * 4


def misused(rank, world, group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    odd = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "expert"))
    half = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["dp"]
    split = parallelize(fresh(), mesh["tp"], plan_gpt(CONFIG))
    found = {
        "names": raised(lambda: amp.initialize(fresh(), level="O3", mesh=odd)),
        "size": raised(lambda: amp.initialize(fresh(), level="O3", mesh=half)),
        "whole": raised(lambda: amp.initialize(fresh(), level="O3", mesh=mesh)),
        "no mesh": raised(lambda: amp.initialize(split, level="O3")),
        "both": raised(lambda: amp.initialize(split, level="O3", mesh=mesh, data_parallel=False)),
        "level": raised(lambda: amp.initialize(fresh(), level="O3" if rank == 2 else "O2")),
        "seed": raised(lambda: amp.initialize(fresh(), seed=rank // 3)),
    }
    unchanged = not any(isinstance(p, ScalingTensor) for p in split.parameters())
    return found, unchanged


def test_what_does_not_fit_is_refused_before_anything_is_changed(ranks):
    expected = {
        "names": ("dp, tp, pp", "expert", "init_device_mesh"),
        "size": ("world of 4", "dp 2 = 2", "start 2 ranks"),
        "whole": ("parallelize(model, mesh['tp'], plan)", "None"),
        "no mesh": ("mesh=", "data_parallel=False"),
        "both": ("data_parallel=False", "leave"),
        "level": ("level", "'O3' on rank 2", "'O2' on ranks 0-1, 3"),
        "seed": ("seed", "0 on ranks 0-2", "1 on rank 3"),
    }
    for found, unchanged in ranks(4, misused):
        assert unchanged
        for case, words in expected.items():
            assert all(word in found[case] for word in words), found[case]
