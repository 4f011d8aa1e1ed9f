"""Device functions that the Triton twins share: stored bits to FP32 and back, and the scale of an amax.

Casts are integer and FP32 arithmetic, never a conversion instruction that rounds: a GPU without FP8 units, a GPU with
them and Triton's interpreter on a CPU then give the bytes of :mod:`msamp_like.kernels.reference`. Values travel as
their bits (uint8, int16 or int32 views), so no kernel needs a device that knows the FP8 types.

An amax travels as the bits of a non-negative FP32 number: integer order is numeric order there, and NaN stands above
infinity, where a floating-point maximum would drop it. "Not finite" is ``bits >= INFINITY``.

Left out: conversion instructions where a device has them (they need a parity test on that device first).
"""

# The compiler reads these sources: annotations stay objects, and a constant used on the device is a tl.constexpr.
import struct

import triton
import triton.language as tl

from msamp_like.formats import E4M3, E4M3FNUZ, E5M2, E5M2FNUZ, FP16, UE5M3, Format


def _fp32_bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _smallest_field(format: Format) -> int:
    """FP32 exponent field of the smallest normal number of the format."""
    return _fp32_bits(format.smallest_normal) >> 23


INFINITY = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
FP32_LARGEST = tl.constexpr(0x7F7FFFFF)
BF16_LARGEST = tl.constexpr(0x7F7F0000)
FP16_OVERFLOW = tl.constexpr(0x477FF000)  # 65520: from here on, the nearest FP16 is infinity
E4M3_LARGEST = tl.constexpr(_fp32_bits(E4M3.largest))
E5M2_LARGEST = tl.constexpr(_fp32_bits(E5M2.largest))
E4M3FNUZ_LARGEST = tl.constexpr(_fp32_bits(E4M3FNUZ.largest))
FP16_LARGEST = tl.constexpr(_fp32_bits(FP16.largest))
UE5M3_LARGEST = tl.constexpr(_fp32_bits(UE5M3.largest))
E4M3_FIELD = tl.constexpr(_smallest_field(E4M3))
E5M2_FIELD = tl.constexpr(_smallest_field(E5M2))
FP16_FIELD = tl.constexpr(_smallest_field(FP16))
UE5M3_FIELD = tl.constexpr(_smallest_field(UE5M3))
E4M3FNUZ_FIELD = tl.constexpr(_smallest_field(E4M3FNUZ))
E5M2FNUZ_FIELD = tl.constexpr(_smallest_field(E5M2FNUZ))
E4M3FNUZ_UNIT = tl.constexpr(2.0**119)  # an FP32 number of the same exponent field is this much too small
E5M2FNUZ_UNIT = tl.constexpr(2.0**111)
MAX_EXPONENT = tl.constexpr(126)  # reference.MAX_EXPONENT
SMALLEST_SCALE = tl.constexpr(2.0**-126)
LARGEST_SCALE = tl.constexpr(2.0**126)


# --- bits to FP32 and back --------------------------------------------------------------------------------------------


@triton.jit
def decode(raw, FORMAT: tl.constexpr):
    """FP32 value of stored bits; exact."""
    if FORMAT == "fp32":
        value = raw.to(tl.float32, bitcast=True)
    elif FORMAT == "bf16":
        value = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == "fp16":
        value = raw.to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "e5m2":
        # An E5M2 number is the upper half of an FP16 number.
        value = (raw.to(tl.int32) << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "ue5m3":
        value = (raw.to(tl.int32) << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "e4m3fnuz":
        value = _decode_fnuz(raw.to(tl.int32), 3, E4M3FNUZ_UNIT)
    elif FORMAT == "e5m2fnuz":
        value = _decode_fnuz(raw.to(tl.int32), 2, E5M2FNUZ_UNIT)
    else:
        # As FP16 bits an E4M3 number is 2^8 too small (biases 7 and 15), subnormals included; 0x7F is NaN, not 480.
        code = raw.to(tl.int32)
        half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    return value


@triton.jit
def _decode_fnuz(code, MANTISSA: tl.constexpr, UNIT: tl.constexpr):
    """The magnitude read as the top of an FP32 number, subnormals included, times a power of two; 0x80 is NaN."""
    magnitude = ((code & 0x7F) << (23 - MANTISSA)).to(tl.float32, bitcast=True) * UNIT
    value = tl.where(code >= 0x80, -magnitude, magnitude)
    return tl.where(code == 0x80, float("nan"), value)


@triton.jit
def encode(value, random, FORMAT: tl.constexpr, NOISY: tl.constexpr):
    """Bits of ``value`` clamped to the format and rounded: to nearest even, or with the 16 ``random`` bits if NOISY.

    NaN stays NaN. The result is int32; a store narrows it.
    """
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & MAGNITUDE
    nan = magnitude > INFINITY
    if FORMAT == "fp32":
        code = tl.where(nan, bits, tl.minimum(magnitude, FP32_LARGEST) | (bits ^ magnitude))
    elif FORMAT == "bf16":
        code = _bf16_code(tl.minimum(magnitude, BF16_LARGEST), random, NOISY)
        code = tl.where(nan, 0x7FC0, code) | ((bits >> 16) & 0x8000)
    elif FORMAT == "fp16":
        code = _code(tl.minimum(magnitude, FP16_LARGEST), random, NOISY, 10, FP16_FIELD)
        code = tl.where(nan, 0x7E00, code) | ((bits >> 16) & 0x8000)
    elif FORMAT == "e5m2":
        code = _code(tl.minimum(magnitude, E5M2_LARGEST), random, NOISY, 2, E5M2_FIELD)
        code = tl.where(nan, 0x7F, code) | ((bits >> 24) & 0x80)
    elif FORMAT == "ue5m3":
        code = _code(tl.where(bits < 0, 0, tl.minimum(magnitude, UE5M3_LARGEST)), random, NOISY, 3, UE5M3_FIELD)
        code = tl.where(nan, 0xFC, code)
    elif FORMAT == "e4m3fnuz":
        code = _code(tl.minimum(magnitude, E4M3FNUZ_LARGEST), random, NOISY, 3, E4M3FNUZ_FIELD)
        code = tl.where(nan, 0x80, tl.where(code > 0, code | ((bits >> 24) & 0x80), 0))
    elif FORMAT == "e5m2fnuz":
        code = _code(tl.minimum(magnitude, E5M2_LARGEST), random, NOISY, 2, E5M2FNUZ_FIELD)
        code = tl.where(nan, 0x80, tl.where(code > 0, code | ((bits >> 24) & 0x80), 0))
    else:
        code = _code(tl.minimum(magnitude, E4M3_LARGEST), random, NOISY, 3, E4M3_FIELD)
        code = tl.where(nan, 0x7F, code) | ((bits >> 24) & 0x80)
    return code


@triton.jit
def convert(value, FORMAT: tl.constexpr):
    """Bits of ``value`` rounded to nearest even as ``Tensor.to`` does: what is too large becomes infinity."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & MAGNITUDE
    nan = magnitude > INFINITY
    if FORMAT == "fp32":
        code = bits
    elif FORMAT == "bf16":
        code = tl.where(nan, 0x7FC0, _bf16_code(magnitude, 0, False)) | ((bits >> 16) & 0x8000)
    else:
        code = _code(tl.minimum(magnitude, FP16_LARGEST), 0, False, 10, FP16_FIELD)
        code = tl.where(magnitude >= FP16_OVERFLOW, 0x7C00, code)
        code = tl.where(nan, 0x7E00, code) | ((bits >> 16) & 0x8000)
    return code


@triton.jit
def _bf16_code(magnitude, random, NOISY: tl.constexpr):
    """Upper half of the FP32 bits, rounded; a carry out of the mantissa is the next binade, and above the last inf."""
    if NOISY:
        code = (magnitude + random) >> 16
    else:
        code = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16
    return code


@triton.jit
def _code(magnitude, random, NOISY: tl.constexpr, MANTISSA: tl.constexpr, SMALLEST_FIELD: tl.constexpr):
    """Sign-less code of ``magnitude``: whole steps of its binade, plus 2^MANTISSA for each binade above the lowest.

    Normal and subnormal numbers are one case: below the smallest normal, the step no longer shrinks.
    """
    field = tl.maximum(magnitude >> 23, SMALLEST_FIELD)
    real = magnitude.to(tl.float32, bitcast=True)
    if NOISY:
        BITS: tl.constexpr = 16 if MANTISSA <= 7 else 23 - MANTISSA
        uniform = (random >> (16 - BITS)).to(tl.float32) * (1.0 / (1 << BITS))
        steps_per_unit = ((254 + MANTISSA - field) << 23).to(tl.float32, bitcast=True)
        steps = (real * steps_per_unit + uniform).to(tl.int32)
    else:
        # 2^23 steps leave FP32 no bit for a fraction, so the addition itself rounds to nearest even.
        many = (field + (23 - MANTISSA)) << 23
        steps = (real + many.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - many
    return ((field - SMALLEST_FIELD) << MANTISSA) + steps


# --- scales -----------------------------------------------------------------------------------------------------------


@triton.jit
def magnitude_bits(value):
    """|value| as integer-ordered bits, see the module docstring."""
    return value.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def scale_inv_of(amax_bits, FORMAT: tl.constexpr, MARGIN: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """``reference.scale_inv_from_amax`` of an amax given as bits."""
    if FORMAT == "e4m3":
        scale_inv = _scale_inv(amax_bits, E4M3_LARGEST, MARGIN, POWER_OF_TWO)
    elif FORMAT == "e4m3fnuz":
        scale_inv = _scale_inv(amax_bits, E4M3FNUZ_LARGEST, MARGIN, POWER_OF_TWO)
    elif FORMAT == "e5m2" or FORMAT == "e5m2fnuz":
        scale_inv = _scale_inv(amax_bits, E5M2_LARGEST, MARGIN, POWER_OF_TWO)
    elif FORMAT == "fp16":
        scale_inv = _scale_inv(amax_bits, FP16_LARGEST, MARGIN, POWER_OF_TWO)
    elif FORMAT == "ue5m3":
        scale_inv = _scale_inv(amax_bits, UE5M3_LARGEST, MARGIN, POWER_OF_TWO)
    else:
        scale_inv = (amax_bits * 0 + 0x3F800000).to(tl.float32, bitcast=True)
    return tl.where(amax_bits >= INFINITY, float("inf"), scale_inv)


@triton.jit
def _scale_inv(amax_bits, LARGEST: tl.constexpr, MARGIN: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    if POWER_OF_TWO:
        exponent = (LARGEST >> 23) - MARGIN - (amax_bits >> 23)
        exponent -= ((amax_bits & 0x7FFFFF) > (LARGEST & 0x7FFFFF)).to(tl.int32)
        exponent = tl.minimum(tl.maximum(exponent, -MAX_EXPONENT), MAX_EXPONENT)
        scale_inv = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    else:
        amax = amax_bits.to(tl.float32, bitcast=True)
        limit = (amax_bits * 0 + (LARGEST - (MARGIN << 23))).to(tl.float32, bitcast=True)
        scale_inv = tl.minimum(tl.maximum(tl.div_rn(amax, limit), SMALLEST_SCALE), LARGEST_SCALE)
    return tl.where(amax_bits == 0, 1.0, scale_inv)


@triton.jit
def scale_down(value, scale_inv):
    """``value / scale_inv`` as the reference has it: times the rounded reciprocal, 0 where the block is flagged."""
    flagged = magnitude_bits(scale_inv) >= INFINITY
    scale = tl.div_rn(tl.full(scale_inv.shape, 1.0, tl.float32), scale_inv)
    return tl.where(flagged[:, None], 0.0, value * scale[:, None])
