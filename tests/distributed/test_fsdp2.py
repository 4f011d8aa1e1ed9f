"""FSDP2 with our tensors: the bits of an unsharded run, bytes on the wire, states by rank, refusals."""

from __future__ import annotations

import gc
import io
import logging
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.utils.checkpoint import checkpoint

from msamp_like import amp
from msamp_like.comm.buckets import LINE
from msamp_like.comm.collectives import finish
from msamp_like.comm.flat import Stretch, reduce_scatter_flat
from msamp_like.comm.group import CountedGroup
from msamp_like.formats import E4M3, E5M2, WHOLE
from msamp_like.integrations import fsdp2
from msamp_like.integrations.fsdp2_communication import QuantizedReduceScatter
from msamp_like.integrations.fsdp2_optimizer import agree_on_scales, local_of
from msamp_like.models.gpt import GPT, GPTConfig
from msamp_like.policy import O3, Policy, Role, Rule
from msamp_like.scaling import Scaler, quantize
from msamp_like.tensor import ScalingTensor, real
from tests.closeness import same_bits, sqnr
from tests.distributed.spy import Spy

# 37 and 35 rows divide by no world here: every rank pads, or the last one does.
ODD = GPTConfig(vocab_size=37, context=16, dim=32, num_layers=2, num_heads=2, hidden_dim=35)
EVEN = GPTConfig(vocab_size=64, context=16, dim=128, num_layers=1, num_heads=2, bias=False)


def exact() -> Policy:
    """O3 without what depends on the rank: noise, histories, and a rounding of the gradient."""
    policy = O3.with_recipe("current").with_rule("grad_weight", "bf16")
    for role in (Role.MASTER_WEIGHT, Role.FIRST_MOMENT, Role.SECOND_MOMENT):
        policy = policy.with_rule(role, replace(policy[role], rounding="nearest"))
    return policy


def gpt(config: GPTConfig = ODD, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(config)


def batch(seed: int = 1, size: int = 2, vocab: int = 37) -> Tensor:
    return torch.randint(vocab, (size, 16), generator=torch.Generator().manual_seed(seed))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, as is usual: matrices decay, the others do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


def sharded(level: str | Policy = "O3", config: GPTConfig = ODD, seed: int = 0, **options):
    model = gpt(config, seed)
    return fsdp2.fully_shard(model, adamw(model), level=level, **options)


def unsharded(level: str | Policy = "O3", config: GPTConfig = ODD):
    model = gpt(config)
    return amp.initialize(model, adamw(model), level=level, data_parallel=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, steps: int = 10) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(tokens, tokens)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: real(value.detach()) for name, value in model.state_dict().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert set(a) == set(b)
    return [name for name in a if not same_bits(a[name], b[name])]


def shards(model: nn.Module, optimizer) -> list[Tensor]:
    """Every tensor of this rank: weights, masters, moments."""
    states = [t for state in optimizer.inner.state.values() for _, t in sorted(state.items()) if isinstance(t, Tensor)]
    return [*(local_of(p) for p in model.parameters()), *states]


# --- the bits of an unsharded run -----------------------------------------------------------------------------------


def equals_unsharded(rank, world, group, options):
    """Ten steps on one batch: the mean over 2 or 4 ranks of equal gradients is that gradient, to the bit."""
    model, optimizer = unsharded(exact())
    losses = train(model, optimizer, batch())
    other, other_optimizer = sharded(exact(), seed=rank, **options)  # the first rank's values are everybody's
    other_losses = train(other, other_optimizer, batch())
    return losses == other_losses, differing(values(model), fsdp2.full_state_dict(other)), losses


@pytest.mark.parametrize("world", [2, 4])
def test_ten_steps_have_the_bits_of_an_unsharded_run(ranks, world):
    for same_losses, wrong, losses in ranks(world, equals_unsharded, {"reduce": "plain"}):
        assert same_losses
        assert wrong == []
        assert losses[-1] < losses[0] - 1  # it has learned, so the weights have moved


def test_so_it_does_offloaded_resharded_or_not_and_in_one_group(ranks):
    for options in ({"cpu_offload": True}, {"reshard_after_forward": False}, {"blocks": ()}):
        for same_losses, wrong, _ in ranks(2, equals_unsharded, {"reduce": "plain", **options}):
            assert same_losses
            assert wrong == []


def test_a_gradient_rounded_on_the_way_gives_other_bits(ranks):
    """The control: the comparison above sees one rounding of the gradients."""
    policy = exact().with_rule("grad_weight", "e4m3")
    for wrong in ranks(2, differs_from_unsharded, policy):
        assert len(wrong) > 20


def goes_on(rank, world, group):
    """A plain run of two steps, then eight sharded ones: moments and step counts come along."""
    weights = []
    for shard in (False, True):
        model = gpt()
        optimizer = adamw(model)
        train(model, optimizer, batch(), 2)
        if shard:
            model, optimizer = fsdp2.fully_shard(model, optimizer, exact(), reduce="plain")
        else:
            model, optimizer = amp.initialize(model, optimizer, level=exact(), data_parallel=False)
        train(model, optimizer, batch(), 8)
        weights.append(fsdp2.full_state_dict(model) if shard else values(model))
    return differing(*weights)


def test_an_optimizer_that_has_stepped_goes_on(ranks):
    assert ranks(2, goes_on) == [[], []]


def differs_from_unsharded(rank, world, group, policy):
    model, optimizer = unsharded(exact())
    train(model, optimizer, batch())
    other, other_optimizer = sharded(policy)
    train(other, other_optimizer, batch())
    return differing(values(model), fsdp2.full_state_dict(other))


def trains_at_o3(rank, world, group):
    """Each rank its own batch, against one process with all of them."""
    everything = torch.cat([batch(r) for r in range(world)])
    reference = train(*unsharded(), everything)
    runs = []
    for _ in range(2):
        losses = torch.tensor(train(*sharded(), batch(rank)))
        dist.all_reduce(losses)
        runs.append((losses / world).tolist())
    return reference, runs


def test_o3_with_fp8_gradients_learns_as_an_unsharded_run(ranks):
    """Other scales (a batch a rank), other noise and one rounding: 31 dB a gradient. The losses fall by 1.5 nats and
    stay within a thirtieth of that of each other; two runs have the same bits."""
    for reference, (first, second) in ranks(4, trains_at_o3):
        assert first == second
        assert reference[0] - reference[-1] > 1.5
        assert max(abs(a - b) for a, b in zip(reference, first, strict=True)) < 0.05


# --- bytes ----------------------------------------------------------------------------------------------------------


def counts_gathered(rank, world, group, level, config):
    model, _ = sharded(level, config)
    tokens = batch(vocab=config.vocab_size)
    with Spy(world, rank) as first, torch.no_grad():
        model(tokens)
    model.reshard()  # torch leaves the root gathered
    with Spy(world, rank) as second, torch.no_grad():
        model(tokens)
    rows = {name: (-(-p.shape[0] // world), p.shape[1:].numel()) for name, p in model.named_parameters()}
    held = {name: local_of(p) for name, p in model.named_parameters()}
    kinds = {name: str(t.format) if isinstance(t, ScalingTensor) else "plain" for name, t in held.items()}
    names = {call.name for call in second.calls}
    handed = [sum(call.input_bytes for call in spy.calls) for spy in (first, second)]
    return rows, kinds, names, handed


@pytest.mark.parametrize("world", [2, 4])
def test_weights_gather_as_their_bytes(ranks, world):
    """One byte an element of a matrix in FP8 and 4 of its scale; padding counts, and the first call is as any other."""
    for rows, kinds, names, handed in ranks(world, counts_gathered, "O3", ODD):
        expected = 0
        for name, (longest, width) in rows.items():
            in_fp8 = kinds[name] == "e4m3"
            expected += longest * width * (1 if in_fp8 else 2 if kinds[name] == "bf16" else 4) + (4 if in_fp8 else 0)
        assert sum(kind == "e4m3" for kind in kinds.values()) == 8
        assert names == {"allgather_base"}
        assert handed == [expected, expected]


def test_weights_gather_in_half_the_bytes_of_bf16(ranks):
    """Of a block's matrices, 12 * 128^2 elements: 1 byte to 2; the head and the norms are the same in both levels."""
    (_, kinds, _, o3), *_ = ranks(2, counts_gathered, "O3", EVEN)
    (rows, _, _, o0), *_ = ranks(2, counts_gathered, "O0", EVEN)
    matrices = sum(math.prod(rows[name]) for name, kind in kinds.items() if kind == "e4m3")
    assert matrices == 12 * 128**2 // 2
    assert o0[1] - o3[1] == matrices - 4 * 4  # 4 scales of 4 bytes


def counts_reduced(rank, world, group):
    model, optimizer = sharded("O3", EVEN)
    tokens = batch(rank, vocab=64)
    loss = model(tokens, tokens)[1]
    optimizer.group.end_step()
    with Spy(world, rank) as spy:
        loss.backward()
    ledger = sum(entry.sent for entry in optimizer.group.ledger)
    assert ledger == spy.sent > 0  # what is counted is what the dispatcher saw, torch's all-gathers included
    assert {e.label for e in optimizer.group.ledger} >= {"fsdp/root", "fsdp/blocks.0/scales", "fsdp/blocks.0/gather"}
    sizes = {n: (p.numel(), isinstance(local_of(p), ScalingTensor)) for n, p in model.named_parameters()}
    return sizes, [(c.name, c.dtype, c.sent) for c in spy.calls if c.name == "alltoall_base"]


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_scatter_as_codes_and_scales(ranks, world):
    for sizes, calls in ranks(world, counts_reduced):
        scaled = sum(numel for numel, is_scaled in sizes.values() if is_scaled)
        plain = sum(numel for numel, is_scaled in sizes.values() if not is_scaled)
        sent = {dtype: sum(s for _, d, s in calls if d == dtype) for dtype in {d for _, d, _ in calls}}
        away = (world - 1) / world
        assert sent[torch.uint8] == scaled * away
        assert sent[torch.float32] == scaled // LINE * 4 * away + plain * 4 * away
        assert (sent[torch.uint8] + scaled // LINE * 4 * away) / (2 * scaled * away) < 0.52  # of BF16


def scatters(rank, world, group, format):
    generator = torch.Generator().manual_seed(rank)
    stretches = [Stretch(numel=n, scaled=s) for n, s in ((1000, True), (77, False), (128 * 40, True), (5, False))]
    row = sum(s.numel for s in stretches)
    buffer = torch.randn(world, row, generator=generator)
    buffer[:, 1077 : 1077 + 128 * 20] *= 1e-4  # lines of another size beside lines of N(0, 1)
    counted = CountedGroup()
    found = [finish(reduce_scatter_flat(buffer, stretches, Rule(format=format), counted)) for _ in range(2)]
    everybody = [torch.empty_like(buffer) for _ in range(world)]
    dist.all_gather(everybody, buffer)
    exact_sum = torch.stack([b[rank].double() for b in everybody]).sum(0)
    ordered = everybody[0][rank].clone()
    for other in everybody[1:]:
        ordered += other[rank]
    parts = exact_sum.split([s.numel for s in stretches])
    made = found[0].split([s.numel for s in stretches])
    decibels = [sqnr(a, b) for a, b, s in zip(parts, made, stretches, strict=True) if s.scaled]
    decibels.append(sqnr(parts[2][: 128 * 20], made[2][: 128 * 20]))  # the small lines alone
    plain = [
        same_bits(a, b)
        for a, b, s in zip(ordered.split([s.numel for s in stretches]), made, stretches, strict=True)
        if not s.scaled
    ]
    return decibels, all(plain), same_bits(*found)


@pytest.mark.parametrize("world", [2, 4])
def test_reduce_scatter_rounds_once_in_any_world(ranks, world):
    """One rounding to E4M3 is 31 dB, and the roundings of the ranks are independent as their values are: still 31."""
    for decibels, plain_is_exact, repeats in ranks(world, scatters, E4M3):
        assert min(decibels) > 30
        assert plain_is_exact
        assert repeats
    for decibels, _, _ in ranks(world, scatters, E5M2):  # the control: a bit less of mantissa is 6 dB less
        assert max(decibels) < 27


def measures_states(rank, world, group):
    gc.collect()
    before = {id(o) for o in gc.get_objects() if isinstance(o, ScalingTensor)}  # an earlier test's, in this process
    model, optimizer = sharded("O3", EVEN)
    train(model, optimizer, batch(vocab=64), 1)
    found = optimizer.state_bytes()
    matrices = sum(p.numel() for p in model.parameters() if isinstance(local_of(p), ScalingTensor))
    head = model.lm_head.weight.numel()
    shapes = {(384, 128), (512, 128), (128, 512)}  # no shard of another weight has one of these
    gc.collect()
    made = [o for o in gc.get_objects() if isinstance(o, ScalingTensor) and id(o) not in before]
    whole = [o for o in made if tuple(o.shape) in shapes]
    held = sum(t.payload.untyped_storage().nbytes() for t in whole)
    return found, matrices, head, held


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_holds_its_share_of_the_states(ranks, world):
    """An element has 1 byte of weight (2 in the head), 2 of master, 1 and 2 of moments, and three scales a 128."""
    for found, matrices, head, held in ranks(world, measures_states):
        blocks = 4 / 128
        assert found["weight"] == (matrices + head) / world + 5 * 4  # a scale of 4 bytes for each of five matrices
        assert found["master_weight"] == found["second_moment"] == matrices * (2 + blocks) / world
        assert found["first_moment"] == matrices * (1 + blocks) / world
        assert held == 0  # no whole weight has memory between steps


# --- gradients and the step -----------------------------------------------------------------------------------------


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}


def clips(rank, world, group):
    model, optimizer = sharded(exact(), reduce="plain")
    tokens = batch(rank)
    model(tokens, tokens)[1].backward()
    before = whole_gradients(model)
    expected = torch.stack([g.double().norm() for g in before.values()]).norm()
    own = torch.stack([local_of(p.grad).norm() for p in model.parameters()]).norm()
    torchs = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).full_tensor()
    found = optimizer.clip_grad_norm_(expected.item() / 2)
    after = whole_gradients(model)
    ratio = max((after[n] - before[n] / 2).abs().max().item() for n in before)
    return expected.item(), found.item(), torchs.item(), own.item(), ratio


def test_the_norm_is_that_of_all_shards(ranks):
    for expected, found, torchs, own, ratio in ranks(2, clips):
        assert found == pytest.approx(expected, rel=1e-5)
        assert torchs == pytest.approx(expected, rel=1e-5)
        assert own < 0.99 * expected  # the control: a rank's own shards are not the whole
        assert ratio < 1e-5


def skips(rank, world, group, where):
    model, optimizer = sharded()
    train(model, optimizer, batch(), 1)
    before = [t.clone() for t in shards(model, optimizer)]
    loss = model(batch(), batch())[1]
    if where == "in a shard":
        loss.backward()
        if rank == 1:
            local_of(model.blocks[0].mlp.up.weight.grad)[0, 0] = torch.nan
    else:
        (loss * (torch.inf if rank == 1 else 1.0)).backward()
    optimizer.step()
    same = all(same_bits(a, b) for a, b in zip(before, shards(model, optimizer), strict=True))
    optimizer.zero_grad()
    train(model, optimizer, batch(), 1)
    moved = any(not same_bits(a, b) for a, b in zip(before, shards(model, optimizer), strict=True))
    return same, moved, optimizer.skipped_steps


@pytest.mark.parametrize("where", ["in a shard", "on the wire"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(ranks, where):
    assert ranks(2, skips, where) == [(True, True, 1)] * 2


def accumulates(rank, world, group):
    first, second = batch(10 + rank), batch(20 + rank)
    reduced = []
    for micro_batches in ([first, second], [first]):
        model, _ = sharded()
        with Spy(world, rank) as spy:
            for tokens in micro_batches:
                model.set_requires_gradient_sync(tokens is micro_batches[-1])
                model(tokens, tokens)[1].backward()
        reduced.append(sum(call.name == "alltoall_base" for call in spy.calls))
        if len(micro_batches) == 2:
            together = whole_gradients(model)
    apart = []
    for tokens in (first, second):
        model, _ = sharded(reduce="plain")
        model(tokens, tokens)[1].backward()
        apart.append(whole_gradients(model))
    names = [n for n in together if together[n].dim() > 1]
    return (
        reduced,
        min(sqnr(apart[0][n] + apart[1][n], together[n]) for n in names),
        min(sqnr(apart[0][n], together[n]) for n in names),
    )


def test_micro_batches_add_up_and_are_sent_once(ranks):
    """31 dB of the one rounding to E4M3 on the way, less what the BF16 sum of two adds (52 dB)."""
    for reduced, decibels, one_alone in ranks(2, accumulates):
        assert reduced[0] == reduced[1] > 0
        assert decibels > 29
        assert one_alone < 10  # the control


def recomputes(rank, world, group):
    found = []
    for wanted in (False, True):
        model, optimizer = sharded(
            mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        )
        if wanted:
            for block in model.blocks:
                forward = block.mlp.forward
                block.mlp.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
        losses = train(model, optimizer, batch(rank), 3)
        dtypes = {p.dtype for p in model.parameters()} | {t.dtype for t in whole_gradients(model).values()}
        found.append((losses, [t.clone() for t in shards(model, optimizer)], dtypes, model(batch())))
    (losses, tensors, dtypes, logits), (other_losses, other_tensors, _, _) = found
    same = all(same_bits(a, b) for a, b in zip(tensors, other_tensors, strict=True))
    return losses, other_losses, same, dtypes, logits.dtype


def test_activation_checkpointing_changes_no_bit_and_bf16_policy_trains(ranks):
    """Under delayed scaling: a forward that runs again must not enter the histories twice."""
    for losses, other_losses, same, dtypes, dtype in ranks(2, recomputes):
        assert losses == other_losses
        assert losses[-1] < losses[0]
        assert same
        assert dtypes == {torch.float32}
        assert dtype == torch.bfloat16


def compiles(rank, world, group):
    losses = []
    for compiled in (False, True):
        model, optimizer = sharded("O3", EVEN)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if compiled:
            model.blocks[0].compile(backend="aot_eager")
        losses.append(train(model, optimizer, batch(rank, vocab=64), 2))
        frames = torch._dynamo.utils.counters["frames"]["ok"]
    torch._dynamo.reset()
    return losses, frames


def test_a_compiled_block_computes_the_same(ranks):
    """aot_eager traces and runs the same kernels in the same order."""
    for (eager, compiled), frames in ranks(2, compiles):
        assert eager == compiled
        assert frames > 0  # the control: something was compiled


class Ragged(nn.Module):
    """One row on four ranks, frozen, plain, never used, nested in one another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))])
        self.frozen = nn.Linear(24, 24).requires_grad_(False)
        self.never = nn.Linear(24, 5)
        self.one = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.blocks[0](self.frozen(x))).square().mean()


def trains_ragged(rank, world, group):
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    trained = []
    heard = Warnings()
    logging.getLogger("msamp_like.integrations.fsdp2_communication").addHandler(heard)
    for reduce in (None, "plain", "fp8"):
        torch.manual_seed(0)
        model = Ragged()
        optimizer = adamw(model)
        if reduce is None:
            model, optimizer = amp.initialize(model, optimizer, level=exact(), data_parallel=False)
        else:
            level = exact() if reduce == "plain" else "O3"
            model, optimizer = fsdp2.fully_shard(
                model, optimizer, level, blocks=["blocks.*", "blocks.*.2"], reduce=reduce
            )
        for _ in range(3):
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(values(model) if reduce is None else fsdp2.full_state_dict(model))
    logging.getLogger("msamp_like.integrations.fsdp2_communication").removeHandler(heard)
    closest = min(sqnr(trained[0][n], trained[2][n]) for n in trained[0] if "weight" in n)
    return differing(trained[0], trained[1]), closest, heard.texts


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def test_few_rows_frozen_unused_and_nested(ranks):
    """A group of which a parameter got no gradient travels plain, and says so once."""
    for wrong, closest, texts in ranks(4, trains_ragged):
        assert wrong == []
        assert closest > 20
        assert len(texts) == 1
        assert "not all of its" in texts[0]
        assert "fsdp/root" in texts[0]


def histories(rank, world, group):
    model, optimizer = sharded()
    tokens = batch(rank)
    model(tokens, tokens)[1].backward()
    scalers = [m for m in model.modules() if isinstance(m, Scaler) and m.rule.history]
    pending = [int(s.pending) for s in scalers]
    optimizer.step()
    return pending, [s.history.tolist() for s in scalers], optimizer.inner.seed


def test_histories_are_those_of_all_ranks_and_noise_is_each_ranks_own(ranks):
    (pending, history, seed), (other_pending, other_history, other_seed) = ranks(2, histories)
    assert history == other_history
    assert [h[0] for h in history] == [max(a, b) for a, b in zip(pending, other_pending, strict=True)]
    assert pending != other_pending  # the control: alone they would differ
    assert seed != other_seed


# --- by hand: torch's own fully_shard -------------------------------------------------------------------------------


def schedules(rank, world, group):
    model = gpt()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    model, ours = fsdp2.fully_shard(model, optimizer)
    train(model, ours, batch(), 1)
    before = [p.clone() for p in shards(model, ours)[: len(list(model.parameters()))]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where a scheduler steps before its optimizer
        scheduler.step()
    train(model, ours, batch(), 1)
    after = shards(model, ours)
    model.blocks[0].unshard()
    gathered = type(model.blocks[0].mlp.up.weight).__name__
    model.blocks[0].reshard()
    with pytest.raises(NotImplementedError):
        model.blocks[0].mlp.up.weight.full_tensor()
    return all(same_bits(real(a), real(b)) for a, b in zip(before, after[: len(before)], strict=True)), gathered


def test_a_scheduler_of_the_torch_optimizer_drives_the_shards(ranks):
    """A learning rate of 0 (and with it no decay) changes no weight: masters are written as they were read."""
    for same, gathered in ranks(2, schedules):
        assert same
        assert gathered == "ScalingTensor"


def shards_by_hand(rank, world, group):
    plain = gpt()
    converted = amp.initialize(plain, None, level=exact(), data_parallel=False)[0]
    with torch.no_grad():
        expected = converted(batch())
    for block in converted.blocks:
        torch_fully_shard(block)
    torch_fully_shard(converted)
    with torch.no_grad():
        first = converted(batch())
        converted.blocks[0].unshard()
        alone = converted.blocks[0].mlp.up.weight.block
        converted.blocks[0].reshard()
    converted.reshard()  # the optimizer is of the shards, and a forward leaves the root gathered
    optimizer = fsdp2.attach(converted, adamw(converted), reduce="plain")
    with torch.no_grad():
        second = converted(batch())
        converted.blocks[0].unshard()
        agreed = converted.blocks[0].mlp.up.weight.block
        casts = converted.blocks[0].mlp.up.weight.cast_bytes
        converted.blocks[0].reshard()
    losses = train(converted, optimizer, batch(), 3)
    return same_bits(expected, first), same_bits(expected, second), alone, agreed, casts, losses


def test_torchs_own_fully_shard_works_and_attach_makes_the_scales_agree(ranks):
    for first, second, alone, agreed, casts, losses in ranks(2, shards_by_hand):
        assert first
        assert second
        assert alone == (18, -1)  # before, nobody has said that the shards have one scale
        assert agreed == WHOLE
        assert casts == 0  # the product reads the gathered bytes themselves
        assert losses[-1] < losses[0]


def own_scales(rank, world, group):
    """Each rank writes its rows with a scale of its own, as somebody else's code might."""
    model, _ = sharded(exact())
    parameter = model.blocks[0].mlp.up.weight
    local = local_of(parameter)
    rows = torch.randn(local.shape) * 10.0 ** (4 * rank)
    local.store_(rows)
    kept = local.dequantize().clone()
    model.blocks[0].unshard()
    gathered = model.blocks[0].mlp.up.weight
    block, whole = gathered.block, gathered.dequantize().detach().clone()
    model.blocks[0].reshard()
    everybody = [torch.zeros(18, 32) for _ in range(world)]
    dist.all_gather(everybody, torch.cat([kept, kept.new_zeros(18 - kept.shape[0], 32)]))
    expected = torch.cat(everybody)[:35]
    agree_on_scales([(parameter, None)], parameter.device_mesh)
    return block, same_bits(whole, expected), sqnr(kept, local_of(parameter)), local_of(parameter).agreed


def test_shards_with_scales_of_their_own_gather_with_a_scale_a_shard(ranks):
    """Nothing is taken for granted: a write takes the agreement away, and the scales travel in any case."""
    (block, same, small, _), (_, other_same, large, agreed) = ranks(2, own_scales)
    assert block == (18, -1)
    assert same
    assert other_same
    assert agreed
    assert math.isinf(large)
    assert small < 40  # ten thousand times smaller than the others: one scale for all costs what it always costs


# --- state ----------------------------------------------------------------------------------------------------------


def resumes(rank, world, group):
    model, optimizer = sharded()
    train(model, optimizer, batch(rank), 2)
    file = io.BytesIO()
    torch.save(fsdp2.state_dict(model, optimizer), file)
    file.seek(0)
    saved = torch.load(file)
    straight = train(model, optimizer, batch(rank), 3)
    other, other_optimizer = sharded(seed=5)
    fresh = train(other, other_optimizer, batch(rank), 1)
    fsdp2.load_state_dict(other, other_optimizer, saved)
    again = train(other, other_optimizer, batch(rank), 3)
    same = all(same_bits(a, b) for a, b in zip(shards(model, optimizer), shards(other, other_optimizer), strict=True))
    saved["optimizer"]["rank"] = rank + 1
    with pytest.raises(ValueError, match="its own rank"):
        fsdp2.load_state_dict(other, other_optimizer, saved)
    return straight, again, fresh, same


def test_resuming_at_the_same_world_size_has_the_same_bits(ranks):
    for straight, again, fresh, same in ranks(2, resumes):
        assert straight == again
        assert fresh[0] not in straight
        assert same


def saves_whole(rank, world, group, state):
    model, optimizer = sharded(seed=7)
    if state is not None:
        fsdp2.load_full_state_dict(model, state, optimizer)
        read = fsdp2.full_state_dict(model, optimizer)
        with torch.no_grad():
            logits = model(batch())
        with pytest.raises(ValueError, match="names and shapes"):
            fsdp2.load_full_state_dict(model, {"no": state["norm.weight"]})
        return read, logits
    train(model, optimizer, batch(), 2)
    with torch.no_grad():
        logits = model(batch())
    return fsdp2.full_state_dict(model, optimizer), logits


def test_whole_weights_are_plain_and_load_at_another_world_size(ranks):
    (state, logits), (other_state, _) = ranks(2, saves_whole, None)
    assert differing(state, other_state) == []
    plain = gpt()
    assert {n: (t.shape, t.dtype) for n, t in plain.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    plain.load_state_dict(state)
    for read, again in ranks(4, saves_whole, state):
        assert differing(read, state) == []  # a master holds its own values again
        assert same_bits(again, logits)
    assert sqnr(plain(batch()), logits) > 20  # the same model, its products in FP32 and its weights not in FP8


# --- proof and refusals ---------------------------------------------------------------------------------------------


def reports(rank, world, group):
    model, _ = sharded()
    whole, own = fsdp2.fp8_report(model), amp.fp8_report(model)
    reference = amp.fp8_report(unsharded()[0])
    with pytest.raises(RuntimeError, match="full_state_dict"):
        amp.restore(model)
    return whole, own, reference


def test_the_report_says_what_an_unsharded_models_says(ranks):
    for whole, own, reference in ranks(2, reports):
        assert whole == reference
        assert own.flops_share == reference.flops_share
        assert own != reference  # the control: bytes of the host's wrapper, which says FP32


def refuses(rank, world, group):
    texts = []
    for error, change in (
        ("parameter is master_weight", {"level": "O2"}),
        ("scale per 128x128.*leaves its one scale to the weight", {"recipe": "blockwise"}),
        ("reduce must be one of", {"reduce": "e4m3"}),
        ("matches none", {"blocks": "layers.*"}),
        ("mesh of one dim", {"mesh": init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b"))}),
    ):
        model = gpt()
        before = values(model)
        with pytest.raises(ValueError, match=error):
            fsdp2.fully_shard(model, adamw(model), **change)
        assert differing(before, values(model)) == []
        texts.append(error)
    model = gpt()
    with pytest.raises(ValueError, match="must be the model's"):
        fsdp2.fully_shard(model, adamw(gpt()))
    with pytest.raises(ValueError, match="every parameter must be sharded"):
        fsdp2.attach(amp.initialize(model, None, level="O3", data_parallel=False)[0])
    done, _ = sharded()
    with pytest.raises(ValueError, match="sharded once"):
        fsdp2.fully_shard(done)
    scatter = QuantizedReduceScatter([], O3[Role.GRAD_WEIGHT], CountedGroup(group), "x")
    with pytest.raises(ValueError, match="a mean or a sum"):
        scatter(torch.zeros(1), torch.zeros(world), group, dist.ReduceOp.MAX)
    return len(texts)


def test_what_does_not_fit_is_refused_before_anything_changes(ranks):
    assert ranks(2, refuses) == [5, 5]


# --- the operations, on one process ---------------------------------------------------------------------------------


def test_a_part_is_a_view_of_padding_and_else_a_copy():
    whole = quantize(torch.randn(6, 4), Rule(format=E4M3))
    part = whole[:2]
    assert same_bits(part.dequantize(), whole.dequantize()[:2])
    before = whole.dequantize().clone()
    part.store_(torch.full((2, 4), 2.0**20))
    assert same_bits(whole.dequantize(), before)  # whose scale a write would have changed
    padded = whole.new_zeros(8, 4)
    padded.narrow(0, 0, 6).copy_(whole)
    assert same_bits(padded.dequantize(), torch.cat([before, torch.zeros(2, 4)]))
    rows = padded.narrow(0, 0, 6)
    rows.store_(torch.full((6, 4), 2.0**20))
    assert padded.dequantize()[:6].eq(2.0**20).all()
    assert rows.padded is padded.payload
    moved = rows.to(torch.bfloat16)  # as an offloaded shard moves to the device: with its padding
    assert moved.padded.shape == (8, 4)
    assert same_bits(moved.payload, rows.payload)
    assert same_bits(padded.view(-1).dequantize(), padded.dequantize().view(-1))
    with pytest.raises(NotImplementedError, match="DistributedDataParallel"):
        whole.view(-1)  # a weight that is no shard: torch's DDP asks for this, and is told what to do
    assert [tuple(c.shape) for c in torch.chunk(whole, 4)] == [(2, 4)] * 3


def test_other_cuts_are_refused():
    whole = quantize(torch.randn(6, 4), Rule(format=E4M3))
    blocks = quantize(torch.randn(6, 4), Rule(format=E4M3, block=(1, 2)))
    for cut in (
        lambda: whole[:, :2],
        lambda: whole[::2],
        lambda: blocks[:2],
        lambda: blocks.new_zeros(3, 4),
        lambda: blocks.view(-1),
        lambda: torch.as_strided(whole, (4, 6), (6, 1)),
        lambda: blocks.fsdp_pre_all_gather(None),
    ):
        with pytest.raises(NotImplementedError):
            cut()
