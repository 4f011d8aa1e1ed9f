"""CUDA and ROCm twin of ``reference.scaled_matmul``: FP8 tensor cores where the device has them, else an emulation.

FP8 units take E4M3 x E4M3 and E5M2 with E4M3, one scale a tensor, the first operand row-major and the second
column-major, inner dims in multiples of 16. "nt", the forward product, has that layout already; "nn" and "tn" transpose
one or two operands, one byte read and one written an element. Ragged dims are padded with zeros, which add nothing.

Fast accumulation keeps partial sums in the tensor core's own precision (about 14 bits on Hopper). It is on for the
forward product alone: gradients are sums of small terms that it would lose.

Everything else is ordinary products. An FP8 value times a power of two is exact in BF16, so a BF16 product with FP32
accumulation is that of the real values; a scale that is no power of two rounds each operand once more, by at most 2^-9
of its value.

No figure of this file is measured yet: ``benchmarks/gpu.py`` does that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msamp_like.formats import E4M3, FP8_DTYPES
from msamp_like.kernels.fp8_units import has_fp8_units
from msamp_like.kernels.reference import Operand, transposed
from msamp_like.kernels.triton_casts import dequantize

ALIGNMENT = 16
"""The FP8 units' rows are loaded 16 bytes at a time."""

_PRODUCT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scaled_matmul(a: Operand, b: Operand, layout: str, dtype: torch.dtype) -> Tensor:
    """See :func:`.reference.scaled_matmul`; the order of the sum is the device's, so last bits may differ."""
    if fits_fp8_units(a, b, dtype) and has_fp8_units(a.payload.device):
        return multiply_fp8(a, b, layout, dtype)
    return emulate(a, b, layout, dtype)


def fits_fp8_units(a: Operand, b: Operand, dtype: torch.dtype) -> bool:
    """Whether FP8 units define this product: one scale each, at most one E5M2, something to multiply."""
    dtypes = {a.payload.dtype, b.payload.dtype}
    return (
        dtypes <= set(FP8_DTYPES)
        and E4M3.dtype in dtypes
        and a.scale_inv.numel() == b.scale_inv.numel() == 1
        and dtype in _PRODUCT_DTYPES
        and min(a.payload.numel(), b.payload.numel()) > 0
    )


def multiply_fp8(a: Operand, b: Operand, layout: str, dtype: torch.dtype) -> Tensor:
    """The product on FP8 units, FP32 accumulation, both scales applied before the one rounding to ``dtype``."""
    left = transposed(a.payload, layout[0])
    right = transposed(b.payload, layout[1]).t()  # row-major here is column-major for the product
    rows, columns = left.shape[0], right.shape[0]
    forward = layout == "nt" and a.payload.dtype == b.payload.dtype == E4M3.dtype
    product = torch._scaled_mm(
        _aligned(left, pad_rows=False),
        _aligned(right, pad_rows=True).t(),
        scale_a=a.scale_inv.reshape(()),
        scale_b=b.scale_inv.reshape(()),
        out_dtype=dtype,
        use_fast_accum=forward,
    )
    return product if product.shape[1] == columns else product[:rows, :columns].contiguous()


def _aligned(matrix: Tensor, *, pad_rows: bool) -> Tensor:
    """``matrix`` row-major, columns (and rows) padded with zeros to multiples of 16; no copy where it already is."""
    codes = matrix.view(torch.uint8)  # padding is not defined for the FP8 dtypes; code 0 is the number 0
    rows, columns = codes.shape
    missing = (-columns % ALIGNMENT, -rows % ALIGNMENT if pad_rows else 0)
    if any(missing):
        codes = torch.nn.functional.pad(codes, (0, missing[0], 0, missing[1]))
    return codes.contiguous().view(matrix.dtype)


def emulate(a: Operand, b: Operand, layout: str, dtype: torch.dtype) -> Tensor:
    """The product by ordinary units: in BF16 where both payloads are exact in it, else in FP32."""
    exact = {a.payload.dtype, b.payload.dtype} <= {*FP8_DTYPES, torch.bfloat16}
    # torch widens a BF16 product to FP32 on CUDA only; CPU tensors come here in tests.
    inner = torch.bfloat16 if exact and (dtype == torch.bfloat16 or a.payload.is_cuda) else torch.float32
    left, right = _read(a, b, inner)
    left, right = transposed(left, layout[0]), transposed(right, layout[1])
    with torch.autocast(left.device.type, enabled=False):  # it would round FP32 operands, and narrow BF16 ones to FP16
        if inner in (dtype, torch.float32):
            return (left @ right).to(dtype)
        return torch.mm(left, right, out_dtype=torch.float32).to(dtype)


def _read(a: Operand, b: Operand, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors whose product is that of the real values.

    BF16 operands (level O0) are read as they are, and both scales go into the smaller one: the yardstick pays for one
    small pass, not for two large ones.
    """
    if a.payload.dtype == b.payload.dtype == dtype and a.scale_inv.numel() == b.scale_inv.numel() == 1:
        scales = (a.scale_inv * b.scale_inv).reshape(())
        if a.payload.numel() < b.payload.numel():
            return a.payload * scales, b.payload
        return a.payload, b.payload * scales
    return dequantize(a.payload, a.scale_inv, a.block, dtype), dequantize(b.payload, b.scale_inv, b.block, dtype)
