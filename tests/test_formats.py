"""Formats and blocks: every constant is what its dtype does, every grid covers its tensor exactly."""

from __future__ import annotations

import ml_dtypes
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msamp_like.formats import (
    BF16,
    E4M3,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    FNUZ,
    FORMATS,
    FP16,
    FP32,
    RESIDUAL,
    ROW,
    UE5M3,
    WHOLE,
    block_extent,
    check_block,
    check_same_kind,
    format_of,
    grid_shape,
    matrix_shape,
)
from msamp_like.kernels import dequantize, quantize, quantize_current, reference
from tests.closeness import same_bits, sqnr

BLOCKS = [WHOLE, ROW, (1, 128), (128, 128), (1, 32)]
OF_TORCH = [f for f in FORMATS.values() if f.dtype.is_floating_point]


@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
class TestFormat:
    def test_constants_are_those_of_the_dtype(self, format):
        if format not in OF_TORCH:
            pytest.skip("torch has no dtype of this format; its table is below")
        info = torch.finfo(format.dtype)
        assert (format.largest, format.smallest_normal) == (info.max, info.smallest_normal)
        assert format.bytes == torch.empty((), dtype=format.dtype).element_size()

    def test_mantissa_bits_are_the_distance_of_two_neighbours(self, format):
        above_one = torch.tensor(1 + 2.0**-format.mantissa_bits)
        assert reference.decode(reference.encode(above_one, format)) == above_one
        between = torch.tensor(1 + 2.0 ** -(format.mantissa_bits + 1), dtype=torch.float64)
        if format is not FP32:  # which is what a value is encoded from
            between = between.float()
            assert reference.decode(reference.encode(between, format)) != between  # one bit more is one too many

    def test_dtype_names_the_format(self, format):
        assert format_of(format.dtype) is format
        assert FORMATS[str(format)] is format

    @pytest.mark.parametrize("block", BLOCKS, ids=str)
    def test_round_trip_costs_one_rounding(self, format, block):
        """Relative error of a nearest rounding is at most half a step, 2^-(mantissa_bits + 1), of each value that stays
        normal; values near amax do, with one scale for a few hundred elements of N(0, 1)."""
        x = torch.randn(130, 200) if format.signed else torch.rand(130, 200)
        payload, scale_inv, amax = quantize_current(x, format, block)
        back = dequantize(payload, scale_inv, block, torch.float32)
        normal = reference.decode(payload).abs() >= format.smallest_normal
        assert normal.float().mean() > 0.9
        error = ((back - x).abs() / x.abs())[normal]
        assert error.max() <= 2.0 ** -(format.mantissa_bits + 1)
        assert sqnr(x, back) > 6 * format.mantissa_bits + 10
        assert payload.dtype == format.dtype
        assert scale_inv.shape == amax.shape == grid_shape(x.shape, block)


def test_published_extremes():
    """OFP8 revision 1.0, table 2, and IEEE 754."""
    assert (E4M3.largest, E5M2.largest, FP16.largest) == (448.0, 57344.0, 65504.0)
    assert [f.scaled for f in (E4M3, E5M2, FP16, BF16, FP32)] == [True, True, True, False, False]


@pytest.mark.parametrize("source", OF_TORCH, ids=str)
@pytest.mark.parametrize("target", OF_TORCH, ids=str)
def test_casts_between_all_formats(source, target):
    """Both roundings together stay within 10 % of N(0, 1) values, and the source is untouched."""
    x = torch.randn(64, 64)
    payload, scale_inv, _ = quantize_current(x, source, WHOLE)
    before = payload.float().clone()
    values = dequantize(payload, scale_inv, WHOLE, torch.float32)
    back = dequantize(*quantize_current(values, target, WHOLE)[:2], WHOLE, torch.float32)
    floor = 0.13 if {E5M2, E5M2FNUZ} & {source, target} else 0.1  # half a step of E5M2 alone is 12.5 %
    torch.testing.assert_close(back, x, rtol=floor, atol=0.1)
    assert torch.equal(payload.float(), before)


def test_a_small_power_of_two_survives_a_chain_of_formats():
    values = torch.full((3, 5), 2.0**-17)
    for format in (FP16, E4M3, E5M2, BF16, FP32):
        values = dequantize(*quantize_current(values, format, WHOLE)[:2], WHOLE, torch.float32)
        assert torch.equal(values, torch.full((3, 5), 2.0**-17)), format


class TestUE5M3:
    """Against a table made of FP16's, and a search in it."""

    TABLE = (torch.arange(256, dtype=torch.int16) << 7).view(torch.float16).float()

    def test_every_code_is_the_upper_byte_of_a_half(self):
        codes = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(reference.decode(codes).nan_to_num(-1.0), self.TABLE.nan_to_num(-1.0))
        finite = self.TABLE.isfinite()
        assert self.TABLE[finite].max() == UE5M3.largest
        assert reference.decode(torch.tensor([8], dtype=torch.uint8)) == UE5M3.smallest_normal
        assert torch.equal(reference.encode(self.TABLE[finite], UE5M3), codes[finite])
        assert reference.decode(reference.encode(torch.tensor([torch.nan]), UE5M3)).isnan()

    def test_every_half_and_every_tie_go_to_the_nearest_code_ties_to_the_even_one(self):
        numbers = self.TABLE[self.TABLE.isfinite()]
        ties = (numbers[1:] + numbers[:-1]) / 2
        halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
        values = torch.cat([halves, ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(1e9))])
        values = values.clamp(max=UE5M3.largest)
        distance = (values.double()[:, None] - numbers.double()).abs()
        odd = torch.arange(len(numbers)) % 2
        nearest = (distance * 2 + odd * 1e-12).argmin(dim=1)
        assert torch.equal(reference.encode(values, UE5M3).long(), nearest)
        truncated = torch.searchsorted(numbers, values, right=True) - 1
        assert not torch.equal(truncated, nearest)  # control: the search sees a rounding that is not to nearest

    def test_a_negative_number_is_stored_as_zero(self):
        payload, scale_inv, amax = quantize_current(torch.tensor([[-3.0, -0.0, 2.0]]), UE5M3, WHOLE)
        assert dequantize(payload, scale_inv, WHOLE, torch.float32).tolist() == [[0.0, 0.0, 2.0]]
        assert float(amax) == 3.0


def test_a_residual_is_no_number_of_its_own():
    assert RESIDUAL.dtype == torch.int8
    assert RESIDUAL not in FORMATS.values()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64])
def test_other_dtypes_store_nothing_of_ours(dtype):
    with pytest.raises(TypeError, match=f"must be one of .*, got {dtype}; cast"):
        format_of(dtype)


# --- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "matrix"), [((), (1, 1)), ((96,), (1, 96)), ((3, 5), (3, 5)), ((4, 8, 96), (32, 96)), ((0, 7), (0, 7))]
)
def test_matrix_of_the_last_dim(shape, matrix):
    assert matrix_shape(shape) == matrix


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    block=st.tuples(*[st.sampled_from([-1, 1, 2, 3, 8, 128])] * 2),
)
def test_a_grid_covers_its_tensor_and_no_more(shape, block):
    rows, columns = matrix_shape(shape)
    extent, grid = block_extent(shape, block), grid_shape(shape, block)
    for size, step, count in zip((rows, columns), extent, grid):
        assert count * step >= size
        assert count == 1 or (count - 1) * step < size  # the last block is not empty
    check_block(block)


@pytest.mark.parametrize("block", [(0, 1), (1, -2), (1,), (1, 2, 3), (1.0, 2), ("1", 1)])
def test_bad_blocks_are_refused(block):
    with pytest.raises(ValueError, match="a block is two sizes"):
        check_block(block)


# --- AMD's fnuz formats -----------------------------------------------------------------------------------------------

_PEERS = {E4M3FNUZ: ml_dtypes.float8_e4m3fnuz, E5M2FNUZ: ml_dtypes.float8_e5m2fnuz}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", _PEERS, ids=str)
def test_fnuz_casts_are_those_of_ml_dtypes(format, dtype):
    """Every number of 16 bits: normal, subnormal, both zeros, what saturates. A block with no finite amax is flagged
    before it is cast, so NaN is no input."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    payload = reference.quantize(x, torch.ones(1, 1), format, WHOLE)
    expected = x.float().clamp(-format.largest, format.largest).numpy().astype(_PEERS[format])
    assert numpy.array_equal(payload.view(torch.uint8).numpy(), expected.view(numpy.uint8))
    assert same_bits(quantize(x, torch.ones(1, 1), format, WHOLE), payload)


@pytest.mark.parametrize("format", _PEERS, ids=str)
def test_fnuz_codes_decode_as_ml_dtypes_reads_them(format):
    codes = torch.arange(256, dtype=torch.uint8)
    ours = dequantize(codes.view(format.dtype), torch.ones(1, 1), WHOLE, torch.float32)
    expected = torch.from_numpy(codes.numpy().view(_PEERS[format]).astype(numpy.float32))
    assert torch.equal(ours.isnan(), expected.isnan())
    assert ours.isnan().sum() == 1
    assert torch.equal(ours[~ours.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("format", FNUZ, ids=str)
def test_one_kind_becomes_the_other_without_loss(format):
    """All numbers of an OCP format, halved, are numbers of the fnuz one: the scale takes up the factor. The bytes
    themselves, read as the other kind, would be other numbers."""
    codes = torch.arange(256, dtype=torch.uint8).view(format.dtype)
    values = codes.float()[codes.float().isfinite()]
    payload, scale_inv, _ = quantize_current(values, FNUZ[format], WHOLE)
    assert torch.equal(dequantize(payload, scale_inv, WHOLE, torch.float32), values)
    misread = codes.view(FNUZ[format].dtype).float()[codes.float().isfinite()]
    assert not torch.equal(misread, values)


def test_kinds_are_not_mixed():
    for a, b in ((E4M3, E4M3FNUZ), (E5M2FNUZ, E4M3)):
        with pytest.raises(ValueError, match=f"not mixed, got {a.dtype} with {b.dtype}; store both"):
            check_same_kind(a.dtype, b.dtype)
    for a, b in ((E4M3, E5M2), (E5M2FNUZ, E4M3FNUZ), (BF16, E4M3FNUZ)):
        check_same_kind(a.dtype, b.dtype)
