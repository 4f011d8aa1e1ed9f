"""The kernels: against ml_dtypes and numpy, then the native twin against the reference, bit for bit."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from msamp_like import kernels
from msamp_like.formats import BF16, E4M3, E5M2, FNUZ, FORMATS, FP8_FORMATS, FP16, FP32, ROW, WHOLE, Block, Format
from msamp_like.kernels import AdamScalars, Noise, Operand, Row, cpu, reference, reference_updates, table
from tests.operands import needs_native, row_of

NATIVE = cpu.available()
TWINS = [
    pytest.param(reference, id="reference"),
    pytest.param(cpu, id="native", marks=needs_native),
]
REAL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS: tuple[Block, ...] = (WHOLE, ROW, (1, 128), (1, 16), (128, 128), (2, 3), (-1, 7))
SHAPES = ((), (0,), (3, 0), (1,), (300,), (3, 5, 77), (130, 131))
NOISE = Noise(seed=2**40 + 5, tensor=6, step=7, role=8)
OTHER = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "fp16": np.float16}
OTHER |= {"e4m3fnuz": ml_dtypes.float8_e4m3fnuz, "e5m2fnuz": ml_dtypes.float8_e5m2fnuz}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors; waking a second thread for each costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads(one_thread: None) -> None:
    torch.set_num_threads(2)


def raw(x: Tensor) -> np.ndarray:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]).numpy()


def mismatches(x: Tensor, y: Tensor) -> int:
    """Elements whose bits differ; NaNs equal each other, for torch itself writes several."""
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    x, y = x.reshape(-1), y.reshape(-1)
    return int(np.sum((raw(x) != raw(y)) & ~(x.float().isnan() & y.float().isnan()).numpy()))


def spread(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values over many binades, with zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(4 * torch.randn(shape, generator=generator))
    return torch.where(torch.rand(shape, generator=generator) < 0.02, x * 0, x).to(dtype)


def float_patterns(count: int) -> Tensor:
    """FP32 numbers whose sign, exponent and mantissa are each drawn evenly: every binade, subnormals, no NaN."""
    bits = torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    x = bits.view(torch.float32)
    return torch.where(torch.isfinite(x), x, 0.0)


def midpoints(format: Format) -> Tensor:
    """Every number halfway between two neighbours of the format, and the FP32 numbers just beside it."""
    bits = 8 * format.dtype.itemsize
    codes = torch.arange(2 ** (bits - 1), dtype=torch.int32).to({8: torch.uint8, 16: torch.int16}[bits])
    values = codes.view(format.dtype).float()
    values = values[torch.isfinite(values)].double()
    middle = ((values[1:] + values[:-1]) / 2).float()
    around = [middle, torch.nextafter(middle, torch.tensor(0.0)), torch.nextafter(middle, torch.tensor(1e9))]
    return torch.cat([sign * x for x in around for sign in (1, -1)])


def clamp_and_cast(x: Tensor, format: Format) -> Tensor:
    """What another library makes of ``x`` once it is clamped."""
    clamped = np.clip(x.float().numpy(), -format.largest, format.largest)
    return torch.from_numpy(clamped.astype(OTHER[format.name]).view(f"i{format.dtype.itemsize}")).view(format.dtype)


def unit_quantize(twin: ModuleType, x: Tensor, format: Format) -> Tensor:
    return twin.quantize(x, torch.ones(1, 1), format, WHOLE)


# --- one element ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FP8_FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("twin", TWINS)
def test_encodes_all_16_bit_numbers(twin: ModuleType, dtype: torch.dtype, format: Format) -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    payload = unit_quantize(twin, x, format)
    finite = torch.isfinite(x)
    assert mismatches(payload[finite], clamp_and_cast(x[finite], format)) == 0
    infinite = torch.isinf(x)
    assert torch.equal(payload[infinite].float(), format.largest * x[infinite].float().sign())
    nan = payload[x.isnan()].view(torch.uint8) | 0x80
    assert torch.equal(nan, torch.full_like(nan, 0x80 if format in FNUZ.values() else 0xFF))


@pytest.mark.parametrize("format", [E4M3, E5M2, FP16], ids=str)
@pytest.mark.parametrize("twin", TWINS)
def test_encodes_fp32_numbers(twin: ModuleType, format: Format) -> None:
    x = torch.cat([float_patterns(2**20), spread((2**18,)), midpoints(format)])
    assert mismatches(unit_quantize(twin, x, format), clamp_and_cast(x, format)) == 0


@needs_native
def test_encodes_for_every_instruction_set(every_simd: None) -> None:
    for format in FORMATS.values():
        x = torch.cat([float_patterns(2**14), spread((1001,)), torch.tensor([math.nan, math.inf, -math.inf, -0.0])])
        x = x if format in (BF16, FP32) else torch.cat([x, midpoints(format)])
        assert mismatches(unit_quantize(cpu, x, format), unit_quantize(reference, x, format)) == 0


def test_comparison_sees_a_wrong_rounding() -> None:
    """Control: rounding halves away from zero, and one flipped bit, are both noticed."""
    x = midpoints(E4M3)
    away = clamp_and_cast(x * (1 + 2**-20), E4M3)
    assert mismatches(away, clamp_and_cast(x, E4M3)) > 50
    flipped = clamp_and_cast(x, E4M3).view(torch.uint8).clone()
    flipped[7] ^= 1
    assert mismatches(flipped.view(E4M3.dtype), clamp_and_cast(x, E4M3)) == 1


@pytest.mark.parametrize("dtype", REAL_DTYPES)
@pytest.mark.parametrize("format", FP8_FORMATS, ids=str)
@pytest.mark.parametrize("twin", TWINS)
def test_decodes_all_codes(twin: ModuleType, format: Format, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    other = torch.from_numpy(codes.numpy().view(OTHER[format.name]).astype(np.float32))
    for scale_inv in (1.0, 2.0**-3, 2.0**-140, 0.3, 2.0**126):
        expected = (other * torch.tensor(scale_inv)).to(dtype)
        read = twin.dequantize(codes.view(format.dtype), torch.full((1, 1), scale_inv), WHOLE, dtype)
        assert mismatches(read, expected) == 0


@needs_native
@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_decodes_all_16_bit_numbers(every_simd: None, dtype: torch.dtype) -> None:
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for format in (FP16, BF16):
        arguments = (codes.view(format.dtype), torch.full((1, 1), 0.3), WHOLE, dtype)
        assert mismatches(cpu.dequantize(*arguments), reference.dequantize(*arguments)) == 0


# --- scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("format", [E4M3, E5M2, FP16], ids=str)
@pytest.mark.parametrize("twin", TWINS)
def test_scale_is_the_largest_power_of_two_that_fits(twin: ModuleType, format: Format, margin: int) -> None:
    edges = torch.tensor([format.largest * 2.0**k for k in range(-130, 112)])
    amax = torch.cat([edges, torch.nextafter(edges, torch.tensor(math.inf)), torch.nextafter(edges, torch.tensor(0.0))])
    scale_inv = twin.scale_inv_from_amax(amax.view(1, -1), format, margin).view(-1)
    limit = Fraction(format.largest) / 2**margin
    for value, inverse in zip(amax.tolist(), scale_inv.tolist(), strict=True):
        assert math.frexp(inverse)[0] == 0.5
        assert Fraction(value) <= limit * Fraction(inverse)
        assert inverse == 2.0**-126 or Fraction(value) > limit * Fraction(inverse) / 2


@pytest.mark.parametrize("twin", TWINS)
def test_scale_of_special_amaxes(twin: ModuleType) -> None:
    amax = torch.tensor([[0.0, 1e-45, math.inf, math.nan, 3e38]])
    assert twin.scale_inv_from_amax(amax, E4M3).tolist() == [[1.0, 2.0**-126, math.inf, math.inf, 2.0**120]]
    assert twin.scale_inv_from_amax(amax, BF16).tolist() == [[1.0, 1.0, math.inf, math.inf, 1.0]]
    exact = twin.scale_inv_from_amax(torch.tensor([[448.0, 1.0]]), E4M3, margin=1, power_of_two=False)
    assert torch.equal(exact, torch.tensor([[2.0, 1.0]]) / torch.tensor([[1.0, 224.0]]))


@needs_native
def test_scales_equal_the_reference() -> None:
    amax = float_patterns(2**16).abs().view(256, 256)
    for format, margin, power_of_two in itertools.product(FORMATS.values(), (0, 3), (True, False)):
        arguments = (amax, format, margin, power_of_two)
        assert mismatches(cpu.scale_inv_from_amax(*arguments), reference.scale_inv_from_amax(*arguments)) == 0


@pytest.mark.parametrize("twin", TWINS)
def test_amax_of_every_block(twin: ModuleType) -> None:
    """Counted by hand, one block at a time."""
    x = spread((11, 29))
    for block in ((1, 8), (4, 8), (-1, 7), (3, -1), WHOLE):
        rows, columns = (11 if block[0] == -1 else block[0]), (29 if block[1] == -1 else block[1])
        expected = [
            [x[i : i + rows, j : j + columns].abs().max() for j in range(0, 29, columns)] for i in range(0, 11, rows)
        ]
        assert torch.equal(twin.amax(x, block), torch.tensor(expected))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
@pytest.mark.parametrize("twin", TWINS)
def test_a_non_finite_block_is_flagged(twin: ModuleType, format: Format, poison: float) -> None:
    x = spread((6, 40))
    x[2, 17] = poison
    payload, scale_inv, amax = twin.quantize_current(x, format, (1, 16))
    assert scale_inv[2, 1] == math.inf
    assert torch.isfinite(scale_inv).sum() == scale_inv.numel() - 1
    assert amax[2, 1].isnan() if math.isnan(poison) else amax[2, 1] == math.inf
    assert not payload[2, 16:32].float().any()
    read = twin.dequantize(payload, scale_inv, (1, 16), torch.float32)
    assert read[2, 16:32].isnan().all()
    assert int(read.isnan().sum()) == 16


# --- native against reference ---------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("dtype", REAL_DTYPES)
@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
def test_casts_equal_the_reference(every_simd: None, format: Format, dtype: torch.dtype) -> None:
    for (seed, shape), block in itertools.product(enumerate(SHAPES), BLOCKS):
        assert_casts_equal(spread(shape, dtype, seed), format, block, margin=seed % 2, power_of_two=bool(seed % 3))


@needs_native
@pytest.mark.parametrize("block", [WHOLE, ROW, (1, 128), (64, 64)], ids=str)
def test_casts_equal_the_reference_with_several_threads(two_threads: None, block: Block) -> None:
    x = spread((317, 303))
    x[300, 300] = 1e30
    for format in (E4M3, FP16):
        assert_casts_equal(x, format, block, margin=0, power_of_two=True)


@needs_native
@pytest.mark.parametrize("block", [WHOLE, (1, 128), (1, 1000)], ids=str)
def test_a_large_result_equals_its_parts(every_simd: None, two_threads: None, block: Block) -> None:
    """From 16 MiB on results go around the caches; halves of it do not."""
    x = torch.randn(2**13 + 1, 2000, generator=torch.Generator().manual_seed(0)).bfloat16()
    payload, scale_inv, _ = cpu.quantize_current(x, E4M3, block)
    read = cpu.dequantize(payload, scale_inv, block, torch.bfloat16)
    for rows in (slice(0, 4000), slice(4000, None)):
        scales = scale_inv if block == WHOLE else scale_inv[rows]
        assert_equal(payload[rows], cpu.quantize(x[rows], scales, E4M3, block))
        assert_equal(read[rows], cpu.dequantize(payload[rows], scales, block, torch.bfloat16))
    assert_equal(cpu.quantize(x, scale_inv, E4M3, block), payload)


def assert_casts_equal(x: Tensor, format: Format, block: Block, *, margin: int, power_of_two: bool) -> None:
    expected = reference.quantize_current(x, format, block, margin, power_of_two)
    payload, scale_inv, _ = expected
    for name, arguments in {
        "amax": (x, block),
        "quantize_current": (x, format, block, margin, power_of_two),
        "quantize": (x, scale_inv, format, block),
        "quantize_amax": (x, scale_inv, format, block),
        "dequantize": (payload, scale_inv, block, torch.float32),
    }.items():
        assert_equal(getattr(cpu, name)(*arguments), getattr(reference, name)(*arguments))
    for dtype in (torch.bfloat16, torch.float16):
        assert_equal(
            cpu.dequantize(payload, scale_inv, block, dtype), reference.dequantize(payload, scale_inv, block, dtype)
        )
    noisy = (x, scale_inv, format, block, NOISE)
    assert_equal(cpu.quantize(*noisy), reference.quantize(*noisy))
    stored = [Operand(payload.clone(), scale_inv.clone(), block, NOISE) for _ in range(2)]
    cpu.store_(stored[0], x.float())
    reference.store_(stored[1], x.float())
    assert_equal(stored[0][:2], stored[1][:2])


def assert_equal(actual: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> None:
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    assert [mismatches(a, e) for a, e in zip(actual, expected, strict=True)] == [0] * len(expected)


@needs_native
def test_special_values_equal_the_reference(every_simd: None) -> None:
    tiny = [1e-45, -1e-40, 1.1754944e-38, 2.0**-133, 2.0**-149, -0.0, 0.0]
    x = torch.tensor([*tiny, math.nan, -math.nan, math.inf, -math.inf, 3.4e38, 65520.0, 448.0, 464.0, 465.0])
    scales = (1.0, 2.0**-126, 2.0**126, 0.7, math.inf, math.nan)
    for format, scale_inv in itertools.product(FORMATS.values(), scales):
        grid = torch.full((1, 1), scale_inv)
        for noise in (None, NOISE):
            arguments = (x, grid, format, WHOLE, noise)
            payload = reference.quantize(*arguments)
            assert_equal(cpu.quantize(*arguments), payload)
            for dtype in REAL_DTYPES:
                arguments = (payload, grid, WHOLE, dtype)
                assert_equal(cpu.dequantize(*arguments), reference.dequantize(*arguments))


@needs_native
def test_float64_falls_back_to_the_reference() -> None:
    x = spread((3, 50)).double()
    assert_equal(cpu.quantize_current(x, E4M3, ROW), reference.quantize_current(x, E4M3, ROW))
    assert_equal(cpu.amax(x, ROW), reference.amax(x, ROW))


@needs_native
def test_a_wrong_grid_of_scales_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be FP32 of shape \(4, 2\)"):
        cpu.quantize(torch.zeros(4, 256), torch.ones(1, 1), E4M3, (1, 128))


# --- stochastic rounding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [E4M3, E5M2, FP16, BF16], ids=str)
@pytest.mark.parametrize("twin", TWINS)
def test_stochastic_rounding_keeps_the_mean(twin: ModuleType, format: Format) -> None:
    """The mean of n draws, each one of two neighbours a step apart, is within 5 * step / (2 sqrt(n)) of the value."""
    n = 2**16
    for value in (1.03, -0.0007, 201.7):
        payload = twin.quantize(torch.full((n,), value), torch.ones(1, 1), format, WHOLE, NOISE).double()
        field = max(math.floor(math.log2(abs(value))), round(math.log2(format.smallest_normal)))
        step = 2.0 ** (field - format.mantissa_bits)
        assert len(payload.unique()) == 2
        assert abs(payload.mean() - torch.tensor(value).double()) < 5 * step / (2 * math.sqrt(n))


@pytest.mark.parametrize("twin", TWINS)
def test_every_word_of_the_noise_counts(twin: ModuleType) -> None:
    x = spread((4096,))
    drawn = [twin.quantize(x, torch.ones(1, 1), E4M3, WHOLE, NOISE)]
    drawn += [twin.quantize(x, torch.ones(1, 1), E4M3, WHOLE, NOISE._replace(**{name: 99})) for name in Noise._fields]
    for one, other in itertools.combinations(drawn, 2):
        assert mismatches(one, other) > 200


# --- Adam -----------------------------------------------------------------------------------------------------------


def stored(x: Tensor, format: Format, block: Block, noise: Noise | None = None) -> Operand:
    return Operand(*reference.quantize_current(x, format, block)[:2], block, noise)


def copies(operands: tuple[Operand, ...]) -> list[Operand]:
    return [o._replace(payload=o.payload.clone(), scale_inv=o.scale_inv.clone()) for o in operands]


def assert_rows_equal(actual: list[Row], expected: list[Row]) -> None:
    for one, other in zip(actual, expected, strict=True):
        pairs = zip((one.param, *one.states), (other.param, *other.states), strict=True)
        for a, b in (*pairs, *([(one.copy, other.copy)] if one.copy and other.copy else [])):
            assert_equal(a[:2], b[:2])


LAYOUTS: tuple[tuple[Block, Block, Block], ...] = (  # of param, grad, moments
    ((1, 128), WHOLE, (1, 128)),
    (WHOLE, WHOLE, WHOLE),
    (WHOLE, (1, 128), (1, 128)),
    ((1, 128), (1, 128), WHOLE),
    ((128, 128), WHOLE, (1, 16)),  # no common tile: the reference
)


def adam_operands(formats: tuple[Format, ...], layout: int, shape: tuple[int, ...], seed: int) -> tuple[Operand, ...]:
    param_block, grad_block, moment_block = LAYOUTS[layout]
    noises = [Noise(seed, 1, 3, role) if seed % 2 else None for role in range(3)]
    param, grad, first, second = (spread(shape, seed=4 * seed + i) * 0.02 for i in range(4))
    return (
        stored(param, formats[0], param_block, noises[0]),
        stored(grad, formats[1], grad_block),
        stored(first, formats[2], moment_block, noises[1]),
        stored(second * second, formats[3], moment_block, noises[2]),
    )


def assert_adam_equal(operands: tuple[Operand, ...], scalars: AdamScalars, step: int) -> list[Operand]:
    actual, expected = copies(operands), copies(operands)
    kernels.adam_steps_([row_of(actual, step)], scalars)
    reference_updates.adam_steps_([row_of(expected, step)], scalars)
    for one, other in zip(actual, expected, strict=True):
        assert_equal(one[:2], other[:2])
    return actual


@needs_native
@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
def test_adam_equals_the_reference(layout: int) -> None:
    """All combinations of formats, each in one of the layouts; the one without a sign is for the second moment."""
    known = [format for format in FORMATS.values() if format.dtype in cpu.TYPES]
    signed = [format for format in known if format.signed]
    combinations = list(enumerate(itertools.product(signed, signed, signed, known)))
    random.Random(0).shuffle(combinations)
    for seed, formats in combinations[layout :: len(LAYOUTS)]:
        scalars = AdamScalars(1e-3, 0.9, 0.99, 1e-8, 0.1 * (seed % 3), seed % 2 == 0)
        assert_adam_equal(adam_operands(formats, layout, ((2, 150), (130,))[seed % 2], seed), scalars, 1 + seed)


@needs_native
def test_adam_equals_the_reference_for_every_instruction_set(every_simd: None) -> None:
    for seed, formats in enumerate([(FP16, E4M3, E4M3, FP16), (FP32, FP32, FP32, FP32), (BF16, E5M2, E5M2, E4M3)]):
        scalars = AdamScalars(1e-3, 0.9, 0.99, 1e-8, 0.1, seed != 1)
        assert_adam_equal(adam_operands(formats, seed, (11, 259), 2 * seed + 1), scalars, 4)


@needs_native
def test_adam_equals_the_reference_with_several_threads(two_threads: None) -> None:
    for layout in range(4):
        scalars = AdamScalars(1e-3, 0.9, 0.99, 1e-8, 0.1, True)
        assert_adam_equal(adam_operands((FP16, E4M3, E4M3, FP16), layout, (301, 259), 1), scalars, 4)


@needs_native
@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("formats", [(FP16, E4M3, E4M3, FP16), (FP32, BF16, FP32, FP32)], ids=["o2", "fp32"])
def test_adam_flags_what_a_bad_gradient_touches(layout: int, formats: tuple[Format, ...]) -> None:
    param, grad, first, second = adam_operands(formats, layout, (4, 256), 1)
    values = reference.dequantize(grad.payload, grad.scale_inv, grad.block, torch.float32)
    values[1, 130] = math.nan
    grad = stored(values, formats[1], grad.block)
    after = assert_adam_equal((param, grad, first, second), AdamScalars(1e-3, 0.9, 0.99, 1e-8, 0.0, True), 2)
    for operand in (after[0], *after[2:]):
        assert not torch.isfinite(operand.scale_inv).all()


@needs_native
def test_adam_without_a_gradient_or_eps() -> None:
    """0 / 0 in every lane, the padded ones included: NaN where the reference has NaN, nowhere else."""
    zero = stored(torch.zeros(3, 130), FP32, WHOLE)
    assert_adam_equal((zero, *copies((zero,) * 3)), AdamScalars(1e-3, 0.9, 0.99, 0.0, 0.0, True), 1)
    first, second = (stored(spread((3, 130), seed=s).abs() + 1, FP32, WHOLE) for s in (1, 2))
    after = assert_adam_equal((zero, zero, first, second), AdamScalars(1e-3, 0.9, 0.99, 0.0, 0.0, True), 1)
    assert torch.isfinite(after[0].payload).all()


# --- products -------------------------------------------------------------------------------------------------------


def decibels(actual: Tensor, expected: Tensor) -> float:
    noise = (actual.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise))


@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
@pytest.mark.parametrize("twin", [*TWINS, pytest.param(kernels, id="op")])
def test_products_of_ones_count_exactly(twin: ModuleType, layout: str) -> None:
    for m, n, k in ((1, 1, 1), (3, 5, 7), (17, 33, 129), (2, 1, 255)):
        a = stored(torch.ones((k, m) if layout[0] == "t" else (m, k)), E4M3, WHOLE)
        b = stored(torch.ones((n, k) if layout[1] == "t" else (k, n)), E5M2, ROW)
        product = twin.scaled_matmul(a, b, layout, torch.bfloat16)
        assert torch.equal(product, torch.full((m, n), float(k), dtype=torch.bfloat16))


@needs_native
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("formats", [(E4M3, E5M2), (E4M3, FP16)], ids=str)
@pytest.mark.parametrize("block", [WHOLE, (1, 128)], ids=str)
def test_products_lose_only_the_last_rounding(block: Block, formats: tuple[Format, Format], power_of_two: bool) -> None:
    """FP32 out: only the order of the sum differs. BF16 out: the error of one rounding to 8 bits, about 56 dB."""
    x, y = torch.randn(65, 300), torch.randn(31, 300)
    a, b = (
        Operand(*reference.quantize_current(values, format, block, 0, power_of_two)[:2], block)
        for values, format in zip((x, y), formats, strict=True)
    )
    exact = reference.scaled_matmul(a, b, "nt", torch.float32)
    assert decibels(cpu.scaled_matmul(a, b, "nt", torch.float32), exact) > 120
    assert decibels(cpu.scaled_matmul(a, b, "nt", torch.bfloat16), exact) > 52


# --- ops ------------------------------------------------------------------------------------------------------------


def test_ops_take_any_strides_and_return_contiguous_tensors() -> None:
    x = spread((40, 3, 50)).transpose(0, 2)
    expected = reference.quantize_current(x.contiguous(), E4M3, (1, 16))
    actual = kernels.quantize_current(x, E4M3, (1, 16))
    assert_equal(actual, expected)
    assert all(tensor.is_contiguous() for tensor in actual)
    payload, scale_inv, _ = (tensor.t() for tensor in kernels.quantize_current(spread((64, 32)), E4M3, WHOLE))
    read = kernels.dequantize(payload, scale_inv, WHOLE, torch.bfloat16)
    assert read.is_contiguous()
    assert_equal(read, reference.dequantize(payload.contiguous(), scale_inv, WHOLE, torch.bfloat16))


def test_casts_compile_to_one_graph() -> None:
    def roundtrip(x: Tensor, target: Operand, step: int) -> Tensor:
        payload, scale_inv, amax = kernels.quantize_current(x, E4M3, (1, 16))
        noisy = kernels.quantize(x, scale_inv, E4M3, (1, 16), Noise(1, 2, step, 3))
        kernels.store_(target, x)
        again = kernels.dequantize(noisy, kernels.scale_inv_from_amax(amax, E4M3), (1, 16), torch.float32)
        return kernels.dequantize(payload, scale_inv, (1, 16), torch.float32) + again

    compiled = torch.compile(roundtrip, fullgraph=True, backend="aot_eager")
    x = spread((6, 40))
    targets = [stored(torch.zeros(6, 40), E5M2, WHOLE) for _ in range(2)]
    for step in (1, 2):
        assert torch.equal(compiled(x, targets[0], step), roundtrip(x, targets[1], step))
        assert_equal(targets[0][:2], targets[1][:2])


def op_calls() -> list[tuple[str, tuple[Any, ...]]]:
    """One call of each op. No 8-bit input: opcheck multiplies what it is given, which torch does not define for it."""
    x, dtype = spread((5, 40)), torch.float8_e4m3fn
    payload, scale_inv, amax = reference.quantize_current(x, FP16, (1, 16))
    whole = stored(x, BF16, WHOLE)
    operands = [stored(x * 0.01, format, (1, 16)) for format in (FP16, BF16, FP16)]
    second = stored(x * x, FP16, (1, 16), NOISE)
    rows = [row_of((operands[0], operands[1], operands[2], second), 3, whole)]
    scalars = (1e-3, 0.9, 0.99, 1e-8, 0.1, True)
    return [
        ("amax", (x, [1, 16])),
        ("scale_inv_from_amax", (amax, dtype, 0, True)),
        ("quantize", (x, scale_inv, dtype, [1, 16], [1, 2, 3, 4])),
        ("quantize_amax", (x.t(), torch.ones(1, 1), dtype, [-1, -1])),
        ("quantize_current", (x, torch.float16, [2, 8], 0, False)),
        ("dequantize", (payload, scale_inv, [1, 16], torch.bfloat16)),
        ("scaled_matmul", (*whole[:3], *whole[:3], "nt", torch.bfloat16)),
        ("store_", (payload.clone(), scale_inv.clone(), [1, 16], None, x)),
        ("adam_steps_", (*table.flatten(rows), *scalars)),
    ]


@pytest.mark.parametrize("name, arguments", op_calls(), ids=lambda value: value if isinstance(value, str) else "")
def test_ops_obey_their_schemas(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.msamp_like, name).default, arguments)


def test_adam_op_changes_only_what_it_declares() -> None:
    width = len(table.Flat._fields)
    flat, scalars = (dict(op_calls())["adam_steps_"][:width], dict(op_calls())["adam_steps_"][width:])
    rows, expected = table.unflatten(table.Flat(*flat)), table.unflatten(table.Flat(*copy.deepcopy(flat)))
    grad = copies((rows[0].grad,))[0]
    kernels.adam_steps_(rows, AdamScalars(*scalars))
    reference_updates.adam_steps_(expected, AdamScalars(*scalars))
    assert_equal(rows[0].grad[:2], grad[:2])
    assert_rows_equal(rows, expected)


# --- the library ----------------------------------------------------------------------------------------------------


def test_status_names_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cpu.status() == (NATIVE, cpu.status().reason, cpu.status().simd)
    load: Callable[[], tuple[object, str]] = cpu._load.__wrapped__
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    native, reason = load()
    assert native is None
    assert "without a C++ compiler" in reason
    (tmp_path / f"_cpu{cpu.importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    native, reason = load()
    assert native is None
    assert "cannot be loaded" in reason


@needs_native
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads in /proc")
def test_native_kernels_share_the_threads_of_torch(two_threads: None) -> None:
    x = torch.randn(2**20)
    x.exp().sum()
    threads = len(list(Path("/proc/self/task").iterdir()))
    for _ in range(3):
        cpu.quantize(x, torch.ones(1, 1), E4M3, WHOLE)
        x.exp().sum()
    assert len(list(Path("/proc/self/task").iterdir())) == threads
    libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    assert sum(Path(library).name.startswith(("libgomp", "libiomp5", "libomp")) for library in libraries) == 1


@needs_native
def test_a_library_built_from_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "_digest", lambda sources: 0)
    native, reason = cpu._load.__wrapped__()
    assert native is None
    assert "other sources" in reason
