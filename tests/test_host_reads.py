"""No step waits for the device: on a device whose values nobody can read, a whole step runs.

That device is torch's ``meta``: it has shapes and no values, and asking for one raises. A copy that is read a step
later is the one exception, and stands there as a number of the test's.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from msamp_like import amp, optim
from msamp_like.host_copy import HostCopy
from msamp_like.nn import functional
from msamp_like.optim import GradientRelease
from msamp_like.optim.outcome import Outcome
from msamp_like.tensor import real
from tests.closeness import same_bits


class Late(HostCopy):
    """Zeros in place of values that would arrive; remembers in which step it was made and read."""

    now = 0
    waits: list[int]

    def __init__(self, tensor):
        super().__init__(tensor)
        self.made = Late.now

    def tolist(self):
        if self.made == Late.now:
            Late.waits.append(Late.now)
        return [0] * self._values.numel()


@pytest.fixture
def unreadable(monkeypatch):
    monkeypatch.setattr("msamp_like.scaling.HostCopy", Late)
    monkeypatch.setattr("msamp_like.optim.outcome.HostCopy", Late)
    monkeypatch.setattr(functional, "product_dtype", lambda input: torch.bfloat16)  # meta knows no autocast


def trained(optimizer=torch.optim.AdamW, clips=True, after=lambda model: None, **options):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 128))
    source = optimizer(model.parameters(), lr=1e-3)
    model, stepper = amp.initialize(model, source, data_parallel=False, **options)
    Late.waits = []
    for Late.now in range(1, 4):
        model(torch.randn(32, 128, device="meta")).square().mean().backward()
        if clips:
            amp.clip_grad_norm_(model, 1.0)
        after(model)
        stepper.step()
        stepper.zero_grad()
    return Late.waits


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("level", ["O0", "O1", "O2", "lean"])
def test_a_step_of_every_level(level):
    assert trained(level=level) == ([] if level == "O0" else [1])  # whether the histories are empty, once


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, optim.Lion])
def test_a_step_of_every_optimizer_with_a_kernel(optimizer):
    assert trained(optimizer, level="O2") == [1]


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("recipe", ["current", "rowwise", "blockwise", "mxfp8"])
def test_a_step_of_every_recipe(recipe):
    assert trained(level="O2", recipe=recipe) == []


@pytest.mark.usefixtures("unreadable")
def test_saved_activations_and_released_gradients():
    assert trained(level="O2", saved_activations="fp8") == [1]
    released = trained(level="lean", clips=False, gradient_release=GradientRelease(max_norm=1.0))
    assert released == [1]


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("read", [lambda model: bool(model[3].bias.sum()), lambda model: model[3].bias.cpu()])
def test_reads_are_found(read):
    """Control."""
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        trained(level="O2", after=read)


def poisoned(steps=(2, 3)):
    """Six steps on the CPU, some with a gradient that is not finite; the weights, and the counts of the states."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.LayerNorm(256), nn.Linear(256, 8))
    model, stepper = amp.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-2), data_parallel=False)
    for step in range(6):
        x = torch.randn(16, 128, generator=torch.Generator().manual_seed(step))
        (model(x).square().mean() * (float("nan") if step in steps else 1.0)).backward()
        stepper.step()
        stepper.zero_grad()
    saved = amp.state_dict(model, stepper)["optimizers"][0]
    return [real(p).clone() for p in model.parameters()], [s["step"] for s in saved["state"].values()], stepper


def test_an_outcome_that_arrives_late_changes_nothing(monkeypatch, caplog):
    """A step that was left out is not counted, whenever the host learns of it; control: one that is never learned."""
    now = poisoned()
    monkeypatch.setattr(HostCopy, "arrived", False)
    caplog.clear()
    late = poisoned()
    assert all(map(same_bits, now[0], late[0]))
    assert now[1] == late[1] == [4] * 6
    assert late[2].skipped_steps == 2
    assert "2 skipped so far, 2 in a row" in caplog.text
    monkeypatch.setattr(Outcome, "read", lambda self: (False, False))
    never = poisoned()
    assert never[1] == [6] * 6
    assert not all(map(same_bits, now[0], never[0]))
