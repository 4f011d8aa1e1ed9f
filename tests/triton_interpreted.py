"""Checks of the Triton twins on CPU tensors; test_triton.py runs this file in a process with TRITON_INTERPRET=1.

The twins round in integer and FP32 arithmetic of their own, so what the interpreter shows is what a device computes:
bit equality with the reference is asked for everywhere. Block shapes, ragged edges, strides, the loop over blocks
larger than a tile, both ways to draw random bits, flags.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from msamp_like.formats import BF16, E4M3, E4M3FNUZ, E5M2, E5M2FNUZ, FORMATS, FP8_FORMATS, FP16, ROW, UE5M3, WHOLE
from msamp_like.kernels import (
    cuda,
    reference,
    torch_products,
    triton_both,
    triton_casts,
    triton_products,
)
from msamp_like.kernels.fp8_units import Units, amd_units, nvidia_units
from msamp_like.kernels.reference import Operand
from tests.operands import (
    BLOCKS,
    NOISE,
    REAL,
    around_binades,
    around_ties,
    every_code,
    every_number,
    same,
    spread,
)


def agree(x, format, block, noise=None):
    """All casts of ``x``, with a scale found from ``x`` and with one that is too small, so that values saturate."""
    for margin, power_of_two in ((0, True), (2, False)):
        expected = reference.quantize_current(x, format, block, margin, power_of_two)
        got = triton_casts.quantize_current(x, format, block, margin, power_of_two)
        assert all(same(*pair) for pair in zip(got, expected, strict=True))
    scale_inv = expected[1] * 0.3
    pairs = [
        *zip(
            triton_casts.quantize_amax(x, scale_inv, format, block),
            reference.quantize_amax(x, scale_inv, format, block),
            strict=True,
        ),
        *(
            (triton_casts.quantize(x, scale_inv, format, block, n), reference.quantize(x, scale_inv, format, block, n))
            for n in {None, noise}
        ),
        *(
            (triton_casts.dequantize(*expected[:2], block, d), reference.dequantize(*expected[:2], block, d))
            for d in REAL
        ),
    ]
    assert all(same(*pair) for pair in pairs)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_casts_equal_the_reference(block):
    for format, dtype in zip(FORMATS.values(), itertools.cycle(REAL), strict=False):
        agree(spread((5, 256), dtype), format, block, NOISE)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 33), ()], ids=str)
def test_ragged_shapes(shape, block):
    for format, dtype in ((E4M3, torch.bfloat16), (FP16, torch.float32), (E5M2FNUZ, torch.float16)):
        agree(spread(shape, dtype), format, block, NOISE)


@pytest.mark.parametrize("shape,block", [((2, 20_000), ROW), ((200, 130), (-1, 128))], ids=str)
def test_blocks_larger_than_a_tile(shape, block):
    agree(spread(shape, torch.bfloat16), E4M3, block, NOISE)


@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
def test_every_number_of_16_bits(format):
    one = torch.ones(1, 1)
    for dtype in (torch.bfloat16, torch.float16):
        x = every_number(dtype)
        assert same(triton_casts.quantize(x, one, format, WHOLE), reference.quantize(x, one, format, WHOLE))


@pytest.mark.parametrize("format", FP8_FORMATS, ids=str)
def test_rounding_on_both_sides_of_every_tie(format):
    x = around_ties(format)
    one = torch.ones(1, 1)
    assert same(triton_casts.quantize(x, one, format, WHOLE), reference.quantize(x, one, format, WHOLE))


@pytest.mark.parametrize("format", [*FP8_FORMATS, UE5M3, FP16, BF16], ids=str)
def test_every_code_decodes(format):
    payload = every_code(format)
    scale_inv = torch.full((1, 1), 0.75)
    for dtype in REAL:
        expected = reference.dequantize(payload, scale_inv, WHOLE, dtype)
        assert same(triton_casts.dequantize(payload, scale_inv, WHOLE, dtype), expected)


@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_scale_on_both_sides_of_every_binade(format, power_of_two):
    amax = around_binades(format)
    expected = reference.scale_inv_from_amax(amax, format, 1, power_of_two)
    assert same(triton_casts.scale_inv_from_amax(amax, format, 1, power_of_two), expected)


@pytest.mark.parametrize("block", [WHOLE, (1, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_flags_reach_the_scale_and_no_neighbour(block, poison):
    x = torch.randn(3, 300)
    x[1, 200] = poison
    agree(x, E4M3, block)
    payload, scale_inv, _ = triton_casts.quantize_current(x, E5M2, block)
    assert scale_inv.isinf().sum() == 1
    assert triton_casts.dequantize(payload, scale_inv, block, torch.float32)[1, 200].isnan()


def test_inputs_without_a_fast_path():
    strided = spread((64, 48), torch.bfloat16).t()
    agree(strided, E4M3, (1, 32), NOISE)
    agree(spread((6, 64)).double(), E4M3, WHOLE)
    agree(torch.empty(0, 8), E4M3, (1, 128), NOISE)
    payload, scale_inv, _ = triton_casts.quantize_current(torch.ones(4), E4M3, WHOLE)
    assert triton_casts.dequantize(payload, scale_inv, WHOLE, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("block", [WHOLE, (1, 128), (2, 3)], ids=str)
@pytest.mark.parametrize("noise", [None, NOISE], ids=["nearest", "stochastic"])
def test_store(block, noise):
    value = spread((3, 200))
    targets = []
    for kernels in (reference, triton_casts):
        payload, scale_inv, _ = reference.quantize_current(torch.ones(3, 200), FP16, block)
        targets.append(Operand(payload, scale_inv, block, noise))
        kernels.store_(targets[-1], value)
    assert same(targets[1].payload, targets[0].payload)
    assert same(targets[1].scale_inv, targets[0].scale_inv)


# --- products ---------------------------------------------------------------------------------------------------------

_LAYOUTS = {"nt": ((48, 64), (32, 64)), "nn": ((48, 64), (64, 32)), "tn": ((64, 48), (64, 32))}
_RAGGED = {"nt": ((5, 33), (7, 33)), "nn": ((5, 33), (33, 7)), "tn": ((33, 5), (33, 7))}


def stored(shape, format, block=WHOLE):
    payload, scale_inv, _ = reference.quantize_current(torch.randn(shape), format, block)
    return Operand(payload, scale_inv, block)


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("shapes", [_LAYOUTS, _RAGGED], ids=["aligned", "ragged"])
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3)], ids=lambda pair: " x ".join(map(str, pair)))
def test_layouts_and_padding_of_fp8_products(layout, shapes, formats):
    """torch's CPU version of the FP8 product takes the same operands: layouts and padding show without a device."""
    a, b = (stored(shape, format) for shape, format in zip(shapes[layout], formats, strict=True))
    assert cuda.choose(a, b, layout, torch.float32, HOPPER) == ("tensor", "")
    got = cuda.multiply_fp8(a, b, layout, torch.float32)
    assert got.is_contiguous()
    torch.testing.assert_close(got, reference.scaled_matmul(a, b, layout, torch.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("block", [WHOLE, (1, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_emulated_products(layout, block, dtype):
    a, b = (stored(shape, format, block) for shape, format in zip(_LAYOUTS[layout], (E5M2, E4M3), strict=True))
    expected = reference.scaled_matmul(a, b, layout, torch.float32)
    got = cuda.emulate(a, b, layout, dtype)
    assert got.dtype == dtype
    # BF16: the operands are exact, so the result is off by its own rounding alone.
    torch.testing.assert_close(got.float(), expected, rtol=2.0**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_bf16_operands_keep_their_scales(layout):
    a, b = (stored(shape, BF16) for shape in _LAYOUTS[layout])
    for scale_a, scale_b in ((1.0, 1.0), (0.5, 4.0), (torch.inf, 1.0)):
        scaled = [t._replace(scale_inv=torch.full((1, 1), s)) for t, s in ((a, scale_a), (b, scale_b))]
        expected = reference.scaled_matmul(*scaled, layout, torch.float32)
        got = cuda.emulate(*scaled, layout, torch.bfloat16).float()
        finite = expected.isfinite()
        assert torch.equal(got.isfinite(), finite)
        torch.testing.assert_close(got[finite], expected[finite], rtol=2.0**-7, atol=1e-4)


def test_what_fp8_units_do_not_take():
    e4m3, e5m2 = stored((16, 64), E4M3), stored((16, 64), E5M2)
    for a, b, dtype, named in (
        (e5m2, e5m2, torch.bfloat16, "at most one E5M2"),
        (e4m3, e5m2, torch.float64, "to torch.float64"),
        (e4m3, stored((16, 64), E4M3, (1, 16)), torch.bfloat16, "scales per tensor and 1x16"),
        (e4m3, stored((16, 64), E4M3FNUZ), torch.bfloat16, "multiplies the OCP FP8 formats, got .*fn and .*fnuz"),
        (e4m3, stored((16, 64), FP16), torch.bfloat16, None),  # not FP8: nothing is lost, nothing is named
        (e4m3, stored((0, 64), E4M3), torch.bfloat16, None),
    ):
        name, reason = cuda.choose(a, b, "nt", dtype, HOPPER)
        assert name == "emulation"
        assert (reason == "") if named is None else re.search(named, reason)
    assert cuda.choose(e4m3, e4m3, "nt", torch.bfloat16, Units()) == ("emulation", "")


_AMPERE, _ADA, HOPPER = (nvidia_units(capability, (12, 9)) for capability in ((8, 0), (8, 9), (9, 0)))
_BLACKWELL, _OLD_CUDA = nvidia_units((10, 0), (12, 9)), nvidia_units((9, 0), (12, 8))
_AMD, _AMD_FNUZ = amd_units((9, 5)), amd_units((9, 4))

_CHOSEN = [  # blocks, a device's units, what runs
    ((WHOLE, WHOLE), (_ADA, HOPPER, _BLACKWELL, _AMD), "tensor"),
    ((ROW, ROW), (HOPPER, _BLACKWELL, _AMD), "rows"),
    ((WHOLE, ROW), (HOPPER,), "rows"),
    ((ROW, ROW), (_ADA,), "triton"),
    (((1, 128), (1, 128)), (HOPPER,), "tiles"),
    (((1, 128), (128, 128)), (HOPPER,), "tiles"),
    (((1, 128), (128, 128)), (_ADA, _OLD_CUDA, _BLACKWELL), "triton"),
    (((1, 32), (1, 32)), (_BLACKWELL,), "mx"),
    (((1, 32), (1, 32)), (_ADA, HOPPER), "triton"),
    (((1, 32), (128, 128)), (_BLACKWELL,), "triton"),
    (((1, 128), (128, 128)), (_AMD, _AMPERE), "emulation"),
    ((WHOLE, WHOLE), (_AMPERE, _AMD_FNUZ), "emulation"),
]


@pytest.mark.parametrize(("blocks", "devices", "name"), _CHOSEN)
def test_the_table_of_products(blocks, devices, name):
    """One row a case, and the same in every layout: a block is seen with the contracted dim last."""
    a, b = (stored((256, 512), format, block) for format, block in zip((E5M2, E4M3), blocks, strict=True))
    crossed = torch_products.contracted_last(b, True)
    for units in devices:
        assert cuda.choose(a, b, "nt", torch.bfloat16, units)[0] == name
        assert cuda.choose(a, crossed, "nn", torch.bfloat16, units)[0] == name


def test_a_row_of_scales_is_returned_in_bf16_alone():
    a, b = (stored((256, 512), E4M3, ROW) for _ in range(2))
    assert cuda.choose(a, b, "nt", torch.float32, HOPPER)[0] == "triton"
    assert cuda.choose(stored((256, 512), E5M2, ROW), b, "nt", torch.bfloat16, HOPPER)[0] == "rows"
    assert cuda.choose(a, stored((256, 512), E5M2, ROW), "nt", torch.bfloat16, HOPPER)[0] == "triton"


def test_amds_units_take_their_own_formats():
    a, b = (stored((64, 64), format) for format in (E5M2FNUZ, E4M3FNUZ))
    assert cuda.choose(a, b, "nn", torch.bfloat16, _AMD_FNUZ) == ("tensor", "")
    name, reason = cuda.choose(stored((64, 64), E5M2), stored((64, 64), E4M3), "nn", torch.bfloat16, _AMD_FNUZ)
    assert name == "emulation"
    assert "multiplies the fnuz FP8 formats" in reason
    assert "Policy.fnuz()" in reason


def test_a_fallback_is_named_once(caplog):
    cuda._name_fallback.cache_clear()
    for reason in ("one", "one", "another"):
        cuda._name_fallback(reason)
    assert [record.getMessage() for record in caplog.records] == [
        f"FP8 units not used: {reason}; operands are decoded to BF16 and multiplied there"
        for reason in ("one", "another")
    ]


# --- scales per row and per block -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(1, 16), (1, 32), (1, 128), ROW, (3, 5)], ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (130, 200), (1, 1), (0, 7)], ids=str)
@pytest.mark.parametrize("format", FP8_FORMATS, ids=str)
def test_both_directions_equal_the_reference(shape, block, format):
    x = spread(shape, torch.bfloat16)
    if x.numel() > 20:
        x[3, 20] = torch.inf
    for margin, power_of_two in ((0, True), (1, False)):
        expected = reference.quantize_both(x, format, block, margin, power_of_two)
        got = triton_both.quantize_both(x, format, block, margin, power_of_two)
        assert all(same(*pair) for pair in zip(got, expected, strict=True))


_SCALED = [
    ((1, 128), (128, 128)), ((1, 128), (1, 128)), ((1, 32), (1, 32)), (ROW, ROW), (WHOLE, ROW), ((1, 32), (128, 128)),
    ((1, 64), (2, 128)), (WHOLE, WHOLE),
]  # fmt: skip


@pytest.mark.parametrize("blocks", _SCALED, ids=str)
@pytest.mark.parametrize("units", [True, False], ids=["FP8 units", "decoded"])
def test_products_with_scales_equal_the_reference_but_for_the_order_of_the_sum(blocks, units):
    """300 terms, rounded after each addition: at most 300 half units of FP32 of the sum of their magnitudes."""
    for formats, dtype in (((E4M3, E4M3), torch.float32), ((E5M2, E4M3), torch.bfloat16)):
        left, right = (
            stored((rows, 300), format, block) for rows, format, block in zip((37, 150), formats, blocks, strict=True)
        )
        expected = reference.scaled_matmul(left, right, "nt", torch.float32)
        magnitudes = (
            t._replace(payload=(t.payload.view(torch.uint8) & 0x7F).view(t.payload.dtype)) for t in (left, right)
        )
        bound = reference.scaled_matmul(*magnitudes, "nt", torch.float32) * 300 * 2.0**-24
        got = triton_products.multiply(left, right, dtype, units)
        rounding = expected.abs() * 2.0**-8 if dtype == torch.bfloat16 else 0
        assert got.dtype == dtype
        assert bool(((got.float() - expected).abs() <= bound + rounding).all())


def test_products_read_transposed_operands_and_carry_flags():
    left, right = stored((300, 37), E4M3, (128, 1)), stored((300, 150), E4M3, (128, 128))
    left.scale_inv[1, 5] = torch.inf
    left.payload.view(torch.uint8)[128:256, 5] = 0
    expected = reference.scaled_matmul(left, right, "tn", torch.float32)
    seen = torch_products.contracted_last(left, True), torch_products.contracted_last(right, True)
    got = triton_products.multiply(*seen, torch.float32)
    assert torch.equal(got.isnan(), expected.isnan())
    assert got[5].isnan().all()
    finite = ~expected.isnan()
    torch.testing.assert_close(got[finite], expected[finite], rtol=1e-5, atol=1e-4)


def test_a_wrong_scale_is_noticed():
    """The control: one block's scale moved by one power of two is outside of the bound."""
    left, right = stored((37, 300), E4M3, (1, 128)), stored((150, 300), E4M3, (128, 128))
    expected = reference.scaled_matmul(left, right, "nt", torch.float32)
    left.scale_inv[3, 2] *= 2
    got = triton_products.multiply(left, right, torch.float32)
    assert (got - expected).abs()[3].max() > 0.1
    assert (got - expected).abs()[4].max() < 1e-4


def test_steps_that_suit_both_blocks():
    def step(*blocks, columns=512):
        return triton_products.inner_block(*(stored((8, columns), E4M3, block) for block in blocks))

    assert step((1, 128), (128, 128)) == step(WHOLE, ROW) == step((1, 256), (1, 128)) == 128
    assert (step((1, 32), (1, 128)), step((1, 64), ROW)) == (32, 64)
    assert step((1, 48), (1, 32)) == step((1, 16), (1, 32)) == 0
    assert step((1, 48), (1, 48), columns=48) == 128
