"""The fused Adam step on the device against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch

from msamp_like import kernels
from msamp_like.formats import BF16, E4M3, E5M2, FP16, FP32, ROW, WHOLE
from msamp_like.kernels import AdamScalars, Noise, Operand, reference
from tests.gpu import NEEDS_GPU

pytestmark = NEEDS_GPU

_STATE = (1, 128)
_STORED = {  # parameter, gradient, first moment, second moment
    "O0": ((FP32, WHOLE), (BF16, WHOLE), (FP32, WHOLE), (FP32, WHOLE)),
    "O1": ((FP16, _STATE), (E4M3, WHOLE), (FP32, WHOLE), (FP32, WHOLE)),
    "O2": ((FP16, _STATE), (E4M3, WHOLE), (E4M3, _STATE), (FP16, _STATE)),
    "all in blocks": ((FP16, _STATE), (E5M2, _STATE), (BF16, _STATE), (FP16, _STATE)),
    "rows": ((FP16, ROW), (E4M3, ROW), (E4M3, ROW), (FP16, ROW)),
    "one scale a tensor": ((FP16, WHOLE), (E4M3, WHOLE), (E4M3, WHOLE), (FP16, WHOLE)),
}
_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def operands(shape, stored, noise, poison):
    values = [torch.randn(shape), *(torch.randn(shape) * 1e-3 for _ in range(2)), torch.rand(shape) * 1e-5]
    if poison is not None:
        values[1].view(-1)[17] = poison
    made = []
    for role, (value, (format, block)) in enumerate(zip(values, stored, strict=True)):
        payload, scale_inv, _ = reference.quantize_current(value, format, block)
        made.append(Operand(payload, scale_inv, block, noise and noise._replace(role=role)))
    return made


@pytest.mark.parametrize("stored", _STORED)
@pytest.mark.parametrize("shape", [(300, 1024), (77, 1000), (30_001,)], ids=str)
@pytest.mark.parametrize("noise", [None, Noise(3, 1, 9, 0)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("poison", [None, torch.nan])
def test_adam_equals_the_reference(stored, shape, noise, poison):
    """Bit for bit: every operation of the update is rounded on its own, on both."""
    expected = operands(shape, _STORED[stored], noise, poison)
    got = [t._replace(payload=t.payload.cuda(), scale_inv=t.scale_inv.cuda()) for t in expected]
    fused = stored != "one scale a tensor"
    for step in range(1, 4):
        scalars = AdamScalars(1e-3, 0.9, 0.999, 1e-8, 0.1, decoupled=step != 2, step=step)
        kernels.adam_step_(*got, scalars)
        reference.adam_step_(*expected, scalars)
    for a, b in zip(got, expected, strict=True):
        a_bits, b_bits = (t.payload.cpu().view(_RAW[t.payload.element_size()]) for t in (a, b))
        if fused:
            assert torch.equal(a.scale_inv.cpu(), b.scale_inv)
            assert torch.equal(a_bits, b_bits)
        else:  # torch's own kernels on both sides: a quotient may be a product with a reciprocal on a device
            assert (a_bits != b_bits).float().mean() < 1e-3
