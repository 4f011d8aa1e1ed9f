"""Triton twin of the scales and casts of :mod:`msamp_like.kernels.reference`, for CUDA and ROCm.

Same signatures, same bytes. Bytes moved per BF16 element, FP8 out: :func:`quantize` and :func:`quantize_amax` 3,
:func:`quantize_current` 3 with blocks (a block that fits a tile is read once) and 5 with one scale a tensor, where the
second read comes from L2 if the tensor fits there; :func:`dequantize` 3. Nothing here waits for the device.

The speed is not measured yet: ``benchmarks/gpu.py`` does that.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from msamp_like.formats import FORMATS, Block, Format, format_of, grid_shape
from msamp_like.kernels import reference
from msamp_like.kernels.reference import Noise, Operand
from msamp_like.kernels.triton_codec import (
    MAGNITUDE,
    convert,
    decode,
    encode,
    magnitude_bits,
    scale_down,
    scale_inv_of,
)
from msamp_like.kernels.triton_tiles import (
    TILE_ELEMENTS,
    block_offsets,
    keys,
    launch,
    num_blocks,
    random_bits,
    raw,
    tile,
)

_KNOWN_DTYPES = tuple(format.dtype for format in FORMATS.values())


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _values(x, x_scale_inv, offsets, inside, X_FORMAT: tl.constexpr, SCALED: tl.constexpr):
    """FP32 values to cast; SCALED: ``x`` is itself stored, with one scale."""
    values = decode(tl.load(x + offsets, mask=inside, other=0), X_FORMAT)
    if SCALED:
        values = values * tl.load(x_scale_inv)
    return values


@triton.jit
def _store_amax(amax, largest, blocks, exists, SINGLE: tl.constexpr):
    """Bits of each block's amax; with one scale for all, programs meet in one atomic maximum."""
    if SINGLE:
        tl.atomic_max(amax, tl.max(largest, axis=0))
    else:
        tl.store(amax + blocks, largest, mask=exists)


@triton.jit
def _amax_kernel(
    x, x_scale_inv, amax, rows, columns, block_rows, block_columns,
    X_FORMAT: tl.constexpr, SCALED: tl.constexpr, SINGLE: tl.constexpr,
    PADDED: tl.constexpr, ELEMENTS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    exists = blocks < num_blocks(rows, columns, block_rows, block_columns)
    largest = tl.zeros((GROUP,), tl.int32)
    for index in range(TILES):
        elements = index * ELEMENTS + tl.arange(0, ELEMENTS)
        offsets, inside = block_offsets(blocks, elements, rows, columns, block_rows, block_columns, PADDED)
        value = _values(x, x_scale_inv, offsets, inside, X_FORMAT, SCALED)
        largest = tl.maximum(largest, tl.max(magnitude_bits(value), axis=1))
    _store_amax(amax, largest, blocks, exists, SINGLE)


@triton.jit(do_not_specialize=["key0", "key1"])
def _quantize_kernel(
    x, scale_inv, payload, amax, rows, columns, block_rows, block_columns, key0, key1,
    X_FORMAT: tl.constexpr, FORMAT: tl.constexpr, NOISY: tl.constexpr, LOWER_HALF: tl.constexpr,
    WITH_AMAX: tl.constexpr, SINGLE: tl.constexpr,
    PADDED: tl.constexpr, ELEMENTS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    exists = blocks < num_blocks(rows, columns, block_rows, block_columns)
    scales = tl.load(scale_inv + (blocks * 0 if SINGLE else blocks), mask=exists, other=1.0)
    largest = tl.zeros((GROUP,), tl.int32)
    for index in range(TILES):
        elements = index * ELEMENTS + tl.arange(0, ELEMENTS)
        offsets, inside = block_offsets(blocks, elements, rows, columns, block_rows, block_columns, PADDED)
        value = decode(tl.load(x + offsets, mask=inside, other=0), X_FORMAT)
        if WITH_AMAX:
            largest = tl.maximum(largest, tl.max(magnitude_bits(value), axis=1))
        random = 0
        if NOISY:
            random = random_bits(offsets, key0, key1, LOWER_HALF)
        tl.store(payload + offsets, encode(scale_down(value, scales), random, FORMAT, NOISY), mask=inside)
    if WITH_AMAX:
        _store_amax(amax, largest, blocks, exists, SINGLE)


@triton.jit
def _quantize_current_kernel(
    x, x_scale_inv, payload, scale_inv, amax, rows, columns, block_rows, block_columns,
    X_FORMAT: tl.constexpr, SCALED: tl.constexpr,
    FORMAT: tl.constexpr, MARGIN: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    PADDED: tl.constexpr, ELEMENTS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """amax, scale and payload of blocks that no two programs share; a block of one tile stays in registers."""
    blocks = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    exists = blocks < num_blocks(rows, columns, block_rows, block_columns)
    if TILES == 1:
        elements = tl.arange(0, ELEMENTS)
        offsets, inside = block_offsets(blocks, elements, rows, columns, block_rows, block_columns, PADDED)
        value = _values(x, x_scale_inv, offsets, inside, X_FORMAT, SCALED)
        largest = tl.max(magnitude_bits(value), axis=1)
    else:
        largest = tl.zeros((GROUP,), tl.int32)
        for index in range(TILES):
            elements = index * ELEMENTS + tl.arange(0, ELEMENTS)
            offsets, inside = block_offsets(blocks, elements, rows, columns, block_rows, block_columns, PADDED)
            value = _values(x, x_scale_inv, offsets, inside, X_FORMAT, SCALED)
            largest = tl.maximum(largest, tl.max(magnitude_bits(value), axis=1))
    scales = scale_inv_of(largest, FORMAT, MARGIN, POWER_OF_TWO)
    tl.store(amax + blocks, largest, mask=exists)
    tl.store(scale_inv + blocks, scales, mask=exists)
    if TILES == 1:
        tl.store(payload + offsets, encode(scale_down(value, scales), 0, FORMAT, False), mask=inside)
    else:
        for index in range(TILES):
            elements = index * ELEMENTS + tl.arange(0, ELEMENTS)
            offsets, inside = block_offsets(blocks, elements, rows, columns, block_rows, block_columns, PADDED)
            value = _values(x, x_scale_inv, offsets, inside, X_FORMAT, SCALED)
            tl.store(payload + offsets, encode(scale_down(value, scales), 0, FORMAT, False), mask=inside)


@triton.jit
def _quantize_from_amax_kernel(
    x, x_scale_inv, payload, scale_inv, amax, rows, columns, block_rows, block_columns,
    X_FORMAT: tl.constexpr, SCALED: tl.constexpr,
    FORMAT: tl.constexpr, MARGIN: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    PADDED: tl.constexpr, ELEMENTS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Second pass of one scale a tensor: every program finds the same scale from the one amax, the first stores it."""
    blocks = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    elements = tl.arange(0, ELEMENTS)
    offsets, inside = block_offsets(blocks, elements, rows, columns, block_rows, block_columns, PADDED)
    value = _values(x, x_scale_inv, offsets, inside, X_FORMAT, SCALED)
    scales = scale_inv_of(tl.load(amax + blocks * 0), FORMAT, MARGIN, POWER_OF_TWO)
    tl.store(scale_inv + blocks, scales, mask=blocks == 0)
    tl.store(payload + offsets, encode(scale_down(value, scales), 0, FORMAT, False), mask=inside)


@triton.jit
def _scale_inv_kernel(
    amax, scale_inv, numel,
    FORMAT: tl.constexpr, MARGIN: tl.constexpr, POWER_OF_TWO: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = offsets < numel
    largest = tl.load(amax + offsets, mask=inside, other=0) & MAGNITUDE
    tl.store(scale_inv + offsets, scale_inv_of(largest, FORMAT, MARGIN, POWER_OF_TWO), mask=inside)


@triton.jit
def _dequantize_kernel(
    payload, scale_inv, x, rows, columns, block_rows, block_columns,
    FORMAT: tl.constexpr, X_FORMAT: tl.constexpr, SINGLE: tl.constexpr,
    PADDED: tl.constexpr, ELEMENTS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    exists = blocks < num_blocks(rows, columns, block_rows, block_columns)
    scales = tl.load(scale_inv + (blocks * 0 if SINGLE else blocks), mask=exists, other=1.0)
    for index in range(TILES):
        elements = index * ELEMENTS + tl.arange(0, ELEMENTS)
        offsets, inside = block_offsets(blocks, elements, rows, columns, block_rows, block_columns, PADDED)
        value = decode(tl.load(payload + offsets, mask=inside, other=0), FORMAT) * scales[:, None]
        tl.store(x + offsets, convert(value, X_FORMAT), mask=inside)


# --- launches ---------------------------------------------------------------------------------------------------------


def _readable(x: Tensor) -> Tensor:
    """``x`` contiguous, in a dtype that :func:`.triton_codec.decode` knows."""
    return (x if x.dtype in _KNOWN_DTYPES else x.float()).contiguous()


def amax(x: Tensor, block: Block) -> Tensor:
    """See :func:`.reference.amax`."""
    return _amax(x, block, None)


def _amax(x: Tensor, block: Block, x_scale_inv: Tensor | None) -> Tensor:
    x = _readable(x)
    tiling = tile(x.shape, block)
    # Zeros, because programs that share a scale meet in an atomic maximum, and because an empty tensor has amax 0.
    largest = torch.zeros(grid_shape(x.shape, block), dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        launch(
            _amax_kernel, x, tiling.num_programs, raw(x), x_scale_inv, raw(largest), *tiling.matrix,
            X_FORMAT=format_of(x.dtype).name, SCALED=x_scale_inv is not None, SINGLE=tiling.single,
            **tiling.options(),
        )  # fmt: skip
    return largest


def scale_inv_from_amax(amax: Tensor, format: Format, margin: int = 0, power_of_two: bool = True) -> Tensor:
    """See :func:`.reference.scale_inv_from_amax`; one launch."""
    largest = amax.float().contiguous()
    scale_inv = torch.empty_like(largest)
    if largest.numel() > 0:
        launch(
            _scale_inv_kernel, largest, triton.cdiv(largest.numel(), TILE_ELEMENTS), raw(largest), scale_inv,
            largest.numel(), FORMAT=format.name, MARGIN=margin, POWER_OF_TWO=power_of_two, ELEMENTS=TILE_ELEMENTS,
        )  # fmt: skip
    return scale_inv


def quantize(x: Tensor, scale_inv: Tensor, format: Format, block: Block, noise: Noise | None = None) -> Tensor:
    """See :func:`.reference.quantize`."""
    payload = torch.empty(x.shape, dtype=format.dtype, device=x.device)
    _quantize_into(payload, x, scale_inv, block, noise=noise)
    return payload


def quantize_amax(x: Tensor, scale_inv: Tensor, format: Format, block: Block) -> tuple[Tensor, Tensor]:
    """See :func:`.reference.quantize_amax`; reads ``x`` once."""
    payload = torch.empty(x.shape, dtype=format.dtype, device=x.device)
    largest = torch.zeros(grid_shape(x.shape, block), dtype=torch.float32, device=x.device)
    _quantize_into(payload, x, scale_inv, block, largest=largest)
    return payload, largest


def quantize_current(
    x: Tensor, format: Format, block: Block, margin: int = 0, power_of_two: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`.reference.quantize_current`; one launch with blocks, two with one scale a tensor."""
    payload = torch.empty(x.shape, dtype=format.dtype, device=x.device)
    scale_inv = torch.ones(grid_shape(x.shape, block), dtype=torch.float32, device=x.device)
    largest = _quantize_current_into(payload, scale_inv, x, block, margin, power_of_two)
    return payload, scale_inv, largest


def requantize(
    source: Operand, format: Format, block: Block, margin: int = 0, power_of_two: bool = True
) -> tuple[Tensor, Tensor]:
    """See :func:`.reference_fused.requantize`; its FP32 values stay in registers where they have one scale."""
    x, x_scale_inv = source.payload, source.scale_inv
    if x_scale_inv.numel() > 1:
        values = dequantize(x, x_scale_inv, source.block, torch.float32)
        return quantize_current(values, format, block, margin, power_of_two)[:2]
    payload = torch.empty(x.shape, dtype=format.dtype, device=x.device)
    scale_inv = torch.ones(grid_shape(x.shape, block), dtype=torch.float32, device=x.device)
    _quantize_current_into(payload, scale_inv, x, block, margin, power_of_two, x_scale_inv)
    return payload, scale_inv


def store_(target: Operand, value: Tensor) -> None:
    """See :func:`.reference.store_`; ``target`` is contiguous."""
    if target.noise is None:
        _quantize_current_into(target.payload, target.scale_inv, value, target.block, 0, True)
        return
    scale_inv = scale_inv_from_amax(amax(value, target.block), format_of(target.payload.dtype))
    _quantize_into(target.payload, value, scale_inv, target.block, noise=target.noise)
    target.scale_inv.copy_(scale_inv)


def _quantize_into(
    payload: Tensor,
    x: Tensor,
    scale_inv: Tensor,
    block: Block,
    noise: Noise | None = None,
    largest: Tensor | None = None,
) -> None:
    x, format, tiling = _readable(x), format_of(payload.dtype), tile(x.shape, block)
    if x.numel() > 0:
        launch(
            _quantize_kernel, x, tiling.num_programs, raw(x), scale_inv.contiguous(), raw(payload),
            None if largest is None else raw(largest), *tiling.matrix, *keys(noise),
            X_FORMAT=format_of(x.dtype).name, FORMAT=format.name, NOISY=noise is not None and format.name != "fp32",
            LOWER_HALF=noise is not None and bool(noise.role & 2), WITH_AMAX=largest is not None,
            SINGLE=tiling.single, **tiling.options(),
        )  # fmt: skip


def _quantize_current_into(
    payload: Tensor,
    scale_inv: Tensor,
    x: Tensor,
    block: Block,
    margin: int,
    power_of_two: bool,
    x_scale_inv: Tensor | None = None,
) -> Tensor:
    """Writes payload and scales; returns amax."""
    x, tiling = _readable(x), tile(x.shape, block)
    constants: dict[str, Any] = {"X_FORMAT": format_of(x.dtype).name, "FORMAT": format_of(payload.dtype).name}
    constants |= {"MARGIN": margin, "POWER_OF_TWO": power_of_two, "SCALED": x_scale_inv is not None}
    constants |= tiling.options()
    if tiling.single or x.numel() == 0:
        largest = _amax(x, block, x_scale_inv)
        kernel = _quantize_from_amax_kernel
    else:
        largest = torch.empty_like(scale_inv)
        kernel = _quantize_current_kernel
    if x.numel() > 0:
        arguments = raw(x), x_scale_inv, raw(payload), scale_inv, raw(largest), *tiling.matrix
        launch(kernel, x, tiling.num_programs, *arguments, **constants)
    return largest


def dequantize(payload: Tensor, scale_inv: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """See :func:`.reference.dequantize`; to FP32, BF16 or FP16, the reference itself for any other dtype."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return reference.dequantize(payload, scale_inv, block, dtype)
    payload = payload.contiguous()
    x = torch.empty(payload.shape, dtype=dtype, device=payload.device)
    tiling = tile(x.shape, block)
    if x.numel() > 0:
        launch(
            _dequantize_kernel, x, tiling.num_programs, raw(payload), scale_inv.contiguous(), raw(x), *tiling.matrix,
            FORMAT=format_of(payload.dtype).name, X_FORMAT=format_of(dtype).name, SINGLE=tiling.single,
            **tiling.options(),
        )  # fmt: skip
    return x
