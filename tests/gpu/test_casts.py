"""Scales and casts on the device: bit for bit those of the reference on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from msamp_like import kernels
from msamp_like.formats import BF16, E4M3, E5M2, FORMATS, FP8_FORMATS, FP16, ROW, WHOLE
from msamp_like.kernels import Noise, Operand, reference
from tests.gpu import NEEDS_GPU

pytestmark = NEEDS_GPU

_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_NOISE = Noise(seed=2**40 + 3, tensor=5, step=2**31 + 7, role=1)
_BLOCKS = [WHOLE, ROW, (1, 128), (128, 128), (1, 32), (-1, 128), (2, 3)]
_SHAPES = [(129, 512), (3, 50_257), (3, 5, 333), (70_003,), (1, 1), ()]
_REAL = (torch.float32, torch.bfloat16, torch.float16)


def same(got, expected):
    """Equal bits; NaN of two or four bytes may differ in its payload, which nothing reads."""
    assert got.is_cuda
    got = got.cpu()
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    nan = torch.zeros_like(expected, dtype=torch.bool) if expected.element_size() == 1 else expected.isnan()
    got_bits, expected_bits = (t.contiguous().view(_RAW[t.element_size()])[~nan] for t in (got, expected))
    return torch.equal(got_bits, expected_bits) and (not nan.any() or bool(got[nan].isnan().all()))


def spread(shape, dtype=torch.float32):
    """Numbers over some twenty binades, so that every format meets its subnormal numbers and its largest."""
    return (torch.randn(shape) * torch.exp2(3 * torch.randn(shape))).to(dtype)


def every_number(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


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
    for noise in (None, _NOISE):
        got = kernels.quantize(on_device, scale_inv.cuda(), format, block, noise)
        assert same(got, reference.quantize(x, scale_inv, format, block, noise))
    for dtype in _REAL:
        got = kernels.dequantize(expected[0].cuda(), expected[1].cuda(), block, dtype)
        assert same(got, reference.dequantize(*expected[:2], block, dtype))


@pytest.mark.parametrize("block", _BLOCKS, ids=str)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_casts_equal_the_reference(shape, block):
    for format, dtype in zip(FORMATS.values(), itertools.cycle(_REAL), strict=False):
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
    codes = torch.arange(127, dtype=torch.uint8).view(format.dtype).float()
    codes = codes[codes.isfinite()]
    ties = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([torch.nextafter(ties, ties * 0), ties, torch.nextafter(ties, ties * 2), codes])
    x, one = torch.cat([x, -x]), torch.ones(1, 1)
    assert same(kernels.quantize(x.cuda(), one.cuda(), format, WHOLE), reference.quantize(x, one, format, WHOLE))


@pytest.mark.parametrize("format", [E4M3, E5M2, FP16, BF16], ids=str)
def test_every_code_decodes(format):
    payload = every_number(format.dtype) if format.bytes == 2 else torch.arange(256).to(torch.uint8).view(format.dtype)
    scale_inv = torch.full((1, 1), 0.75)
    for dtype in _REAL:
        got = kernels.dequantize(payload.cuda(), scale_inv.cuda(), WHOLE, dtype)
        assert same(got, reference.dequantize(payload, scale_inv, WHOLE, dtype))


@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_scale_on_both_sides_of_every_binade(format, power_of_two):
    binades = torch.tensor(format.largest).frexp().mantissa * torch.exp2(torch.arange(-148, 129).double()).float()
    edges = torch.tensor([0.0, 1e-45, 1e-38, torch.finfo(torch.float32).max, torch.inf, torch.nan])
    inf = torch.tensor(torch.inf)
    amax = torch.cat([binades.nextafter(-inf).clamp(min=0), binades, binades.nextafter(inf), edges]).view(1, -1)
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


@pytest.mark.parametrize("noise", [None, _NOISE], ids=["nearest", "stochastic"])
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
