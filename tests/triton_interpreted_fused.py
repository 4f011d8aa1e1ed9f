"""Checks of the fused Triton twins on CPU tensors; test_triton.py runs this file in a process with TRITON_INTERPRET=1.

Casts are asked for to the bit where the value before them is the input; behind sums and library functions in dB. What
exp and erf are on a device only a device can show.
"""

from __future__ import annotations

import pytest
import torch

from msamp_like.kernels import reference_fused, triton_casts, triton_fused, triton_softmax, triton_sums
from msamp_like.kernels.fused import KINDS, Grouped, Target
from msamp_like.kernels.reference import Operand
from tests.closeness import same_bits
from tests.test_accumulation import assert_requantized, assert_sums_agree
from tests.test_fused import E4M3, E5M2, GROUP, KEPT, TARGETS, close, data, floor, kept

BOTH = triton_fused, reference_fused
SHAPES = [(2, 5, 256), (3, 200)]


@pytest.mark.parametrize("out", TARGETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape, out):
    for dtype, centered in ((torch.float32, True), (torch.bfloat16, False)):
        x, weight, bias, grad = data(*shape, dtype=dtype), data(shape[-1]), data(shape[-1]), data(*shape, dtype=dtype)
        arguments = x, weight, bias if centered else None, 1e-5, centered, TARGETS[out](dtype), KEPT
        made, expected = (k.norm_quantize(*arguments) for k in BOTH)
        assert close(made, expected, floor(dtype))
        rest = grad, Operand(*expected[1], GROUP), expected[2], weight, centered, dtype
        assert close(*(k.norm_backward(*rest) for k in BOTH), floor(dtype))


def test_more_rows_than_parts_of_a_sum():
    x, weight = data(600, 32), data(32)
    _, held, inverse = reference_fused.norm_quantize(x, weight, None, 1e-5, True, Target(torch.float32), KEPT)
    rest = data(600, 32), Operand(*held, GROUP), inverse, weight, True, torch.float32
    assert close(*(k.norm_backward(*rest) for k in BOTH), 120)


@pytest.mark.parametrize("out", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations(kind, out):
    for shape, dtype, grouped in zip(
        SHAPES, (torch.float32, torch.bfloat16), (KEPT, Grouped(E5M2, (1, 16))), strict=True
    ):
        gate, value, grad = (data(*shape, dtype=dtype) for _ in range(3))
        for factor in (None, value):
            target = TARGETS[out](dtype)
            made, expected = (k.activation_quantize(gate, factor, kind, target, grouped) for k in BOTH)
            assert all(same_bits(*pair) for i in (1, 2) for pair in zip(made[i], expected[i], strict=True))
            assert close(made[0], expected[0], floor(dtype))
            factor_kept = None if factor is None else kept(factor, grouped)
            rest = grad, kept(gate, grouped), factor_kept, kind, target
            assert close(*(k.activation_backward(*rest) for k in BOTH), floor(dtype))


@pytest.mark.parametrize("columns", [300, 5000])
def test_softmax(columns):
    for dtype in (torch.float32, torch.bfloat16):
        logits, targets, grad = data(5, columns, dtype=dtype) * 4, torch.randint(0, columns, (5,)), torch.rand(5)
        targets[3], logits[2, 20:] = -1, -torch.inf
        both = triton_softmax, reference_fused
        (sums, held), (exact_sums, exact) = (k.softmax_quantize(logits, KEPT) for k in both)
        torch.testing.assert_close(sums, exact_sums)
        assert close(tuple(held)[:1], tuple(exact)[:1], 0)
        rest = Operand(*exact, GROUP), targets, grad, dtype
        assert close(*(k.softmax_backward(*rest) for k in both), 55)


def test_flags_reach_their_group_alone():
    x = data(2, 256)
    x[1, 130] = torch.nan
    made = [k.activation_quantize(x, None, "silu", Target(E4M3.dtype, GROUP), KEPT) for k in BOTH]
    assert all(same_bits(*pair) for pair in zip(made[0][1], made[1][1], strict=True))
    assert made[0][0].scale_inv.isinf().tolist() == [[False, False], [False, True]]


def test_cases_without_a_fast_path():
    x = data(4, 96)
    for grouped in (Grouped(E4M3, (1, 48)), Grouped(E4M3, (2, 32))):
        made = [k.activation_quantize(x, x, "gelu", Target(torch.float32), grouped) for k in BOTH]
        assert all(same_bits(a, b) for pair in zip(*made, strict=True) for a, b in zip(*pair, strict=True))


def test_sums():
    assert_sums_agree(triton_sums.accumulate_)
    assert_requantized(triton_casts.requantize)
