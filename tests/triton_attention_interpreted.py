"""The Triton twin of attention on CPU tensors; test_triton_newcomers.py runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from msamp_like.formats import E4M3, E5M2, ROW, WHOLE
from msamp_like.kernels import attention, reference, triton_attention
from msamp_like.kernels.reference import Operand
from tests.closeness import sqnr
from tests.test_attention import inputs

SIZES = {
    "ragged": {"rows": 70, "keys": 70, "heads": 1, "key_heads": 1, "dim": 24},
    "grouped": {"rows": 64, "keys": 100, "heads": 2, "key_heads": 1, "dim": 16},
}


def stored(tensors, block=ROW):
    formats = (E4M3, E4M3, E4M3, E5M2)
    pairs = zip(tensors, formats, strict=True)
    return [Operand(*reference.quantize_current(x, format, block)[:2], block) for x, format in pairs]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("units", [True, False], ids=["fp8 units", "emulated"])
def test_equals_the_reference_but_for_sums_and_exponentials(sizes, causal, units):
    """Equal scales and codes but where FP32's last bits carry a value of P or dS over a tie: 60 dB."""
    *operands, grad = stored(inputs(**sizes))
    want = attention.attention(*operands, 0.25, causal, torch.float32)
    got = triton_attention.attention(*operands, 0.25, causal, torch.float32, units=units)
    assert sqnr(want[0], got[0]) > 60
    assert sqnr(want[1], got[1]) > 100
    real_grad = reference.dequantize(*grad[:3], torch.float32)
    rest = (grad, want[1], (real_grad * want[0]).sum(-1), 0.25, causal, E5M2, torch.float32)
    expected = attention.attention_backward(*operands, *rest)
    found = triton_attention.attention_backward(*operands, *rest, units=units)
    for name, a, b in zip(("dQ", "dK", "dV"), expected, found, strict=True):
        assert sqnr(a, b) > 45, name


def test_a_later_token_changes_no_bit_of_an_earlier_output():
    query, key, value, _ = inputs(**SIZES["ragged"])
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, :, 40] *= float("inf")
    for block, equal in ((ROW, True), (WHOLE, False)):
        runs = []
        for tensors in ((query, key, value), changed):
            operands = stored((*tensors, query), block)[:3]
            runs.append(triton_attention.attention(*operands, 0.25, True, torch.float32)[0][:, :, :40])
        assert torch.equal(*runs) == equal
