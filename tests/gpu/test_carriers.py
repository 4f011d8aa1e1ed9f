"""Carriers of pipeline stages on the device: the bits of the CPU's, and the mark shows arithmetic there too."""

from __future__ import annotations

import pytest
import torch

from msamp_like.comm.pipeline import Boundary, decode, encode
from msamp_like.policy import O3, Role
from tests.closeness import same_bits
from tests.gpu import NEEDS_GPU

pytestmark = NEEDS_GPU

BOUNDARY = Boundary(rule=O3[Role.PARTIAL_OUTPUT], shape=(6, 200))


def test_carriers_have_the_same_bits():
    x = torch.randn(4, 6, 200)
    carrier = encode(x.cuda(), BOUNDARY)
    assert same_bits(carrier.cpu(), encode(x, BOUNDARY))
    assert same_bits(carrier.clone().cpu(), carrier.cpu())
    assert same_bits(decode(carrier, BOUNDARY).cpu(), decode(encode(x, BOUNDARY), BOUNDARY))


@pytest.mark.parametrize("computed", [lambda c: c * 1.0, lambda c: c + c, lambda c: c.float().bfloat16()])
def test_arithmetic_is_found_out(computed):
    assert decode(computed(encode(torch.randn(4, 6, 200).cuda(), BOUNDARY)), BOUNDARY).isnan().all()
