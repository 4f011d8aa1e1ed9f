"""Device functions of the optimizers' steps: what a row stores to FP32 and back, and where its elements lie.

Bound by arithmetic as much as by bytes (an element of O2 is 11 bytes and four encodings), so these are the shortest
forms that give the reference's bits. What a step writes has a scale from its own amax: it fits its format and is
finite, or its block is flagged and becomes zeros whatever the arithmetic made of it. So nothing is clamped, and no NaN
looked for, element by element, as :mod:`.triton_codec` must; only the integer code is masked.

An E4M3 weight and its residual are one number of 16 bits, see :mod:`.reference_updates`.
"""

# The compiler reads these sources: annotations stay objects, and a kernel argument has none.
# mypy: allow-untyped-defs, allow-incomplete-defs
import triton
import triton.language as tl

from msamp_like.kernels.triton_codec import (
    E4M3_FIELD,
    E4M3_LARGEST,
    E5M2_FIELD,
    FP16_FIELD,
    FP16_LARGEST,
    INFINITY,
    MAGNITUDE,
    UE5M3_FIELD,
    UE5M3_LARGEST,
    decode,
    encode,
    magnitude_bits,
    scale_inv_of,
)
from msamp_like.kernels.triton_tiles import block_offsets

SPLIT_DROPPED = tl.constexpr(12)  # mantissa bits of FP32 that a weight and its residual do not keep
SPLIT_TINY = tl.constexpr(2.0**-120)  # makes E4M3's smallest normal number FP32's
SPLIT_LARGEST = tl.constexpr(0x7E7F)


# --- places -----------------------------------------------------------------------------------------------------------


@triton.jit
def pointer(entry, FIELD: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr):
    """An address of the table as a pointer to integers of the format's width; EVEN ones are multiples of 16 bytes."""
    address = tl.load(entry + FIELD)
    if FORMAT == "fp32":
        found = address.to(tl.pointer_type(tl.int32))
    elif FORMAT == "fp16" or FORMAT == "bf16":
        found = address.to(tl.pointer_type(tl.int16))
    else:
        found = address.to(tl.pointer_type(tl.uint8))
    if EVEN:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def scales_pointer(entry, FIELD: tl.constexpr):
    return tl.load(entry + FIELD).to(tl.pointer_type(tl.float32))


@triton.jit
def places(blocks, exists, rows, columns, block_columns, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of the elements of blocks of one row, and which exist; EVEN blocks lie one behind the other, all full."""
    elements = tl.arange(0, BLOCK)
    if EVEN:
        offsets = (blocks.to(tl.int64) * BLOCK)[:, None] + elements[None, :]
        inside = tl.broadcast_to(exists[:, None], (blocks.shape[0], BLOCK))  # a mask that a vector shares
    else:
        offsets, inside = block_offsets(blocks, elements, rows, columns, 1, block_columns, BLOCK)
        inside = inside & exists[:, None]
    return offsets, inside


# --- reading ----------------------------------------------------------------------------------------------------------


@triton.jit
def narrow(code, FORMAT: tl.constexpr):
    """A code as it is loaded."""
    if FORMAT == "fp32":
        stored = code
    elif FORMAT == "fp16" or FORMAT == "bf16":
        stored = code.to(tl.int16)
    else:
        stored = code.to(tl.uint8)
    return stored


@triton.jit
def decoded(raw, FORMAT: tl.constexpr, UNITS: tl.constexpr):
    """``decode``; where a device knows E4M3, by its own instruction, which rounds nothing."""
    if UNITS and FORMAT == "e4m3":
        value = raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        value = decode(raw, FORMAT)
    return value


@triton.jit
def read(payload, scale_inv, blocks, exists, offsets, inside,
         FORMAT: tl.constexpr, MODE: tl.constexpr, UNITS: tl.constexpr):  # fmt: skip
    """FP32 values of a tile."""
    value = decoded(tl.load(payload + offsets, mask=inside, other=0), FORMAT, UNITS)
    if MODE == "blocks":
        value = value * tl.load(scale_inv + blocks, mask=exists, other=1.0)[:, None]
    else:
        value = value * tl.load(scale_inv)
    return value


@triton.jit
def read_split(weight, residual, scale_inv, offsets, inside):
    """``reference_updates.dequantize_with_residual``."""
    code = tl.load(weight + offsets, mask=inside, other=0).to(tl.int32)
    rest = tl.load(residual + offsets, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.int32)
    number = ((code << 24) + (rest << 16)) >> (16 - SPLIT_DROPPED)
    # the number's sign, spread over the upper bits, leaves the first of them to FP32
    real = (number & -0x78000001).to(tl.float32, bitcast=True)
    return real * (1.0 / SPLIT_TINY) * tl.load(scale_inv)


# --- amax and scales --------------------------------------------------------------------------------------------------


@triton.jit
def largest_of(value, exists, inside, EVEN: tl.constexpr, SIGNED: tl.constexpr = True):
    """Bits of each block's amax; 0 of one that does not exist. Numbers without a sign are their own magnitudes, and a
    NaN is above infinity whatever its sign bit."""
    magnitudes = magnitude_bits(value) if SIGNED else value.to(tl.uint32, bitcast=True)
    if not EVEN:
        magnitudes = tl.where(inside, magnitudes, 0)
    return tl.where(exists, tl.max(magnitudes, axis=1).to(tl.int32, bitcast=True) & MAGNITUDE, 0)


@triton.jit
def _next_scale(largest, LARGEST: tl.constexpr):
    """``triton_codec._scale_inv`` for powers of two: a mantissa above that of the format's largest number carries."""
    CARRY: tl.constexpr = 0x7FFFFF - (LARGEST & 0x7FFFFF)
    bits = ((largest + CARRY) & INFINITY) + ((127 - (LARGEST >> 23)) << 23)
    bits = tl.where(largest == 0, 0x3F800000, tl.maximum(bits, 1 << 23))  # no finite amax asks for more than 2^126
    return tl.where(largest >= INFINITY, INFINITY, bits).to(tl.float32, bitcast=True)


@triton.jit
def next_scale(largest, FORMAT: tl.constexpr):
    """``scale_inv_of`` of an amax given as bits, no margin."""
    if FORMAT == "e4m3":
        scale_inv = _next_scale(largest, E4M3_LARGEST)
    elif FORMAT == "fp16":
        scale_inv = _next_scale(largest, FP16_LARGEST)
    elif FORMAT == "ue5m3":
        scale_inv = _next_scale(largest, UE5M3_LARGEST)
    else:
        scale_inv = scale_inv_of(largest, FORMAT, 0, True)
    return scale_inv


@triton.jit
def factor_of(scale_inv):
    """The reciprocal of a power of two that ``scale_inv_of`` gave, exact; some number where it is a flag."""
    return ((254 << 23) - scale_inv.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


# --- random numbers ---------------------------------------------------------------------------------------------------


@triton.jit
def random_words(offsets, key0, key1):
    """``reference.random_bits`` before a half is taken, uint32."""
    word = offsets.to(tl.uint32) * 0x9E3779B9 + key0.to(tl.uint32, bitcast=True)
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15) ^ key1.to(tl.uint32, bitcast=True)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _uniform(word, BITS: tl.constexpr, LOWER_HALF: tl.constexpr):
    """The upper BITS of a half of a word as a number in [0, 1): set into the mantissa of 2^7, which is taken off."""
    MASK: tl.constexpr = 0x10000 - (1 << (16 - BITS))
    if LOWER_HALF:
        drawn = word & MASK
    else:
        drawn = (word >> 16) & MASK
    return (drawn | 0x43000000).to(tl.float32, bitcast=True) - 128.0


# --- writing ----------------------------------------------------------------------------------------------------------


@triton.jit
def _fitting(value, word, MANTISSA: tl.constexpr, FIELD: tl.constexpr, NOISY: tl.constexpr, LOWER_HALF: tl.constexpr):
    """``triton_codec._code``: steps from the format's lowest binade, where those of higher ones come before it."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    BITS: tl.constexpr = 16 if MANTISSA <= 7 else 23 - MANTISSA
    binade = tl.maximum(value.to(tl.int32, bitcast=True) & INFINITY, FIELD << 23)
    if NOISY:
        # 254 + MANTISSA in the place of the exponent, less that of the binade; modulo 2^32, where it fits
        steps_per_unit = (-((258 - MANTISSA) << 23) - binade).to(tl.float32, bitcast=True)
        steps = (tl.abs(value) * steps_per_unit + _uniform(word, BITS, LOWER_HALF)).to(tl.int32)
    else:
        many = binade + (DROPPED << 23)
        steps = (tl.abs(value) + many.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - many
    return steps + ((binade >> DROPPED) - (FIELD << MANTISSA))


@triton.jit
def fitting_code(
    value, word, FORMAT: tl.constexpr, NOISY: tl.constexpr, LOWER_HALF: tl.constexpr, CONVERTS: tl.constexpr,
    SIGNED: tl.constexpr = True,
):  # fmt: skip
    """``encode`` of scaled values that are finite and fit the format; of others some code. With CONVERTS the device's
    own instruction rounds to E4M3."""
    bits = value.to(tl.int32, bitcast=True)
    if FORMAT == "e4m3" and CONVERTS and not NOISY:
        code = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    elif FORMAT == "e4m3":
        code = _fitting(value, word, 3, E4M3_FIELD, NOISY, LOWER_HALF) | ((bits >> 24) & 0x80)
    elif FORMAT == "e5m2":
        code = _fitting(value, word, 2, E5M2_FIELD, NOISY, LOWER_HALF) | ((bits >> 24) & 0x80)
    elif FORMAT == "fp16":
        code = _fitting(value, word, 10, FP16_FIELD, NOISY, LOWER_HALF)
        if SIGNED:
            code = code | ((bits >> 16) & 0x8000)
    elif FORMAT == "ue5m3":
        code = _fitting(tl.maximum(value, 0.0), word, 3, UE5M3_FIELD, NOISY, LOWER_HALF)
    elif FORMAT == "fp32":
        code = bits
    else:
        random = 0
        if NOISY:
            random = ((word & 0xFFFF) if LOWER_HALF else (word >> 16)).to(tl.int32)
        code = encode(value, random, FORMAT, NOISY)
    return code


@triton.jit
def write(
    value, largest, whole, word, payload, scale_inv, blocks, exists, offsets, inside,
    FORMAT: tl.constexpr, MODE: tl.constexpr, NOISY: tl.constexpr, LOWER_HALF: tl.constexpr, CONVERTS: tl.constexpr,
    SIGNED: tl.constexpr = True,
):  # fmt: skip
    """Store FP32 ``value``: with a scale from each block's ``largest``, with the scale ``whole`` of all, or with none;
    returns what was stored, as codes and as the scales of the tile's rows.

    A tensor of one scale is settled later: its scale, and its flag, are known when all of it has been read.
    """
    if MODE == "blocks":
        scales = next_scale(largest, FORMAT)
        tl.store(scale_inv + blocks, scales, mask=exists)
        kept = tl.where(largest >= INFINITY, 0, -1)
        code = fitting_code(value * factor_of(scales)[:, None], word, FORMAT, NOISY, LOWER_HALF, CONVERTS, SIGNED)
        code = code & kept[:, None]
    elif MODE == "whole":
        scales = whole + largest * 0
        code = fitting_code(value * factor_of(whole), word, FORMAT, NOISY, LOWER_HALF, CONVERTS, SIGNED)
    else:
        scales = (largest * 0 + 0x3F800000).to(tl.float32, bitcast=True)
        code = fitting_code(value, word, FORMAT, NOISY, LOWER_HALF, CONVERTS, SIGNED)
    stored = narrow(code, FORMAT)
    tl.store(payload + offsets, stored, mask=inside)
    return stored, scales


@triton.jit
def write_split(value, whole, word, weight, residual, offsets, inside, NOISY: tl.constexpr):
    """``reference_updates.quantize_with_residual`` with the scale ``whole``, whose noise is the upper half."""
    real = value * factor_of(whole)
    bits = (tl.abs(real) * SPLIT_TINY).to(tl.int32, bitcast=True)
    if NOISY:
        bits = bits + (word >> (32 - SPLIT_DROPPED)).to(tl.int32)
    else:
        bits = bits + 0x7FF + ((bits >> SPLIT_DROPPED) & 1)
    number = tl.minimum(bits >> SPLIT_DROPPED, SPLIT_LARGEST) + 128
    code = (number >> 8) | ((real.to(tl.int32, bitcast=True) >> 24) & 0x80)
    tl.store(weight + offsets, code.to(tl.uint8), mask=inside)
    tl.store(residual + offsets, ((number & 0xFF) ^ 0x80).to(tl.uint8), mask=inside)


@triton.jit
def scale_of(found, FORMAT: tl.constexpr):
    """The next scale of a whole tensor, from the bits of its largest value."""
    return next_scale(found & MAGNITUDE, FORMAT)
