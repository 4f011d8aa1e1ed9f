"""Data parallelism end to end: ``.grad`` is the mean, the same bits on every rank, however the ranks came to it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from msamp_like import amp
from msamp_like.comm.data_parallel import DataParallel
from msamp_like.comm.group import CountedGroup, ring_bytes
from msamp_like.formats import E4M3
from msamp_like.policy import O0, O2, Role, Rule
from msamp_like.scaling import quantize
from msamp_like.tensor import ScalingTensor, real
from tests.distributed.spy import Spy
from tests.distributed.test_collectives import db

RULE = O2[Role.GRAD_WEIGHT]


class Net(nn.Module):
    """Everything at once: integer and keyword-only inputs, odd sizes, one output, ties, norms, frozen, never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.norm = nn.LayerNorm(24)
        self.frozen = nn.Linear(24, 24).requires_grad_(False)
        self.wide = nn.Linear(24, 301)
        self.left = nn.Linear(301, 24)
        self.right = nn.Linear(301, 24)
        self.never = nn.Linear(5, 5)
        self.one = nn.Linear(24, 1)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(7))

    def forward(self, *, tokens: Tensor, branch: str = "left") -> Tensor:
        x = torch.relu(self.wide(self.frozen(self.norm(self.embed(tokens)))))
        x = getattr(self, branch)(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten()) + self.one(x).square().mean()


def converted(level: str, seed: int = 0, **options) -> Net:
    torch.manual_seed(seed)
    return amp.initialize(Net(), level=level, **options)[0]


def batch(rank: int, size: int = 6) -> Tensor:
    return torch.randint(50, (size, 8), generator=torch.Generator().manual_seed(rank))


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else real(p.grad).clone() for n, p in model.named_parameters()}


def stored_bytes(model: nn.Module) -> dict[str, Tensor]:
    """Every byte of every gradient, scales included."""
    found = {}
    for name, p in model.named_parameters():
        if isinstance(p.grad, ScalingTensor):
            found[name] = torch.cat([t.reshape(-1).view(torch.uint8) for t in (p.grad.payload, p.grad.scale_inv)])
        elif p.grad is not None:
            found[name] = p.grad.reshape(-1).view(torch.uint8)
    return found


def same_bytes(answers: list[dict[str, Tensor]]) -> bool:
    first = answers[0]
    return all(a.keys() == first.keys() and all(torch.equal(a[n], first[n]) for n in first) for a in answers[1:])


# --- the mean -------------------------------------------------------------------------------------------------------


def local_and_reduced(rank, world, group, level):
    model = converted(level, seed=rank)  # other weights on every rank, until initialize copies the first's
    with model.no_sync():
        model(tokens=batch(rank)).backward()
    local = grads(model)
    model.zero_grad()
    model(tokens=batch(rank)).backward()
    return local, grads(model), stored_bytes(model), {n: real(p).detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("level", "matrices"), [("O0", 42), ("O2", 30)])
def test_grad_is_the_mean_of_the_local_gradients(ranks, level, matrices, world):
    """The local gradient is what was sent, so one rounding is left: E4M3's 31 dB at O2; BF16's, once a hop, at O0."""
    answers = ranks(world, local_and_reduced, level)
    assert same_bytes([stored for _, _, stored, _ in answers])
    assert all(torch.equal(answers[0][3][n], answer[3][n]) for answer in answers for n in answers[0][3])
    for name, found in answers[0][1].items():
        if found is None:
            assert name.startswith(("frozen", "never", "right"))
            continue
        mean = torch.stack([local[name] for local, _, _, _ in answers]).double().mean(0)
        plain = name.startswith("norm") or name.endswith("bias")
        if plain or mean.numel() > 1000:
            assert db(found - mean, mean) > (120 if plain else matrices), name
        else:  # too few errors for an average: each is at most half a step, 2^-4
            assert (found - mean).abs().max() <= 2**-4 * mean.abs().max(), name


def accumulate(rank, world, group, level):
    """Four micro-batches, three of them local, and the same data at once."""
    model = converted(level)
    parts = [batch(10 * rank + i) for i in range(4)]
    for i, part in enumerate(parts):
        with model.no_sync() if i < 3 else contextlib.nullcontext():
            (model(tokens=part) / 4).backward()
        if i == 2:
            local = stored_bytes(model)
    several, stored = grads(model), stored_bytes(model)
    model.zero_grad()
    model(tokens=torch.cat(parts)).backward()
    return local, several, stored, grads(model)


@pytest.mark.parametrize(("level", "least"), [("O0", 36), ("O2", 19)])
def test_no_sync_accumulates_locally_and_sends_the_sum(ranks, level, least):
    """One batch and four differ in how operands are scaled and rounded: a product is good to 24 dB in FP8, and two such
    errors are 3 dB more; another 2 for sums with cancellation."""
    answers = ranks(2, accumulate, level)
    assert not same_bytes([local for local, _, _, _ in answers])
    assert same_bytes([stored for _, _, stored, _ in answers])
    for name, at_once in answers[0][3].items():
        if at_once is not None and at_once.dim() == 2:
            assert db(answers[0][1][name] - at_once, at_once) > least, name


def accumulate_twice(rank, world, group):
    torch.manual_seed(0)
    plain = nn.Linear(8, 4)
    ours = DataParallel(plain.named_parameters(), rule=RULE, group=CountedGroup())
    inputs = [torch.randn(3, 8, generator=torch.Generator().manual_seed(10 * rank + i)) for i in range(3)]
    for x in inputs[:2]:
        plain(x).square().sum().backward()
    found = [p.grad.clone() for p in plain.parameters()]
    ours.remove()
    plain.zero_grad()
    wrapped = nn.parallel.DistributedDataParallel(plain)
    for x in inputs[:2]:
        wrapped(x).square().sum().backward()
    return [torch.equal(a, p.grad) for a, p in zip(found, plain.parameters())]


def test_a_second_backward_without_zero_grad_reduces_the_sum_as_in_torch(ranks):
    assert ranks(2, accumulate_twice) == [[True, True]] * 2


# --- ranks that differ ----------------------------------------------------------------------------------------------


def branches(rank, world, group, level, bucket_bytes):
    model = converted(level, data_parallel=False)
    reducer = DataParallel(
        model.named_parameters(), group=CountedGroup(), rule=(O2 if level == "O2" else O0)[Role.GRAD_WEIGHT],
        bucket_bytes=bucket_bytes,
    )  # fmt: skip
    model.never.weight.grad = kept = model.never.weight.detach().clone()
    with reducer.no_sync():
        model(tokens=batch(rank), branch="left" if rank else "right").backward()
    local = grads(model)
    for name, p in model.named_parameters():
        p.grad = None if not name.startswith("never.weight") else p.grad
    with Spy(world, rank) as spy:
        model(tokens=batch(rank), branch="left" if rank else "right").backward()
    return local, grads(model), stored_bytes(model), spy.calls, spy.sent, reducer.wire, model.never.weight.grad is kept


@pytest.mark.parametrize("bucket_bytes", [1, 4000, 1 << 30])
@pytest.mark.parametrize("level", ["O0", "O2"])
def test_ranks_that_use_different_parameters(ranks, level, bucket_bytes):
    """A parameter that one rank left out counts as zero there; the order of collectives is the same on all ranks."""
    answers = ranks(3, branches, level, bucket_bytes)
    assert same_bytes([a[2] for a in answers])
    assert all([(c.name, c.dtype) for c in a[3]] == [(c.name, c.dtype) for c in answers[0][3]] for a in answers)
    for local, found, _, calls, sent, wire, kept in answers:
        assert kept
        assert found["never.bias"] is None
        assert (local["left.weight"] is None) != (local["right.weight"] is None)
        assert wire.sent == sent
        assert not any(c.name == "allreduce" and c.dtype in (torch.uint8, E4M3.dtype) for c in calls)
    for name in ("left.weight", "right.weight", "left.bias", "embed.weight"):
        mean = sum(0 if a[0][name] is None else a[0][name].double() for a in answers) / 3
        assert db(answers[0][1][name] - mean, mean) > 30, name


def poisoned(rank, world, group, level, special):
    model = converted(level)
    loss = model(tokens=batch(rank))
    if rank == 1:
        loss = loss * special
    loss.backward()
    flags = {n: p.grad.scale_inv for n, p in model.named_parameters() if isinstance(p.grad, ScalingTensor)}
    return grads(model), flags


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("level", ["O0", "O2"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_so_on_all(ranks, level, special):
    for found, flags in ranks(3, poisoned, level, special):
        assert not any(torch.isfinite(g).any() for n, g in found.items() if g is not None and n.startswith("left"))
        if level == "O2":
            assert flags["left.weight"].isinf().all()


# --- what travels ---------------------------------------------------------------------------------------------------


def traffic(rank, world, group, level):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 300), nn.LayerNorm(300), nn.ReLU(), nn.Linear(300, 128))
    model, _ = amp.initialize(model, level=level)
    with Spy(world, rank) as spy:
        model(torch.randn(4, 256)).square().mean().backward()
    with Spy(world, rank) as silent, model.no_sync():
        model(torch.randn(4, 256)).square().mean().backward()
    return spy.names, spy.sent, amp.wire_bytes(model), silent.names


@pytest.mark.parametrize("world", [2, 4])
def test_the_ledger_is_what_was_sent_and_half_of_bf16(ranks, world):
    matrices, others = 256 * 300 + 300 * 128, 300 + 2 * 300 + 128
    quantized = ["alltoall_base", "alltoall_base", "allreduce", "allgather_base"]
    for names, sent, wire, silent in ranks(world, traffic, "O2"):
        assert silent == []
        assert sorted(names) == sorted([*quantized, "allreduce"])
        assert wire["sent"] == sent
        assert wire["fp8_bf16"] == ring_bytes(2 * matrices, world)
        assert wire["bf16"] == wire["fp8_bf16"] + ring_bytes(2 * others, world)
        assert wire["fp8_sent"] <= 0.52 * wire["fp8_bf16"]
    for names, sent, wire, _ in ranks(world, traffic, "O0"):
        assert names == ["allreduce", "allreduce"]
        assert wire["sent"] == sent
        assert (wire["fp8_sent"], wire["fp8_bf16"]) == (0, 0)


def profiled(rank, world, group):
    model = converted("O2")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(tokens=batch(rank)).backward()
    return {event.key for event in profile.key_averages() if event.key.startswith("comm/")}


def test_profiler_ranges_name_bucket_and_leg(ranks):
    legs = {"pack", "all_to_all", "sum", "amax", "all_gather", "write"}
    for found in ranks(2, profiled):
        assert {f"comm/bucket0/{leg}" for leg in legs} <= found or {f"comm/bucket1/{leg}" for leg in legs} <= found


def overlapped(rank, world, group):
    """Buckets leave while backward goes on: collectives before the last gradient is there."""
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8)))
    model = amp.initialize(model, level="O2", data_parallel=False)[0]
    DataParallel(model.named_parameters(), rule=RULE, group=CountedGroup(), bucket_bytes=32 * 32)
    seen = []
    with Spy(world, rank) as spy:
        model[0].weight.register_hook(lambda grad: seen.append(list(spy.names)))
        model(torch.randn(4, 32)).sum().backward()
    return seen[0], spy.names


def test_buckets_overlap_with_backward_in_one_order(ranks):
    """Seven of eight buckets have left before the first layer's gradient; a launch moves those a step on that left more
    than four launches ago."""
    (seen, names), other = ranks(2, overlapped)
    assert (seen, names) == other
    launch = ["alltoall_base", "alltoall_base"]
    assert seen == [*(6 * launch), "allreduce", *launch, "allgather_base", "allreduce"]
    assert sorted(names) == sorted(8 * [*launch, "allreduce", "allgather_base"])


# --- construction, hooks, errors ------------------------------------------------------------------------------------


def constructed(rank, world, group, level):
    torch.manual_seed(rank)
    model = Net()
    model.count.fill_(rank + 3)
    model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-3), level=level)
    hooked = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens=batch(rank)).backward()
        optimizer.step()
    state = {n: real(p).detach().clone() for n, p in model.named_parameters()}
    for name, scaler in amp.state_dict(model, optimizer)["scalers"].items():
        state |= {f"{name}.{key}": value for key, value in scaler.items() if isinstance(value, Tensor)}
    amp.restore(model)
    with Spy(world, rank) as spy:
        model(tokens=batch(rank)).backward()
    return hooked, int(model.count), state, spy.names


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_ranks_start_alike_and_stay_alike(ranks, level):
    """Weights, masters and amax histories, though every rank built another model and saw other data."""
    answers = ranks(3, constructed, level)
    for hooked, count, state, after_restore in answers:
        assert hooked == len([p for p in Net().parameters() if p.requires_grad])  # a tied weight once
        assert count == 3
        assert all(torch.equal(state[n], answers[0][2][n]) for n in state)
        assert after_restore == []


def test_one_rank_needs_no_hooks(ranks):
    assert ranks(1, one_rank) == [([], 0)]


def one_rank(rank, world, group):
    model = nn.Linear(4, 4)
    reducer = DataParallel(model.named_parameters(), rule=RULE, group=CountedGroup())
    with Spy(world, rank) as spy, reducer.no_sync():
        model(torch.randn(2, 4)).sum().backward()
    return spy.names, reducer.wire.sent


def raised(action) -> str:
    try:
        action()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def errors(rank, world, group):
    found = {"shapes": raised(lambda: amp.initialize(nn.Linear(4, 4 + rank // 2)))}
    model = nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    found["bucket"] = raised(
        lambda: DataParallel(model.named_parameters(), rule=RULE, group=CountedGroup(), bucket_bytes=0)
    )
    found["rounding"] = raised(
        lambda: DataParallel(
            model.named_parameters(), rule=Rule(format=E4M3, rounding="stochastic"), group=CountedGroup()
        )
    )
    reducer = DataParallel(model.named_parameters(), rule=RULE, group=CountedGroup())
    found["outside"] = raised(lambda: model.weight._post_accumulate_grad_hooks.popitem()[1](model.weight))
    reducer.remove()
    reducer = DataParallel(model.named_parameters(), rule=RULE, group=CountedGroup())
    model.bias.requires_grad_(True)
    found["thawed"] = raised(lambda: model(torch.ones(1, 4)).sum().backward())
    reducer.remove()
    return found


def test_errors_say_rule_value_and_remedy(ranks):
    expected = {
        "shapes": ("ValueError", "same model", "weight (4, 4)", "ranks 0-1 and (5, 4)", "rank 2", "configuration"),
        "bucket": ("ValueError", "bucket_bytes", "got 0", "default"),
        "rounding": ("ValueError", "nearest", "'stochastic'", "GRAD_WEIGHT"),
        "outside": ("RuntimeError", "outside", "loss.backward()"),
        "thawed": ("RuntimeError", "bias", "before amp.initialize"),
    }
    for found in ranks(3, errors):
        for case, words in expected.items():
            assert all(word in found[case] for word in words), found[case]


def checkpointed(rank, world, group, reentrant):
    model = converted("O2")
    x = nn.functional.one_hot(torch.arange(24) % 24).float().requires_grad_()

    def block(x):
        return model.left(torch.relu(model.wide(x)))

    def loss():
        return model.one(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)).square().mean()

    loss().backward()
    found = stored_bytes(model)
    model.zero_grad()
    model.one(block(x)).square().mean().backward()
    return found, stored_bytes(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(ranks, reentrant):
    for found, expected in ranks(2, checkpointed, reentrant):
        assert same_bytes([found, expected])


def reused(rank, world, group):
    """One weight in two reentrant checkpoints is accumulated twice in one backward, which no hook can foresee."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    DataParallel(model.named_parameters(), rule=RULE, group=CountedGroup(), bucket_bytes=1)
    x = torch.randn(2, 8, requires_grad=True)
    for _ in range(2):
        x = torch.utils.checkpoint.checkpoint(model[0], x, use_reentrant=True)
    return raised(lambda: model[1](x).sum().backward())


def test_a_second_gradient_in_one_backward_is_refused(ranks):
    for text in ranks(2, reused):
        assert "0." in text
        assert "use_reentrant=False" in text


# --- against torch's own --------------------------------------------------------------------------------------------


def plain_pair(rank, world, group):
    """A plain model under our reducer and under torch's: the same bits, since two addends have one order."""
    torch.manual_seed(0)
    plain = Net()
    reducer = DataParallel(plain.named_parameters(), rule=RULE, group=CountedGroup())
    branch = "left" if rank else "right"
    plain(tokens=batch(rank), branch=branch).backward()
    found = grads(plain)
    reducer.remove()
    plain.zero_grad()
    wrapped = nn.parallel.DistributedDataParallel(plain, find_unused_parameters=True)
    wrapped(tokens=batch(rank), branch=branch).backward()
    return found, grads(plain)


def test_a_plain_model_is_reduced_as_torch_does(ranks):
    for found, expected in ranks(2, plain_pair):
        assert {n for n, g in found.items() if g is None} == {n for n, g in expected.items() if g is None}
        assert all(torch.equal(found[n], g) for n, g in expected.items() if g is not None)


def wrapped_in_ddp(rank, world, group, init_sync):
    model = converted("O2", data_parallel=init_sync)
    wrapped = []  # torch's hooks live as long as the wrapper

    def step():
        wrapped.append(nn.parallel.DistributedDataParallel(model, init_sync=init_sync))
        wrapped[0](tokens=batch(rank)).backward()

    return raised(step)


@pytest.mark.parametrize("init_sync", [True, False])
def test_torch_ddp_around_a_converted_model_is_refused(ranks, init_sync):
    """Its constructor flattens the weights, its reducer would multiply gradients: neither is defined."""
    for text in ranks(2, wrapped_in_ddp, init_sync):
        assert text.startswith("NotImplementedError")
        assert "amp.initialize" in text
        assert "model.no_sync()" in text or not init_sync


def test_the_rank_functions_can_tell_a_rounding(ranks):
    """The negative control of same_bytes and of the dB above: one step of E4M3 in one element is seen by both."""
    x = quantize(torch.ones(4, 4), RULE)
    y = quantize(torch.ones(4, 4), RULE)
    y.payload.view(torch.uint8)[0, 0] += 1
    assert not same_bytes([{"w": t.payload.view(torch.uint8)} for t in (x, y)])
    assert db(x.dequantize() - y.dequantize(), x.dequantize()) < 31
