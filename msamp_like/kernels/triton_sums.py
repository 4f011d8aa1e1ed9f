"""Triton twin of :func:`msamp_like.kernels.reference_fused.accumulate_`, for CUDA and ROCm.

The first launch adds; the second writes the scale, and clears the payload where a sum was not finite: otherwise it
reads four bytes a program. The speed is not measured yet.
"""

# The compiler reads these sources: annotations stay objects, and a kernel argument has none.
# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl

from msamp_like.formats import BF16, FORMATS, FP32, format_of
from msamp_like.kernels import reference_fused
from msamp_like.kernels.reference import Operand
from msamp_like.kernels.triton_codec import INFINITY, decode, encode, magnitude_bits, scale_inv_of
from msamp_like.kernels.triton_tiles import TILE_ELEMENTS, launch, raw

_KNOWN_DTYPES = tuple(format.dtype for format in FORMATS.values())


@triton.jit
def _accumulate_kernel(
    total, total_scale_inv, addend, addend_scale_inv, amax, numel,
    FORMAT: tl.constexpr, ADDEND_FORMAT: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = offsets < numel
    held = decode(tl.load(total + offsets, mask=inside, other=0), FORMAT) * tl.load(total_scale_inv)
    added = decode(tl.load(addend + offsets, mask=inside, other=0), ADDEND_FORMAT) * tl.load(addend_scale_inv)
    value = held + added
    tl.store(total + offsets, encode(value, 0, FORMAT, False), mask=inside)
    tl.atomic_max(amax, tl.max(magnitude_bits(value), axis=0))


@triton.jit
def _settle_kernel(total, total_scale_inv, amax, numel, FORMAT: tl.constexpr, ELEMENTS: tl.constexpr):
    largest = tl.load(amax)
    if tl.program_id(0) == 0:
        tl.store(total_scale_inv, scale_inv_of(largest, FORMAT, 0, True))
    if largest >= INFINITY:
        offsets = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        tl.store(total + offsets, tl.zeros((ELEMENTS,), tl.int32), mask=offsets < numel)


def accumulate_(total: Operand, addend: Operand) -> None:
    """See :func:`.reference_fused.accumulate_`."""
    payload = total.payload
    unscaled = payload.dtype in (BF16.dtype, FP32.dtype) and payload.is_contiguous() and payload.numel() > 0
    single = total.scale_inv.numel() == addend.scale_inv.numel() == 1
    if not (unscaled and single) or addend.payload.dtype not in _KNOWN_DTYPES:
        reference_fused.accumulate_(total, addend)
        return
    numel, name = payload.numel(), format_of(payload.dtype).name
    amax = torch.zeros(1, dtype=torch.int32, device=payload.device)
    programs = triton.cdiv(numel, TILE_ELEMENTS)
    launch(
        _accumulate_kernel, payload, programs, raw(payload), total.scale_inv, raw(addend.payload), addend.scale_inv,
        amax, numel, FORMAT=name, ADDEND_FORMAT=format_of(addend.payload.dtype).name, ELEMENTS=TILE_ELEMENTS,
        enable_fp_fusion=False,
    )  # fmt: skip
    launch(
        _settle_kernel, payload, programs, raw(payload), total.scale_inv, amax, numel, FORMAT=name,
        ELEMENTS=TILE_ELEMENTS,
    )  # fmt: skip
