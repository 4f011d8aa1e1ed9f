"""Scales and casts on the device: bit for bit those of the reference on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from msamp_like import kernels
from msamp_like.formats import BF16, E4M3, E5M2, FORMATS, FP8_FORMATS, FP16, WHOLE
from msamp_like.kernels import Operand, reference
from tests import operands
from tests.gpu import NEEDS_GPU
from tests.operands import BLOCKS, NOISE, REAL, around_binades, around_ties, every_code, every_number, spread

pytestmark = NEEDS_GPU

_SHAPES = [(129, 512), (3, 50_257), (3, 5, 333), (70_003,), (1, 1), ()]


def same(got, expected):
    """The kernel ran on the device, and its bits are the reference's."""
    assert got.is_cuda
    return operands.same(got.cpu(), expected)


def agree(x, format, block):
    on_device = x.cuda()
    for margin, power_of_two in ((0, True), (2, False)):
        expected = reference.quantize_current(x, format, block, margin, power_of_two)
        got = kernels.quantize_current(on_device, format, block, margin, power_of_two)
        assert all(same(*pair) for pair in zip(got, expected, strict=True))
    assert same(kernels.amax(on_device, block), reference.amax(x, block))
    scale_inv = expected[1] * 0.3  # too small: values saturate
    expected_pair = reference.quantize_amax(x, scale_inv, format, block)
    got_pair = kernels.quantize_amax(on_device, scale_inv.cuda(), format, block)
    assert all(same(*pair) for pair in zip(got_pair, expected_pair, strict=True))
    for noise in (None, NOISE):
        got = kernels.quantize(on_device, scale_inv.cuda(), format, block, noise)
        assert same(got, reference.quantize(x, scale_inv, format, block, noise))
    for dtype in REAL:
        got = kernels.dequantize(expected[0].cuda(), expected[1].cuda(), block, dtype)
        assert same(got, reference.dequantize(*expected[:2], block, dtype))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_casts_equal_the_reference(shape, block):
    for format, dtype in zip(FORMATS.values(), itertools.cycle(REAL), strict=False):
        agree(spread(shape, dtype), format, block)


@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
def test_every_number_of_16_bits(format):
    one = torch.ones(1, 1)
    for dtype in (torch.bfloat16, torch.float16):
        x = every_number(dtype)
        got = kernels.quantize(x.cuda(), one.cuda(), format, WHOLE)
        assert same(got, reference.quantize(x, one, format, WHOLE))


@pytest.mark.parametrize("format", FP8_FORMATS, ids=str)
def test_rounding_on_both_sides_of_every_tie(format):
    x, one = around_ties(format), torch.ones(1, 1)
    assert same(kernels.quantize(x.cuda(), one.cuda(), format, WHOLE), reference.quantize(x, one, format, WHOLE))


@pytest.mark.parametrize("format", [E4M3, E5M2, FP16, BF16], ids=str)
def test_every_code_decodes(format):
    payload = every_code(format)
    scale_inv = torch.full((1, 1), 0.75)
    for dtype in REAL:
        got = kernels.dequantize(payload.cuda(), scale_inv.cuda(), WHOLE, dtype)
        assert same(got, reference.dequantize(payload, scale_inv, WHOLE, dtype))


@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_scale_on_both_sides_of_every_binade(format, power_of_two):
    amax = around_binades(format)
    got = kernels.scale_inv_from_amax(amax.cuda(), format, 1, power_of_two)
    assert same(got, reference.scale_inv_from_amax(amax, format, 1, power_of_two))


@pytest.mark.parametrize("block", [WHOLE, (1, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_flags_reach_the_scale_and_no_neighbour(block, poison):
    x = torch.randn(300, 3000)
    x[200, 2000] = poison
    agree(x, E4M3, block)
    _, scale_inv, _ = kernels.quantize_current(x.cuda(), E5M2, block)
    assert scale_inv.isinf().sum() == 1


@pytest.mark.parametrize("noise", [None, NOISE], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("block", [WHOLE, (1, 128)], ids=str)
def test_store(block, noise):
    value = spread((300, 1000))
    stored = reference.quantize_current(torch.ones(300, 1000), FP16, block)[:2]
    got = Operand(stored[0].cuda(), stored[1].cuda(), block, noise)
    expected = Operand(*stored, block, noise)
    kernels.store_(got, value.cuda())
    reference.store_(expected, value)
    assert same(got.payload, expected.payload)
    assert same(got.scale_inv, expected.scale_inv)


def test_strided_input_and_empty_input():
    agree(spread((640, 480), torch.bfloat16).t(), E4M3, (1, 32))
    agree(torch.empty(0, 8), E4M3, (1, 128))


def test_nothing_waits_for_the_device():
    x = torch.randn(512, 512, device="cuda")
    operand = Operand(*kernels.quantize_current(x, E4M3, WHOLE)[:2], WHOLE)
    kernels.scaled_matmul(operand, operand, "nt", torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for block in (WHOLE, (1, 128)):
            payload, scale_inv, _ = kernels.quantize_current(x, E4M3, block)
            kernels.quantize_amax(x, scale_inv, E4M3, block)
            kernels.dequantize(payload, scale_inv, block, torch.bfloat16)
        kernels.scaled_matmul(operand, operand, "nt", torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
