"""Every optimizer, held to the same table: torch's arithmetic with FP32 states, a bounded loss with few bits, and the
manners of a torch optimizer. Adding one is adding a row."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msamp_like import amp, optim
from msamp_like.formats import BF16, E4M3, E5M2, FP16, FP32
from msamp_like.optim.from_torch import check
from msamp_like.policy import GEMM_ROLES, O0, O1, O2, Policy, Role, Rule
from msamp_like.tensor import ScalingTensor, real
from tests.closeness import same_bits, sqnr

EXACT = O1.with_rule(Role.MASTER_WEIGHT, Rule(format=FP32)).with_rule(Role.GRAD_WEIGHT, Rule(format=FP32))
"""FP32 everywhere an optimizer looks: what is left is its arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """``theirs`` is what a user builds: torch's class, or ours of Lion, which torch has not."""

    name: str
    ours: type[optim.LowPrecisionOptimizer]
    theirs: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    states: Sequence[str] = ()
    lr: float = 1e-3
    exact: Policy = EXACT

    def __str__(self) -> str:
        return self.name

    def states_of(self, p: Tensor) -> set[str]:
        if self.ours is optim.Muon:
            return {"momentum_buffer"} if p.ndim == 2 else set(MOMENTS)
        return set(self.states)

    def build(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        return self.theirs(params, **{"lr": self.lr, **self.options, **more})


class ReferenceLion(torch.optim.Optimizer):
    """Chen et al., 2023, algorithm 2, written with torch's own in-place operations."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.lerp(p.grad, momentum, beta1).sign(), alpha=group["lr"])
                momentum.lerp_(p.grad, 1 - beta2)


class ReferenceMuon(torch.optim.Optimizer):
    """Jordan et al., 2024, in FP32, beside torch's AdamW for what is no matrix."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            vectors = [p for p in group["params"] if p.ndim != 2]
            if vectors and not hasattr(self, "others"):
                self.others = torch.optim.AdamW(vectors, lr=group["lr"], betas=(0.9, 0.95), weight_decay=0.1)
            if vectors:
                self.others.step()
                self.state.update(self.others.state)
            for p in (p for p in group["params"] if p.ndim == 2):
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                x = torch.lerp(p.grad, momentum, group["momentum"])
                x /= x.norm()
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(x, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)


def muon(params: Any, **options: Any) -> torch.optim.Optimizer:
    """Ours, with the matrices of each group apart from its vectors."""
    params = list(params)
    groups = params if isinstance(params[0], dict) else [{"params": params}]
    parts = [
        {**group, "params": [p for p in group["params"] if (p.ndim == 2) == matrices], "use_muon": matrices}
        for group in groups
        for matrices in (True, False)
    ]
    return optim.Muon([part for part in parts if part["params"]], **options)


MOMENTS = ("exp_avg", "exp_avg_sq")
FP32_PRODUCTS = Policy(
    name="exact", rules={**EXACT.rules, **dict.fromkeys(GEMM_ROLES, Rule(format=FP32))}, parameter=EXACT.parameter
)
"""For an optimizer that multiplies."""
TABLE = [
    Row(name="Adam", ours=optim.Adam, theirs=torch.optim.Adam, states=MOMENTS),
    Row(name="Adam-L2", ours=optim.Adam, theirs=torch.optim.Adam, options={"weight_decay": 1e-3}, states=MOMENTS),
    Row(name="Adam-betas", ours=optim.Adam, theirs=torch.optim.Adam,
        options={"betas": (0.8, 0.95), "eps": 1e-6}, states=MOMENTS),
    Row(name="AdamW", ours=optim.AdamW, theirs=torch.optim.AdamW, options={"weight_decay": 1e-3}, states=MOMENTS),
    Row(name="AdamW-0", ours=optim.AdamW, theirs=torch.optim.AdamW, options={"weight_decay": 0.0}, states=MOMENTS),
    Row(name="Adam-decoupled", ours=optim.AdamW, theirs=torch.optim.Adam, states=MOMENTS,
        options={"weight_decay": 0.1, "decoupled_weight_decay": True}),
    Row(name="SGD", ours=optim.SGD, theirs=torch.optim.SGD, states=("momentum_buffer",), lr=1e-2),
    Row(name="SGD-momentum", ours=optim.SGD, theirs=torch.optim.SGD, states=("momentum_buffer",), lr=1e-2,
        options={"momentum": 0.9, "weight_decay": 1e-2}),
    Row(name="SGD-dampened", ours=optim.SGD, theirs=torch.optim.SGD, states=("momentum_buffer",), lr=1e-2,
        options={"momentum": 0.9, "dampening": 0.5}),
    Row(name="SGD-nesterov", ours=optim.SGD, theirs=torch.optim.SGD, states=("momentum_buffer",), lr=1e-2,
        options={"momentum": 0.9, "nesterov": True}),
    Row(name="Lion", ours=optim.Lion, theirs=optim.Lion, states=("exp_avg",),
        options={"weight_decay": 0.1}),
    Row(name="Muon", ours=optim.Muon, theirs=muon, states=("momentum_buffer", *MOMENTS), exact=FP32_PRODUCTS),
]  # fmt: skip
every_optimizer = pytest.mark.parametrize("row", TABLE, ids=str)
one_of_each = pytest.mark.parametrize(
    "row", [row for row in TABLE if row.name in ("Adam", "AdamW", "SGD-momentum", "Lion", "Muon")], ids=str
)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 8, bias=False))


def pair(row: Row, level: Policy | str) -> tuple[nn.Module, Any, nn.Module, Any]:
    """A plain model with torch's optimizer, and its converted copy with ours."""
    plain = network()
    ours = copy.deepcopy(plain)
    references: dict[Any, Any] = {optim.Lion: ReferenceLion, optim.Muon: ReferenceMuon}
    theirs = references.get(row.ours, row.theirs)(plain.parameters(), lr=row.lr, **row.options)
    model, optimizer = amp.initialize(ours, row.build(ours.parameters()), level=level)
    assert type(optimizer) is row.ours
    return plain, theirs, model, optimizer


def give_gradients(step: int, *models: nn.Module) -> None:
    """The same gradients to all, so that optimizers are compared and not products."""
    for number, parameters in enumerate(zip(*(m.parameters() for m in models))):
        generator = torch.Generator().manual_seed(1000 * step + number)
        grad = torch.randn(parameters[0].shape, generator=generator) * 10.0 ** -(number % 4)
        for p in parameters:
            p.grad = grad.to(p.dtype).clone()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(step, model)
        optimizer.step()


# --- arithmetic -----------------------------------------------------------------------------------------------------


@every_optimizer
def test_fp32_states_do_torchs_arithmetic(row):
    """torch's CPU loops contract some products and sums (addcmul, lerp), ours round each: a few of FP32's last bits,
    whose share in an update of size lr is far below 2^-16."""
    plain, theirs, model, optimizer = pair(row, row.exact)
    start = [p.detach().clone() for p in plain.parameters()]
    for step in range(6):
        give_gradients(step, plain, model)
        theirs.step()
        optimizer.step()
    for before, p, q in zip(start, plain.parameters(), model.parameters()):
        assert isinstance(q, ScalingTensor) == (p.ndim == 2)
        difference, moved = (p - real(q)).abs().max(), (p - before).abs().max()
        assert difference <= 2.0**-16 * moved + 2.0**-21 * before.abs().max()
        assert moved > 50 * difference
        for name in row.states:
            if theirs.state[p].get(name) is not None:
                assert sqnr(theirs.state[p][name], optimizer.state[q][name]) > 110, name


@every_optimizer
def test_few_bits_stay_near_fp32(row):
    """Behaviour 31: 4 steps at lr 1e-3 within 3e-4 of torch, that is 0.3 of a step, for all but 1 in 200 elements, and
    within half a step for all. The FP16 master's rounding of weights up to 0.2 is 0.1 of a step, the rest is the E4M3
    first moment's. Lion's sign turns where rounding carries an average across 0: more elements there, and 2 steps."""
    plain, theirs, model, optimizer = pair(row, O2)
    for step in range(4):
        give_gradients(step, plain, model)
        theirs.step()
        optimizer.step()
    for p, q in zip(plain.parameters(), model.parameters()):
        if p.ndim == 1:  # vectors keep FP32
            torch.testing.assert_close(q, p, rtol=0, atol=2.0**-14 * row.lr + 1e-7)
            continue
        difference = (p - q.dequantize()).abs() / row.lr
        difference /= 10 if row.ours is optim.SGD else 1  # whose step is a gradient of up to 4 and not a normalized 1
        lion = row.ours is optim.Lion
        assert (difference > 0.3).float().mean() <= (0.02 if lion else 0.005)
        assert difference.max() < (2.5 if lion else 0.5)
        assert difference.max() > 2.0**-12  # low precision, indeed


@pytest.mark.parametrize("first", [E4M3, FP16], ids=str)
@pytest.mark.parametrize("second", [E4M3, FP16], ids=str)
@pytest.mark.parametrize("block", [(-1, -1), (1, 128), (128, 128), (1, 32)], ids=str)
def test_adam_moments_in_any_format_and_block(first, second, block):
    """Behaviour 31's full square: 3e-4, but for 1 in 200 elements, with the paper's FP16 second moment; E4M3's 3 bits
    and narrow range cost more there."""
    policy = O2.with_rule("first_moment", Rule(format=first, block=block))
    policy = policy.with_rule("second_moment", Rule(format=second, block=block))
    plain, theirs, model, optimizer = pair(TABLE[3], policy)
    for step in range(4):
        give_gradients(step, plain, model)
        theirs.step()
        optimizer.step()
    for p, q in zip(plain.parameters(), model.parameters()):
        difference = (p - real(q)).detach().abs()
        assert difference.flatten().quantile(0.995) < (3e-4 if second is FP16 else 3e-3)
        assert difference.max() < (5e-4 if second is FP16 else 2e-2)


@every_optimizer
@pytest.mark.parametrize("level", [O0, O1, O2], ids=lambda level: level.name)
def test_states_are_stored_as_the_policy_says(row, level):
    """Behaviour 32, for every level; vectors are FP32 at each."""
    _, _, model, optimizer = pair(row, level)
    train(model, optimizer, range(2))
    for p in model.parameters():
        state = optimizer.state[p]
        assert state["step"] == 2
        assert set(state) - {"step", "master_weight"} == row.states_of(p)
        assert ("master_weight" in state) == (p.ndim == 2 and level is O0)
        for name, role in row.ours.roles.items():
            if name not in row.states_of(p):
                continue
            if p.ndim == 2 and level[role].format.scaled:
                assert (state[name].format, state[name].block) == (level[role].format, level[role].block)
            else:
                assert type(state[name]) is Tensor
                assert state[name].dtype == torch.float32


def test_coupled_decay_enters_the_moments_that_are_stored():
    """Behaviour 34: after one step m is (1 - beta1)(g + decay w), so with g = 0 it is the decay alone."""
    model, _ = amp.initialize(network(), level=EXACT)
    optimizer = optim.Adam(model.parameters(), weight_decay=0.5, policy=EXACT)
    before = [real(p).detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros(p.shape)
    optimizer.step()
    for p, w in zip(model.parameters(), before):
        assert sqnr(w * 0.05, optimizer.state[p]["exp_avg"]) > 110 or w.norm() == 0
        assert sqnr((w * 0.5).square() * 0.001, optimizer.state[p]["exp_avg_sq"]) > 110 or w.norm() == 0


def test_weights_follow_the_moments_before_they_are_rounded():
    """One O2 step from zero moments: the update uses g itself, not the E4M3 that is stored of it, so it is exactly
    lr sign(g) in FP32 and what is left is the FP16 master's rounding."""
    _, _, model, optimizer = pair(TABLE[4], O2)
    before = [real(p).clone() for p in model.parameters()]
    give_gradients(0, model)
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, w, g in zip(model.parameters(), before, grads):
        step = (w - real(p)) / 1e-3
        assert (step - g.sign()).abs()[g.abs() > 1e-3].max() < 0.25


# --- resume and adoption --------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("level", [O0, O1, O2], ids=lambda level: level.name)
def test_resume_takes_the_same_next_step_to_the_bit(row, level):
    """Behaviour 33."""
    _, _, model, optimizer = pair(row, level)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(amp.state_dict(model, optimizer))
    _, _, other, resumed = pair(row, level)
    train(other, resumed, range(5, 7))
    amp.load_state_dict(other, resumed, saved)
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, range(3, 5))
    for p, q in zip(model.parameters(), other.parameters()):
        assert same_bits(p, q)
        assert optimizer.state[p]["step"] == resumed.state[q]["step"] == 5
        assert all(same_bits(optimizer.state[p][n], resumed.state[q][n]) for n in optimizer.state[p] if n != "step")


@pytest.mark.parametrize("level", [EXACT, O0, O2], ids=lambda level: level.name)
@every_optimizer
def test_a_stepped_optimizer_is_taken_over(row, level):
    """The third step after two of torch's is torch's third step, as close as the level is."""
    plain = network()
    theirs = row.build(plain.parameters())
    train(plain, theirs, range(2))
    ours = copy.deepcopy(plain)
    adopted = row.build(ours.parameters())
    adopted.load_state_dict(copy.deepcopy(theirs.state_dict()))
    model, optimizer = amp.initialize(ours, adopted, level=level)
    for p in model.parameters():
        assert optimizer.state[p]["step"] in (2, 0 if row.name == "SGD" else 1)  # torch's SGD does not count
    assert not adopted.state  # nothing is held twice
    before = [p.detach().clone() for p in plain.parameters()]
    for m, o in ((plain, theirs), (model, optimizer)):
        train(m, o, range(2, 3))
    for p, q, w in zip(plain.parameters(), model.parameters(), before):
        moved = (p - w).detach()
        held = optimizer.state[q].get("master_weight", q)
        if row.ours is not optim.Lion:  # whose steps all have one size: a turned sign is as large as the step
            floor = 12 if level is O2 and p.ndim == 2 else 60
            if row.ours is optim.Muon and p.ndim == 2:
                floor = min(floor - 2, 15)  # "theirs" orthogonalizes with FP8 products, which alone cost 20 dB
            assert sqnr(moved, real(held).detach() - w) > floor
        else:
            turned = (moved.sign() != (real(held).detach() - w).sign()).float().mean()
            assert turned <= (0.1 if level is O2 else 0)


@pytest.mark.parametrize("row", [row for row in TABLE if row.name in ("AdamW", "SGD-momentum", "Lion")], ids=str)
def test_a_torch_state_dict_loads_as_it_is(row):
    """A checkpoint of plain training continues in ours, a second moment of 1e-9 included."""
    plain = network()
    theirs = row.build(plain.parameters())
    train(plain, theirs, range(2))
    saved = copy.deepcopy(theirs.state_dict())
    for state in saved["state"].values():
        if "exp_avg_sq" in state:
            state["exp_avg_sq"].fill_(1e-9)
    model, _ = amp.initialize(network().bfloat16(), level=O2)
    optimizer = row.ours(model.parameters(), policy=O2)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == row.lr
    for index, p in enumerate(model.parameters()):
        assert optimizer.state[p]["step"] == (1 if row.ours is optim.SGD else 2)
        for name in row.states:
            assert sqnr(saved["state"][index][name], optimizer.state[p][name]) > 25


def test_states_of_another_optimizer_or_model_are_refused_before_anything_is_written():
    _, _, model, optimizer = pair(TABLE[3], O2)
    train(model, optimizer, range(2))
    good = copy.deepcopy(optimizer.state_dict())
    others = [pair(row, O2) for row in (TABLE[7], TABLE[-2])]
    for _, _, other, theirs in others:
        train(other, theirs, range(2))
        with pytest.raises(ValueError, match="must be of a AdamW, whose states are exp_avg, exp_avg_sq, got"):
            optimizer.load_state_dict(theirs.state_dict())
        with pytest.raises(ValueError, match=f"must be of a {type(theirs).__name__}, whose states are"):
            theirs.load_state_dict(good)
    fewer = {**good, "param_groups": [{**good["param_groups"][0], "params": [0, 1]}]}
    with pytest.raises(ValueError, match=r"same parameter groups, got sizes \[2\] for \[5\]"):
        optimizer.load_state_dict(fewer)
    turned = copy.deepcopy(good)
    turned["state"][4]["exp_avg"] = torch.zeros(3, 3)
    turned["param_groups"][0]["lr"] = 77.0
    with pytest.raises(ValueError, match=r"'exp_avg' .* shape \(8, 40\), got \(3, 3\)"):
        optimizer.load_state_dict(turned)
    assert same_bits(optimizer.state_dict()["state"][4]["exp_avg"], good["state"][4]["exp_avg"])
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_state_dict_has_torchs_form():
    _, _, model, optimizer = pair(TABLE[3], O2)
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    assert list(state) == ["state", "param_groups", "seed", "skipped_steps"]
    assert state["param_groups"][0]["params"] == [0, 1, 2, 3, 4]
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


# --- manners --------------------------------------------------------------------------------------------------------


@one_of_each
def test_a_scheduler_built_before_drives_ours_without_a_warning(row):
    model = network()
    source = row.build(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(source, lambda step: 0.5**step)
    model, optimizer = amp.initialize(model, source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            assert optimizer.param_groups[0]["lr"] == row.lr * 0.5**step
            give_gradients(step, model)
            before = [real(p).clone() for p in model.parameters()]
            optimizer.step()
            scheduler.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [real(p).clone() for p in model.parameters()]
    give_gradients(9, model)
    optimizer.step()
    assert all(torch.equal(a, real(p)) for a, p in zip(before, model.parameters()))


@pytest.mark.parametrize(
    "build",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
    ],
)
def test_a_scheduler_can_be_built_on_ours(build):
    _, _, model, optimizer = pair(TABLE[3], O2)
    scheduler = build(optimizer)
    train(model, optimizer, range(1))
    scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))


def test_a_closure_is_called_once_with_gradients_on():
    model = network()
    model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters()))
    x = torch.randn(4, 24)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        calls.append(loss.item())
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert calls == [first.item(), second.item()]
    assert second < first


@one_of_each
def test_groups_keep_their_own_settings(row):
    model = network()
    frozen_like = {"params": [model[2].weight], "lr": 0.0}
    groups = [{"params": [*model[0].parameters(), *model[1].parameters()]}, frozen_like]
    model, optimizer = amp.initialize(model, row.build(groups))
    before = [real(p).clone() for p in model.parameters()]
    train(model, optimizer, range(2))
    moved = [not torch.equal(a, real(p)) for a, p in zip(before, model.parameters())]
    assert moved == [True, True, True, True, False]
    assert [group["lr"] for group in optimizer.param_groups if model[2].weight in set(group["params"])] == [0.0]


@one_of_each
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_in_both_ways(row, to_none):
    model = network()
    model, optimizer = amp.initialize(model, row.build(model.parameters()))
    x = torch.randn(4, 24)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=to_none)
        assert all(p.grad is None or real(p.grad).count_nonzero() == 0 for p in model.parameters())
        model(x).square().mean().backward()
        fresh = [real(p.grad).clone() for p in model.parameters()]
        model.zero_grad()
        model(x).square().mean().backward()
        # zeros plus a gradient is the gradient, in BF16 until the step; the first alone is stored in E4M3 at once
        assert all(sqnr(a, p.grad) > 28 for a, p in zip(fresh, model.parameters()))
        optimizer.step()


@one_of_each
def test_a_parameter_without_gradient_is_left_alone(row):
    model = network()
    model, optimizer = amp.initialize(model, row.build(model.parameters()))
    give_gradients(0, model)
    model[2].weight.grad = None
    before = model[2].weight.detach().clone()
    optimizer.step()
    assert same_bits(model[2].weight.detach(), before)
    assert optimizer.state[model[2].weight].get("step") == 0


@one_of_each
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", [0, 2])  # a matrix, a vector
def test_a_non_finite_gradient_skips_the_step_and_says_so(row, value, where, caplog):
    model = network()
    model, optimizer = amp.initialize(model, row.build(model.parameters()))
    train(model, optimizer, range(1))
    before = copy.deepcopy(amp.state_dict(model, optimizer))
    give_gradients(1, model)
    list(model.parameters())[where].grad.view(-1)[3] = value
    with caplog.at_level(logging.WARNING):
        optimizer.step()
        optimizer.step()
    assert optimizer.skipped_steps == 2
    assert "2 skipped so far, 2 in a row" in caplog.text
    after = amp.state_dict(model, optimizer)
    assert all(same_bits(a, b) for a, b in zip(before["model"].values(), after["model"].values()))
    for index, state in before["optimizers"][0]["state"].items():
        now = after["optimizers"][0]["state"][index]
        assert all(same_bits(state[n], now[n]) if n != "step" else state[n] == now[n] for n in state)
    caplog.clear()
    train(model, optimizer, range(1, 2))  # goes on with the next finite one
    assert not caplog.text
    assert amp.state_dict(model, optimizer)["optimizers"][0]["skipped_steps"] == 2


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_a_non_finite_loss_skips_the_step_at_every_level(level):
    model = network()
    model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters()), level=level)
    before = [real(p).clone() for p in model.parameters()]
    for factor in (float("inf"), float("nan")):
        (model(torch.randn(4, 24)).sum() * factor).backward()
        amp.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 2
    assert all(torch.equal(a, real(p)) for a, p in zip(before, model.parameters()))


@one_of_each
def test_grad_scaler_scales_unscales_and_skips(row):
    """Behaviour 37, through torch's own loop: with a power of two every bit is that of training without it."""
    x = torch.randn(16, 24)
    models = []
    for scaled in (True, False):
        torch.manual_seed(1)
        model = network()
        model, optimizer = amp.initialize(model, row.build(model.parameters()))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for _ in range(3):
            scaler.scale(model(x).square().mean()).backward()
            scaler.unscale_(optimizer)
            amp.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        models.append(model)
        if scaled:
            model[0].weight.grad = None
            (scaler.scale(model(x).sum()) * float("inf")).backward()
            before = [real(p).clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == 512.0
            assert optimizer.skipped_steps == 0  # the scaler's skip, not ours
            assert all(torch.equal(a, real(p)) for a, p in zip(before, model.parameters()))
    for p, q in zip(*(m.parameters() for m in models)):
        assert sqnr(p, q) > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@one_of_each
def test_plain_parameters_of_any_dtype_keep_an_fp32_master(row, dtype):
    """A norm of a BF16 model: 1e-3 is a quarter of BF16's step at 1, so only a master in FP32 sees a single update."""
    model = network().to(dtype)
    model, optimizer = amp.initialize(model, row.build(model.parameters(), lr=1e-3, weight_decay=0.0))
    norm = model[1].weight
    for _ in range(8):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if not isinstance(p, ScalingTensor) else None
        optimizer.step()
    master = optimizer.state[norm]["master_weight"]
    assert master.dtype == torch.float32
    assert (1 - master).min() > 5e-3
    assert torch.equal(norm.detach(), master.to(dtype))
    assert norm.detach().max() < 1


# --- stochastic rounding --------------------------------------------------------------------------------------------


def test_stochastic_rounding_depends_on_seed_parameter_and_step_alone():
    policy = O2.with_rule("master_weight", Rule(format=FP16, block=(1, 128), rounding="stochastic"))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = network()
        model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters()), level=policy, seed=seed)
        train(model, optimizer, range(2))
        torch.rand(17)  # torch's own generator has no part in it
        results.append([p.detach() for p in model.parameters() if isinstance(p, ScalingTensor)])
    assert all(same_bits(a, b) for a, b in zip(results[0], results[1]))
    assert not any(same_bits(a, b) for a, b in zip(results[0], results[2]))


def test_an_average_in_few_bits_still_moves():
    """v = 0.999 v + 0.001 g^2 from v = 1 to g^2 = 4 moves by 0.3 % a step, below half of E4M3's 6 %: rounded to nearest
    it stays for ever; stochastically it follows FP32 in the mean."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        rule = Rule(format=E4M3, block=(1, 128), rounding=rounding)
        policy = O2.with_rule("second_moment", rule)
        model = nn.Sequential(nn.Linear(256, 64, bias=False))
        model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters(), lr=0.0), level=policy)
        p = model[0].weight
        p.grad = torch.full(p.shape, 2.0)
        optimizer.step()
        optimizer.state[p]["exp_avg_sq"].copy_(torch.ones(p.shape))
        for _ in range(20):
            optimizer.step()
        moved[rounding] = optimizer.state[p]["exp_avg_sq"].dequantize().mean().item() - 1
    exact = 3 * (1 - 0.999**20)
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(exact, rel=0.1)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "told"),
    [
        (lambda p: torch.optim.RMSprop(p), TypeError, r"must be one of torch\.optim\.AdamW, .* got .*RMSprop; build"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), ValueError, "amsgrad must be off, got amsgrad=True"),
        (lambda p: torch.optim.SGD(p, maximize=True), ValueError, "maximize must be off"),
        (lambda p: torch.optim.Adam(p, differentiable=True), ValueError, "differentiable must be off"),
    ],
)
def test_what_cannot_be_mapped_is_refused_and_the_rest_is_listed(build, error, told):
    model = network()
    with pytest.raises(error, match=told):
        amp.initialize(model, build(model.parameters()))
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_a_subclass_of_torchs_is_not_taken_for_it():
    class Mine(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("mine")

    with pytest.raises(TypeError, match="Mine; build one of these, or derive yours"):
        check(Mine(network().parameters()))


def test_an_optimizer_derived_from_ours_is_taken():
    """What the how-to promises: an update and the roles of its states, and the base does the rest."""

    class SignSgd(optim.LowPrecisionOptimizer):
        roles = {}  # noqa: RUF012

        def __init__(self, params: Any, lr: float = 0.25, **options: Any) -> None:
            super().__init__(params, {"lr": lr}, **options)

        def update(self, param: Tensor, grad: Tensor, states: Any, group: Any, step: int) -> list[Tensor]:
            return [param - group["lr"] * grad.sign()]

    model = network()
    model, optimizer = amp.initialize(model, SignSgd(model.parameters()), level=EXACT)
    before = [real(p).clone() for p in model.parameters()]
    give_gradients(0, model)
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(w - 0.25 * g.sign(), real(p)) for w, g, p in zip(before, grads, model.parameters()))
    model(torch.randn(2, 24)).sum().backward()
    optimizer.step()
    assert model[0].gemm.input.filled == 1  # its steps roll the scalers too


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda p: optim.AdamW(p, lr=-1.0), "must not be negative.*lr=-1.0"),
        (lambda p: optim.Adam(p, betas=(0.9, 1.0)), r"each beta must lie in \[0, 1\).*1.0"),
        (lambda p: optim.SGD(p, momentum=-0.1), "must not be negative.*momentum=-0.1"),
        (lambda p: optim.SGD(p, nesterov=True), "nesterov needs momentum and no dampening"),
        (lambda p: optim.Lion(p, weight_decay=-1.0), "must not be negative.*weight_decay=-1.0"),
        (lambda p: optim.Muon(p), r"must be a matrix, got shape \(40,\); give muon_groups"),
        (lambda p: optim.Muon(p, momentum=1.0), r"momentum must lie in \[0, 1\)"),
        (lambda p: optim.Muon(p, adjust_lr_fn="none"), "adjust_lr_fn must be one of"),
    ],
)
def test_bad_settings_are_refused(build, told):
    with pytest.raises(ValueError, match=told):
        build(network().parameters())


def test_an_optimizer_is_not_copied_apart_from_its_model():
    """A copy would step weights whose scalers it does not roll."""
    _, _, _, optimizer = pair(TABLE[3], O2)
    with pytest.raises(TypeError, match=r"neither copied nor pickled; copy or save amp\.state_dict"):
        copy.deepcopy(optimizer)
    copy.deepcopy(optimizer.state_dict())


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4))
    model, optimizer = amp.initialize(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="must be dense, got a sparse one"):
        optimizer.step()


@pytest.mark.parametrize("format", [E5M2, BF16], ids=str)
def test_gradients_are_rounded_once_when_they_are_stepped(format):
    """``.grad`` holds a BF16 sum after accumulation; the step stores it as the policy has it."""
    policy = O2.with_rule("grad_weight", Rule(format=format))
    model = network()
    model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters()), level=policy)
    for _ in range(2):
        model(torch.randn(4, 24)).sum().backward()
    assert model[0].weight.grad.format is BF16
    optimizer.step()
    assert model[0].weight.grad.format is format
