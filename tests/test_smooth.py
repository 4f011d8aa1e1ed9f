"""Smooth-SwiGLU: exact where nothing is rounded, and what it keeps where a few channels grow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msamp_like import amp
from msamp_like.formats import BF16
from msamp_like.models.gpt import GPT, PRESETS
from msamp_like.policy import O2, RECIPES, Role, Rule
from tests.closeness import sqnr

OUTLIERS = slice(0, 3)
PLAIN_GRADIENTS = O2.with_rule(Role.GRAD_WEIGHT, Rule(format=BF16))


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors; waking a second thread for each costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer(product: str, level=PLAIN_GRADIENTS, recipe: str = "current", **weights) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 48, bias=False))
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].weight[:, OUTLIERS] *= weights.get("outliers", 1.0)
    return amp.initialize(model, level=level, recipe=recipe, overrides={"0": product})[0]


def activations(outliers: float) -> Tensor:
    """Products of a gate and a value, with three channels that have grown."""
    x = F.silu(torch.randn(256, 96)) * torch.randn(256, 96)
    x[:, OUTLIERS] *= outliers
    return x


def results(model: nn.Module, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    """Output, grad_input, and grad_weight of the ordinary channels."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    output.backward(grad_output)
    grad = model[0].weight.grad
    return [output.detach(), x.grad, (grad.dequantize() if hasattr(grad, "payload") else grad)[:, OUTLIERS.stop :]]


def exact(model: nn.Module, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    plain = nn.Sequential(nn.Linear(96, 48, bias=False))
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight.dequantize())
    return results(plain, x, grad_output)


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_undoes_what_it_does(recipe):
    """Small integers times powers of two, so that no format rounds: outputs and both gradients are those of the plain
    layer, to the bit, whatever the channels' factors are."""
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (64, 96)).float() * torch.exp2(torch.randint(-3, 4, (96,)).float())
    grad_output = torch.randint(-1, 2, (64, 48)).float()
    model = layer("smooth", recipe=recipe)
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-2, 3, (48, 96)).float())
    for got, expected in zip(results(model, x, grad_output), exact(model, x, grad_output), strict=True):
        assert torch.equal(got, expected.bfloat16().float() if got.shape[0] == 48 else expected)


def test_ordinary_channels_keep_their_precision_beside_outliers():
    """Three channels 2^17 times the others, which the weight hardly reads, as it does when they grow. The output and
    the ordinary channels' gradient are two roundings to E4M3 (28 dB), or one to each FP8 format (24); without it (the
    control) the ordinary channels sit below E4M3's smallest numbers, and 2 dB are left."""
    x, grad_output = activations(2.0**17), torch.randn(256, 48)
    quality = {}
    for product in ("smooth", "fp8"):
        model = layer(product, outliers=0.0)
        pairs = zip(exact(model, x, grad_output), results(model, x, grad_output), strict=True)
        quality[product] = [sqnr(a, b) for a, b in pairs]
    assert quality["smooth"][0] > 27
    assert quality["smooth"][2] > 23.5
    assert quality["fp8"][0] < 5
    assert quality["fp8"][2] < 5
    assert quality["smooth"][1] > quality["fp8"][1] - 1


def test_delayed_scales_are_not_surprised():
    """A scale from the last steps meets channels that are suddenly a thousand times larger: they saturate, and with
    smoothing they do not, for every channel is in one binade when it is scaled."""
    quality = {}
    for product in ("smooth", "fp8"):
        level = O2.with_rule(Role.INPUT, Rule(format=O2[Role.INPUT].format, history=2))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 48, bias=False))
        model, optimizer = amp.initialize(
            model, torch.optim.SGD(model.parameters(), lr=0.0), level, overrides={"0": product}
        )
        for _ in range(3):
            model(activations(1.0)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model[0].gemm.input.delayed
        x = activations(1000.0)
        quality[product] = sqnr(x @ model[0].weight.dequantize().t(), model(x))
    assert quality["smooth"] > 27
    assert quality["fp8"] < 3


def test_a_non_finite_channel_flags_the_result():
    model = layer("smooth")
    x = activations(1.0)
    x[3, 5] = torch.inf
    assert not model(x).isfinite().any()


def test_no_tokens_are_no_tokens():
    model = layer("smooth")
    x = torch.randn(0, 96, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.shape == (0, 96)
    assert model[0].weight.grad.dequantize().count_nonzero() == 0


@pytest.mark.parametrize("level", ["O0", "O3"])
def test_any_level_takes_it(level):
    model = layer("smooth", level=level, recipe="delayed")
    x, grad_output = activations(1.0), torch.randn(256, 48)
    bounds = (40, 40, 40) if level == "O0" else (27, 23, 22)
    for bound, a, b in zip(bounds, exact(model, x, grad_output), results(model, x, grad_output), strict=True):
        assert sqnr(a, b) > bound


def test_one_option_for_the_gated_layers_of_a_model():
    """By name, in an unmodified model; the report says so, and the model trains."""
    config = replace(PRESETS["tiny"], num_layers=2, activation="swiglu")
    torch.manual_seed(0)
    model = GPT(config)
    model, optimizer = amp.initialize(
        model, torch.optim.AdamW(model.parameters(), lr=1e-3), overrides={"*.down": "smooth"}
    )
    reasons = {row.name: row.reason for row in amp.fp8_report(model).rows}
    assert sum("smooths" in reason for reason in reasons.values()) == 2
    tokens = torch.randint(0, config.vocab_size, (2, 33))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
