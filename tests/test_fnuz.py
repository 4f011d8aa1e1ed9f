"""A policy in AMD's fnuz formats: it trains like its OCP twin, neither is read as the other, and weights move between
them by value."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from msamp_like import amp, kernels
from msamp_like.formats import BF16, E4M3, E4M3FNUZ, E5M2FNUZ, FP8_FORMATS, WHOLE
from msamp_like.kernels import Operand
from msamp_like.policy import GEMM_ROLES, LEVELS, O2, O3, Role
from tests.closeness import sqnr


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors; waking a second thread for each costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def initialized(level, seed: int = 0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    return amp.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-2), level)


def train(model: nn.Module, optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(24, 16, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("level", LEVELS.values(), ids=lambda level: level.name)
def test_the_twin_has_every_fp8_format_changed_and_nothing_else(level):
    twin = level.fnuz()
    for role in Role:
        before, after = level[role], twin[role]
        assert after.format.name.startswith(before.format.name)
        assert (before.format in FP8_FORMATS) == after.format.name.endswith("fnuz")
        assert (before.block, before.history, before.rounding) == (after.block, after.history, after.rounding)
    assert twin.name == f"{level.name}+fnuz"


@pytest.mark.parametrize("level", [O2, O2.with_recipe("mxfp8"), O3], ids=["O2", "mxfp8", "O3"])
def test_it_trains_as_its_twin_does(level):
    """The same mantissas, and a scale that takes up the bias: losses differ by roundings at the ends of the range."""
    ocp, fnuz = (train(*initialized(policy), steps=25) for policy in (level, level.fnuz()))
    assert fnuz[-1] < fnuz[0] / 2
    assert fnuz[-1] == pytest.approx(ocp[-1], rel=0.2)


def test_products_of_two_kinds_are_refused():
    x = torch.randn(16, 16)
    operands = {f: Operand(*kernels.quantize_current(x, f, WHOLE)[:2], WHOLE) for f in (E4M3, E4M3FNUZ, E5M2FNUZ, BF16)}
    with pytest.raises(ValueError, match=r"not mixed, got .*e4m3fn with .*e4m3fnuz; store both as one kind"):
        kernels.scaled_matmul(operands[E4M3], operands[E4M3FNUZ], "nt", torch.bfloat16)
    expected = x @ x.t()
    for pair in ((E5M2FNUZ, E4M3FNUZ), (BF16, E4M3FNUZ)):
        product = kernels.scaled_matmul(*(operands[f] for f in pair), "nt", torch.float32)
        assert sqnr(expected, product) > 24


def test_policies_of_two_kinds_are_refused():
    with pytest.raises(ValueError, match=r"not mixed, got .*e4m3fn with .*e4m3fnuz"):
        O2.with_rule(Role.WEIGHT, "e4m3fnuz")
    assert {O2.fnuz()[role].format for role in GEMM_ROLES} == {E4M3FNUZ, E5M2FNUZ}


def test_a_checkpoint_of_the_other_kind_is_refused_and_its_weights_convert_by_value():
    """``amp.load_state_dict`` continues a run, and another format is another run. A model's own ``state_dict`` holds
    real values behind whatever format: they are the same numbers in the other kind, for a power of two is all that
    lies between."""
    model, optimizer = initialized(O3)
    train(model, optimizer, 3)
    other, resumed = initialized(O3.fnuz(), seed=1)
    with pytest.raises(ValueError, match="policy that the model was initialized with"):
        amp.load_state_dict(other, resumed, amp.state_dict(model, optimizer))
    other.load_state_dict(model.state_dict())
    for index in (0, 2):
        assert other[index].weight.format is E4M3FNUZ
        assert torch.equal(other[index].weight.dequantize(), model[index].weight.dequantize())
        assert not torch.equal(other[index].weight.payload.float(), model[index].weight.payload.float())
