"""The fused Adam step on the device against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch

from msamp_like import kernels
from msamp_like.kernels import AdamScalars, Noise, reference_updates
from tests.gpu import NEEDS_GPU
from tests.operands import STORED, adam_operands, bits, row_of

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("shape", [(300, 1024), (77, 1000), (30_001,)], ids=str)
@pytest.mark.parametrize("noise", [None, Noise(3, 1, 9, 0)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("poison", [{}, {1: torch.nan}], ids=["finite", "nan"])
def test_adam_equals_the_reference(stored, shape, noise, poison):
    """Bit for bit: every operation of the update is rounded on its own, on both."""
    expected = adam_operands(shape, STORED[stored], noise, poison)
    got = [t._replace(payload=t.payload.cuda(), scale_inv=t.scale_inv.cuda()) for t in expected]
    for step in range(1, 4):
        scalars = AdamScalars(1e-3, 0.9, 0.999, 1e-8, 0.1, decoupled=step != 2)
        kernels.adam_steps_([row_of(got, step)], scalars)
        reference_updates.adam_steps_([row_of(expected, step)], scalars)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.scale_inv.cpu(), b.scale_inv)
        assert torch.equal(bits(a.payload.cpu()), bits(b.payload))
