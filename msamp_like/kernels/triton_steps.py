"""Triton twins of the optimizers' fused steps: all rows of a table that store alike in one launch.

Reference: :mod:`.reference_updates`. A program takes a chunk of a row: it finds the row's addresses and numbers in the
table (:mod:`.triton_table`), and for each tile reads, decodes, updates in FP32 in the reference's order of operations,
finds each block's new scale, encodes, writes. At O2 that is 11 bytes an element and 24 more a block for the scales.

What has one scale for all of a tensor is known only when all of it has been read. So a program leaves the largest
values that it met in ``found``, and a second launch over the same rows settles them: the flag of an FP32 or BF16 tensor
(its scale is 1, or +inf over zeros), and the scale of a compute copy. The copy is written in the first pass with the
last step's scale, and by the second launch once more where its amax crossed a binade; where it did not, that launch
reads a few words a chunk. A master in two parts has its scale from a bound before the first pass, its amax after it.

An FP16 or 8-bit tensor of one scale, and a master in two parts under an optimizer without a bound, need that scale
before they are written: a launch ahead of the others does everything but write.

No launch waits for the device, and each begins with a look at ``bad``. No speed is measured: ``benchmarks/gpu.py`` does
that. ``benchmarks/gpu_code.py`` counts the machine code, and by that count arithmetic takes longer than the bytes of O2
and of lean do on H200: the exact quotient and root, four roundings, one hash an element.
"""

# The compiler reads these sources: annotations stay objects, and a kernel argument has none.
# mypy: allow-untyped-defs, allow-incomplete-defs
import triton
import triton.language as tl

from msamp_like.kernels.triton_codec import INFINITY
from msamp_like.kernels.triton_stored import (
    decoded,
    factor_of,
    fitting_code,
    largest_of,
    narrow,
    places,
    pointer,
    random_words,
    read,
    read_split,
    scale_of,
    scales_pointer,
    write,
    write_split,
)

# Fields of a row in the table of addresses, int64: payloads in front of their scales.
PARAM_AT, FIRST_AT, SECOND_AT, GRAD_AT, COPY_AT, RESIDUAL_AT = (tl.constexpr(2 * i) for i in range(6))
BLOCKS_AT, ROWS_AT, COLUMNS_AT, BLOCK_COLUMNS_AT = (tl.constexpr(12 + i) for i in range(4))
ADDRESSES = tl.constexpr(16)

# In the table of numbers, 32 bits each: keys of the noise, then FP32 numbers, then the step.
PARAM_KEYS, FIRST_KEYS, SECOND_KEYS = (tl.constexpr(2 * i) for i in range(3))
RATE, EPS, RATIO, GROWTH, INCREASE, STEP = (tl.constexpr(6 + i) for i in range(6))
NUMBERS = tl.constexpr(12)

# In ``found``, int32: bits of the largest magnitudes of param, states and copy, then of the scale that the first pass
# took for copy or weight.
COPY_FOUND, USED, FOUND = tl.constexpr(3), tl.constexpr(4), tl.constexpr(8)


# --- updates ----------------------------------------------------------------------------------------------------------


@triton.jit
def _updated(
    w, g, m, v, numbers, keep, weight_decay, beta1, rest1, beta2, rest2,
    KIND: tl.constexpr, DECAY: tl.constexpr, CLAMPS: tl.constexpr,
):  # fmt: skip
    """The reference's update of that name, each line in its order; contraction is off at launch."""
    rate = _number(numbers, RATE)
    if DECAY == "decoupled":
        w = w * keep
    elif DECAY == "added":
        g = g + w * weight_decay
    if KIND == "adam":
        m = m * beta1 + g * rest1
        v = v * beta2 + (g * g) * rest2
        quotient = tl.div_rn(m, tl.sqrt_rn(v) + _number(numbers, EPS))
        if CLAMPS:
            ratio = _number(numbers, RATIO)
            quotient = tl.minimum(quotient, ratio, propagate_nan=tl.PropagateNan.ALL)
            quotient = tl.maximum(quotient, -ratio, propagate_nan=tl.PropagateNan.ALL)
        w = w - quotient * rate
    elif KIND == "lion":
        mean = m * beta1 + g * rest1
        w = w - ((mean > 0).to(tl.float32) - (mean < 0).to(tl.float32)) * rate
        m = m * beta2 + g * rest2
    else:
        direction = g
        if KIND != "sgd":
            m = tl.where(tl.load(numbers + STEP) == 1, g, m * beta1 + g * rest1)
            direction = m
        if KIND == "nesterov":
            direction = g + m * beta1
        w = w - direction * rate
    return w, m, v


@triton.jit
def _number(numbers, FIELD: tl.constexpr):
    return tl.load(numbers + FIELD).to(tl.float32, bitcast=True)


# --- the pass ---------------------------------------------------------------------------------------------------------


@triton.jit
def _words(numbers, offsets, KEYS: tl.constexpr):
    return random_words(offsets, tl.load(numbers + KEYS), tl.load(numbers + KEYS + 1))


@triton.jit
def _whole_scale(found, FORMAT: tl.constexpr, MODE: tl.constexpr):
    """The scale of a tensor that the launch before has read."""
    scale = 1.0
    if MODE == "whole":
        scale = scale_of(tl.load(found), FORMAT)
    return scale


@triton.jit
def step_kernel(
    addresses, numbers, found, programs, bad, keep, weight_decay, beta1, rest1, beta2, rest2,
    KIND: tl.constexpr, DECAY: tl.constexpr, MEASURES: tl.constexpr,
    PARAM: tl.constexpr, PARAM_MODE: tl.constexpr, PARAM_NOISY: tl.constexpr, PARAM_LOWER_HALF: tl.constexpr,
    FIRST: tl.constexpr, FIRST_MODE: tl.constexpr, FIRST_NOISY: tl.constexpr, FIRST_LOWER_HALF: tl.constexpr,
    SECOND: tl.constexpr, SECOND_MODE: tl.constexpr, SECOND_NOISY: tl.constexpr, SECOND_LOWER_HALF: tl.constexpr,
    GRAD: tl.constexpr, GRAD_MODE: tl.constexpr, COPY: tl.constexpr, SPLIT: tl.constexpr, SHARED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
    UNITS: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """A chunk of a row's step; with MEASURES nothing is written but the largest values."""
    if tl.load(bad) != 0:
        return
    row = tl.load(programs + 2 * tl.program_id(0))
    chunk = tl.load(programs + 2 * tl.program_id(0) + 1)
    entry = addresses + row * ADDRESSES
    numbers = numbers + row * NUMBERS
    found = found + row * FOUND
    param, param_scales = pointer(entry, PARAM_AT, PARAM, EVEN), scales_pointer(entry, PARAM_AT + 1)
    first, first_scales = pointer(entry, FIRST_AT, FIRST, EVEN), scales_pointer(entry, FIRST_AT + 1)
    second, second_scales = pointer(entry, SECOND_AT, SECOND, EVEN), scales_pointer(entry, SECOND_AT + 1)
    grad, grad_scales = pointer(entry, GRAD_AT, GRAD, EVEN), scales_pointer(entry, GRAD_AT + 1)
    num_blocks = tl.load(entry + BLOCKS_AT).to(tl.int32)
    rows, columns, block_columns = (
        tl.load(entry + ROWS_AT),
        tl.load(entry + COLUMNS_AT),
        tl.load(entry + BLOCK_COLUMNS_AT),
    )

    param_whole = _whole_scale(found, PARAM, PARAM_MODE)
    first_whole = _whole_scale(found + 1, FIRST, FIRST_MODE)
    second_whole = _whole_scale(found + 2, SECOND, SECOND_MODE)
    if SPLIT:
        residual = pointer(entry, RESIDUAL_AT, "residual", EVEN)
        if KIND == "adam":
            before = tl.load(scales_pointer(entry, RESIDUAL_AT + 1))
            bound = before * _number(numbers, GROWTH) + _number(numbers, INCREASE)
            param_whole = scale_of(bound.to(tl.int32, bitcast=True), "e4m3")
        else:
            param_whole = scale_of(tl.load(found), "e4m3")
        tl.store(found + USED, param_whole.to(tl.int32, bitcast=True), mask=chunk == 0)
    if COPY != "none":
        copy = pointer(entry, COPY_AT, COPY, EVEN)
        copy_scale = tl.load(scales_pointer(entry, COPY_AT + 1))
        copy_factor = tl.div_rn(1.0, copy_scale)
        tl.store(found + USED, copy_scale.to(tl.int32, bitcast=True), mask=chunk == 0)

    param_found = tl.zeros((GROUP,), tl.int32)
    first_found = tl.zeros((GROUP,), tl.int32)
    second_found = tl.zeros((GROUP,), tl.int32)
    copy_found = tl.zeros((GROUP,), tl.int32)
    start = chunk * TILES * GROUP
    for index in range(tl.minimum(TILES, tl.cdiv(num_blocks - start, GROUP))):
        blocks = start + index * GROUP + tl.arange(0, GROUP)
        exists = blocks < num_blocks
        offsets, inside = places(blocks, exists, rows, columns, block_columns, EVEN, BLOCK)
        g = read(grad, grad_scales, blocks, exists, offsets, inside, GRAD, GRAD_MODE, UNITS)
        if SPLIT:
            w = read_split(param, residual, param_scales, offsets, inside)
        else:
            w = read(param, param_scales, blocks, exists, offsets, inside, PARAM, PARAM_MODE, UNITS)
        m = read(first, first_scales, blocks, exists, offsets, inside, FIRST, FIRST_MODE, UNITS)
        v = m
        if SECOND != "none":
            v = read(second, second_scales, blocks, exists, offsets, inside, SECOND, SECOND_MODE, UNITS)
        w, m, v = _updated(w, g, m, v, numbers, keep, weight_decay, beta1, rest1, beta2, rest2, KIND, DECAY, SPLIT)

        largest_w = largest_of(w, exists, inside, EVEN)
        largest_m = largest_of(m, exists, inside, EVEN)
        largest_v = largest_m
        if SECOND != "none":
            largest_v = largest_of(v, exists, inside, EVEN, False)
        param_found = tl.maximum(param_found, largest_w)
        first_found = tl.maximum(first_found, largest_m)
        second_found = tl.maximum(second_found, largest_v)
        if not MEASURES:
            word = tl.zeros((1, 1), tl.uint32)
            if PARAM_NOISY or (SHARED and SECOND_NOISY):
                word = _words(numbers, offsets, PARAM_KEYS)
            if SPLIT:
                write_split(w, param_whole, word, param, residual, offsets, inside, PARAM_NOISY)
            else:
                code, scales = write(w, largest_w, param_whole, word, param, param_scales,
                                     blocks, exists, offsets, inside,
                                     PARAM, PARAM_MODE, PARAM_NOISY, PARAM_LOWER_HALF, CONVERTS)  # fmt: skip
            if COPY != "none":
                real = decoded(code, PARAM, UNITS) * scales[:, None]
                copy_found = tl.maximum(copy_found, largest_of(real, exists, inside, EVEN))
                copied = fitting_code(real * copy_factor, word, COPY, False, False, CONVERTS)
                tl.store(copy + offsets, narrow(copied, COPY), mask=inside)
            if SECOND != "none":
                if SECOND_NOISY and not SHARED:
                    word = _words(numbers, offsets, SECOND_KEYS)
                write(v, largest_v, second_whole, word, second, second_scales, blocks, exists, offsets, inside,
                      SECOND, SECOND_MODE, SECOND_NOISY, SECOND_LOWER_HALF, CONVERTS, False)  # fmt: skip
            if FIRST_NOISY:
                word = _words(numbers, offsets, FIRST_KEYS)
            write(m, largest_m, first_whole, word, first, first_scales, blocks, exists, offsets, inside,
                  FIRST, FIRST_MODE, FIRST_NOISY, FIRST_LOWER_HALF, CONVERTS)  # fmt: skip

    if SPLIT or PARAM_MODE != "blocks":
        tl.atomic_max(found, tl.max(param_found, axis=0))
    if FIRST_MODE != "blocks":
        tl.atomic_max(found + 1, tl.max(first_found, axis=0))
    if SECOND != "none" and SECOND_MODE != "blocks":
        tl.atomic_max(found + 2, tl.max(second_found, axis=0))
    if COPY != "none" and not MEASURES:
        tl.atomic_max(found + COPY_FOUND, tl.max(copy_found, axis=0))


# --- what needed all of a tensor --------------------------------------------------------------------------------------


@triton.jit
def _clear(payload, flagged, num_blocks, start, rows, columns, block_columns, EVEN: tl.constexpr, BLOCK: tl.constexpr,
           GROUP: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Zeros in a chunk of a tensor that is flagged."""
    if flagged:
        for index in range(tl.minimum(TILES, tl.cdiv(num_blocks - start, GROUP))):
            blocks = start + index * GROUP + tl.arange(0, GROUP)
            offsets, inside = places(blocks, blocks < num_blocks, rows, columns, block_columns, EVEN, BLOCK)
            tl.store(payload + offsets, 0, mask=inside)


@triton.jit
def _settle(
    entry, found, chunk, num_blocks, start, rows, columns, block_columns, FIELD: tl.constexpr, FORMAT: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Scale of a tensor of one scale, and zeros under a flag."""
    largest = tl.load(found + FIELD // 2)
    tl.store(scales_pointer(entry, FIELD + 1), scale_of(largest, FORMAT), mask=chunk == 0)
    _clear(pointer(entry, FIELD, FORMAT, EVEN), largest >= INFINITY, num_blocks, start, rows, columns, block_columns,
           EVEN, BLOCK, GROUP, TILES)  # fmt: skip


@triton.jit
def settle_kernel(
    addresses, found, programs, bad,
    PARAM: tl.constexpr, PARAM_MODE: tl.constexpr, FIRST: tl.constexpr, FIRST_MODE: tl.constexpr,
    SECOND: tl.constexpr, SECOND_MODE: tl.constexpr, COPY: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
    UNITS: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """Scales and flags of a row's tensors of one scale; its copy again, where the scale it was written with is not
    that of its amax."""
    if tl.load(bad) != 0:
        return
    row = tl.load(programs + 2 * tl.program_id(0))
    chunk = tl.load(programs + 2 * tl.program_id(0) + 1)
    entry = addresses + row * ADDRESSES
    found = found + row * FOUND
    num_blocks = tl.load(entry + BLOCKS_AT).to(tl.int32)
    rows, columns, block_columns = (
        tl.load(entry + ROWS_AT),
        tl.load(entry + COLUMNS_AT),
        tl.load(entry + BLOCK_COLUMNS_AT),
    )
    start = chunk * TILES * GROUP
    if SPLIT:
        _settle_split(entry, found, chunk, num_blocks, start, rows, columns, block_columns, EVEN, BLOCK, GROUP, TILES)
    elif PARAM_MODE != "blocks":
        _settle(entry, found, chunk, num_blocks, start, rows, columns, block_columns, PARAM_AT, PARAM,
                EVEN, BLOCK, GROUP, TILES)  # fmt: skip
    if FIRST_MODE != "blocks":
        _settle(entry, found, chunk, num_blocks, start, rows, columns, block_columns, FIRST_AT, FIRST,
                EVEN, BLOCK, GROUP, TILES)  # fmt: skip
    if SECOND != "none" and SECOND_MODE != "blocks":
        _settle(entry, found, chunk, num_blocks, start, rows, columns, block_columns, SECOND_AT, SECOND,
                EVEN, BLOCK, GROUP, TILES)  # fmt: skip
    if COPY != "none":
        _settle_copy(entry, found, chunk, num_blocks, start, rows, columns, block_columns, PARAM, PARAM_MODE, COPY,
                     EVEN, BLOCK, GROUP, TILES, UNITS, CONVERTS)  # fmt: skip


@triton.jit
def _settle_split(
    entry, found, chunk, num_blocks, start, rows, columns, block_columns,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Scale and amax of a master in two parts. The first pass kept its scale in ``found``: its bound came from the
    amax that is overwritten here."""
    largest = tl.load(found)
    scale = tl.where(largest >= INFINITY, INFINITY, tl.load(found + USED))
    tl.store(scales_pointer(entry, PARAM_AT + 1), scale.to(tl.float32, bitcast=True), mask=chunk == 0)
    tl.store(scales_pointer(entry, RESIDUAL_AT + 1), largest.to(tl.float32, bitcast=True), mask=chunk == 0)
    flagged = scale >= INFINITY
    _clear(pointer(entry, PARAM_AT, "e4m3", EVEN), flagged, num_blocks, start, rows, columns, block_columns,
           EVEN, BLOCK, GROUP, TILES)  # fmt: skip
    _clear(pointer(entry, RESIDUAL_AT, "residual", EVEN), flagged, num_blocks, start, rows, columns, block_columns,
           EVEN, BLOCK, GROUP, TILES)  # fmt: skip


@triton.jit
def _settle_copy(
    entry, found, chunk, num_blocks, start, rows, columns, block_columns,
    PARAM: tl.constexpr, PARAM_MODE: tl.constexpr, COPY: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
    UNITS: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """The copy of a parameter, whose own scale this launch may be about to write: it is taken from ``found``."""
    largest = tl.load(found + COPY_FOUND)
    scale = 1.0
    if PARAM_MODE != "blocks":
        whole = tl.load(found)
        largest = tl.where(whole >= INFINITY, whole, largest)
        scale = scale_of(whole, PARAM)
    scale_inv = scale_of(largest, COPY)
    tl.store(scales_pointer(entry, COPY_AT + 1), scale_inv, mask=chunk == 0)
    copy = pointer(entry, COPY_AT, COPY, EVEN)
    if largest >= INFINITY:
        _clear(copy, True, num_blocks, start, rows, columns, block_columns, EVEN, BLOCK, GROUP, TILES)
    elif scale_inv.to(tl.int32, bitcast=True) != tl.load(found + USED):
        param, param_scales = pointer(entry, PARAM_AT, PARAM, EVEN), scales_pointer(entry, PARAM_AT + 1)
        for index in range(tl.minimum(TILES, tl.cdiv(num_blocks - start, GROUP))):
            blocks = start + index * GROUP + tl.arange(0, GROUP)
            exists = blocks < num_blocks
            offsets, inside = places(blocks, exists, rows, columns, block_columns, EVEN, BLOCK)
            real = decoded(tl.load(param + offsets, mask=inside, other=0), PARAM, UNITS)
            if PARAM_MODE == "blocks":
                real = real * tl.load(param_scales + blocks, mask=exists, other=1.0)[:, None]
            else:
                real = real * scale
            copied = fitting_code(real * factor_of(scale_inv), blocks, COPY, False, False, CONVERTS)
            tl.store(copy + offsets, narrow(copied, COPY), mask=inside)
