"""Gradient release: the same step, with no two gradients at a time; and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from msamp_like import amp
from msamp_like.optim import GradientRelease
from msamp_like.tensor import real
from tests.closeness import same_bits

LEVELS = ["O0", "O2", "lean"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32)
    )


def initialized(level, release, optimizer=torch.optim.AdamW):
    model = network()
    watched = peak_of(model)
    model, stepper = amp.initialize(
        model,
        optimizer(model.parameters(), lr=1e-2),
        level=level,
        data_parallel=False,
        gradient_release=release,
        seed=3,
    )
    return model, stepper, watched


def peak_of(model):
    """The most bytes of gradients that were alive when one was complete; hooks that stand before those of release."""
    found = {"peak": 0}

    def seen(_):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        alive = sum(g.stored_bytes if hasattr(g, "stored_bytes") else g.nbytes for g in grads)
        found["peak"] = max(found["peak"], alive)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(seen)
    return found


def batch(step):
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(step))


def train(model, stepper, steps, first=0):
    for step in range(first, first + steps):
        loss = (model(batch(step)) - batch(step + 1000)).square().mean()
        loss.backward()
        stepper.step()
        stepper.zero_grad()
    return model


def bits_of(model):
    return [real(p).detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_the_same_weights_as_without_bit_for_bit(level, optimizer):
    released = train(*initialized(level, True, optimizer)[:2], steps=5)
    kept = train(*initialized(level, False, optimizer)[:2], steps=5)
    assert all(map(torch.equal, bits_of(released), bits_of(kept)))
    started = bits_of(initialized(level, True, optimizer)[0])
    assert not any(map(torch.equal, bits_of(released), started))  # control: they have moved


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_never_exist_together(level):
    """At most one is alive, and what stays in between is none; kept gradients (control) are all there at the end."""
    model, stepper, released = initialized(level, True)
    train(model, stepper, 1)
    assert all(p.grad is None for p in model.parameters())
    assert amp.state_bytes(model, stepper)["grad_weight"] == 0
    _, _, kept = arguments = initialized(level, False)
    train(*arguments[:2], 1)
    each = 64 * 64 * (2 if level == "O0" else 1) + 4  # the largest
    assert released["peak"] <= each
    assert kept["peak"] > 2 * each


@pytest.mark.parametrize("level", LEVELS)
def test_clipping_by_the_joint_norm_that_is_to_be_expected(level):
    """Of this backward where it is there, of the step before, grown alike, where it is to come."""
    model, stepper, _ = initialized(level, GradientRelease(max_norm=1e-3), torch.optim.SGD)
    twin, kept, _ = initialized(level, False, torch.optim.SGD)
    order, before = [], {}
    for index, parameter in enumerate(twin.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: order.append(index))
    for step in range(3):
        train(model, stepper, 1, first=step)
        (twin(batch(step)) - batch(step + 1000)).square().mean().backward()
        parameters = list(twin.parameters())
        here = {}
        for index in order[-len(parameters) :]:
            here[index] = torch.linalg.vector_norm(real(parameters[index].grad)).double().square()
            joint = sum(here.values()) * len(parameters) / len(here)
            if before:
                growth = sum(here.values()) / sum(before[i] for i in here)
                joint = sum(here.values()) + sum(v for i, v in before.items() if i not in here) * growth.clamp(0.25, 4)
            joint = joint.maximum(here[index]).sqrt()
            parameters[index].grad.mul_((1e-3 / (joint + 1e-6)).clamp(max=1.0).float())
        before = here
        kept.step()
        kept.zero_grad()
        torch.testing.assert_close(stepper.released.norm, sum(before.values()).sqrt().float())
    for found, expected in zip(bits_of(model), bits_of(twin), strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)  # the sums differ in their order


def test_clipping_each_by_its_own_norm():
    biases, moved = (1, 3, 5), {}  # FP32, and small: nothing rounds what they move by
    for max_norm in (1e-3, None):
        model, stepper, _ = initialized("O0", GradientRelease(max_norm=max_norm, norm="parameter"), torch.optim.SGD)
        before = bits_of(model)
        train(model, stepper, 1)
        after = bits_of(model)
        moved[max_norm] = torch.stack([torch.linalg.vector_norm(after[i] - before[i]) for i in biases])
    torch.testing.assert_close(moved[1e-3], torch.full((3,), 1e-2 * 1e-3), rtol=1e-2, atol=0)
    assert moved[None].min() > 1e-2 * 1e-3 * 1.1  # control


@pytest.mark.parametrize("level", ["O0", "O2"])  # where an update by zero rounds nothing
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_counts_as_zero_for_its_parameter_alone(level, poison, caplog):
    model, stepper, _ = initialized(level, True, torch.optim.SGD)
    first = model[0].weight
    first.register_hook(lambda g: g.mul_(poison))
    before = bits_of(model)
    train(model, stepper, 1)
    after = bits_of(model)
    assert torch.equal(after[0], before[0])
    assert not any(map(torch.equal, after[1:], before[1:]))
    assert stepper.skipped_steps == 1
    assert "1 of 8 gradients" in caplog.text
    assert all(value.isfinite().all() for value in after)


def test_a_resume_continues_bit_for_bit():
    settings = GradientRelease(max_norm=0.01)
    model, stepper, _ = initialized("O2", settings)
    train(model, stepper, 3)
    saved = copy.deepcopy(amp.state_dict(model, stepper))
    train(model, stepper, 2, first=3)
    again, resumed, _ = initialized("O2", settings)
    amp.load_state_dict(again, resumed, saved)
    train(again, resumed, 2, first=3)
    assert all(map(torch.equal, bits_of(again), bits_of(model)))
    forgetful, cold, _ = initialized("O2", settings)
    saved["optimizers"][0].pop("gradient_norms")  # control: they are part of the state
    amp.load_state_dict(forgetful, cold, saved)
    train(forgetful, cold, 2, first=3)
    assert not all(map(torch.equal, bits_of(forgetful), bits_of(model)))


def test_what_cannot_be_is_refused_with_a_remedy():
    model, _, _ = initialized("O2", True)
    loss = (model(batch(0)) - batch(1)).square().mean()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"got a second one for .* before optimizer.step\(\); step after every"):
        (model(batch(0)) - batch(1)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"got no_sync\(\) with gradient_release.*one larger batch"):
        model.no_sync()
    with pytest.raises(RuntimeError, match="got clip_grad_norm_ with gradient_release.*initialize with"):
        amp.clip_grad_norm_(model, 1.0)
    with pytest.raises(ValueError, match="norm to clip by must be one of expected, parameter, got 'global'"):
        GradientRelease(max_norm=1.0, norm="global")
    with pytest.raises(TypeError, match="must be True, False or a GradientRelease, got 3; to clip, give"):
        initialized("lean", 3)
    with pytest.raises(ValueError, match="max_norm must be positive.*got -1"):
        GradientRelease(max_norm=-1)


def test_a_restored_model_keeps_its_gradients():
    model, _, _ = initialized("O2", True)
    plain = amp.restore(model)
    plain(batch(0)).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_a_scheduler_sets_the_rate_of_the_next_backward():
    model, stepper, _ = initialized("O2", True, torch.optim.SGD)
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: 1.0 if step == 0 else 0.0)
    train(model, stepper, 1)
    schedule.step()
    before = bits_of(model)
    train(model, stepper, 1, first=1)
    assert all(map(torch.equal, bits_of(model), before))
    assert same_bits(model[0].weight.detach(), model[0].weight.detach())
