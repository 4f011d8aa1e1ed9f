"""CUDA and ROCm twin of ``reference.scaled_matmul``: FP8 units where the device has them, else an emulation.

Which product runs, by the scales of the two operands seen with the dim that the product contracts over last:

    one a tensor, both            any device with FP8 units            torch's product
    one a row, both               NVIDIA from 9.0, AMD; BF16 result    torch's product
    1x128 with 1x128 or 128x128   NVIDIA 9.x, CUDA from 12.9           torch's product
    1x32, both                    NVIDIA from 10.0                     torch's product, scales in E8M0
    any other in FP8              NVIDIA from 8.9                      our Triton product, promoted to FP32 every 128
    anything else                 any device                           ordinary units, operands decoded first

The last is named in the log where the device has FP8 units that the operands could not use. FP8 units take the first
operand row-major and the second column-major. "nt", the forward product and those of operands that were quantized
transposed, has that layout already; "nn" and "tn" transpose one or two operands, one byte read and one written an
element. Ragged dims are padded with zeros, which add nothing.

Fast accumulation keeps partial sums in the tensor core's own precision (about 14 bits on Hopper). It is on for the
forward product of one scale a tensor alone: gradients are sums of small terms that it would lose.

The emulation: an FP8 value times a power of two is exact in BF16, so a BF16 product with FP32 accumulation is that of
the real values; a scale that is no power of two rounds each operand once more, by at most 2^-9 of its value.

No figure of this file is measured yet: ``benchmarks/gpu.py`` does that.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from msamp_like.formats import E4M3, FNUZ, FP8_DTYPES
from msamp_like.kernels import torch_products, triton_products
from msamp_like.kernels.fp8_units import Units, fp8_units
from msamp_like.kernels.reference import Operand, transposed
from msamp_like.kernels.torch_products import PRODUCT_DTYPES, aligned, contracted_last, granularity
from msamp_like.kernels.triton_casts import dequantize

logger = logging.getLogger(__name__)


def scaled_matmul(a: Operand, b: Operand, layout: str, dtype: torch.dtype) -> Tensor:
    """See :func:`.reference.scaled_matmul`; the order of the sum is the device's, so last bits may differ."""
    name, reason = choose(a, b, layout, dtype, fp8_units(a.payload.device))
    if reason:
        _name_fallback(reason)
    if name == "tensor":
        return multiply_fp8(a, b, layout, dtype)
    if name == "emulation":
        return emulate(a, b, layout, dtype)
    left, right = contracted_last(a, layout[0] == "t"), contracted_last(b, layout[1] == "n")
    if name == "triton":
        return triton_products.multiply(left, right, dtype)
    return torch_products.MULTIPLY[name](left, right, dtype)


def choose(a: Operand, b: Operand, layout: str, dtype: torch.dtype, units: Units) -> tuple[str, str]:
    """(the product that takes these operands: "tensor", "rows", "tiles", "mx", "triton" or "emulation"; why not FP8
    units, where the device has them and the operands are FP8, else "")."""
    dtypes = {a.payload.dtype, b.payload.dtype}
    kind = "fnuz" if units.e4m3 in {format.dtype for format in FNUZ.values()} else "OCP"
    known = {f.dtype for pair in FNUZ.items() for f in (pair[1:] if kind == "fnuz" else pair[:1])}
    if units.e4m3 is None or not dtypes <= set(FP8_DTYPES) or min(a.payload.numel(), b.payload.numel()) == 0:
        return "emulation", ""
    if not dtypes <= known:
        return "emulation", f"this device multiplies the {kind} FP8 formats, got {_names(dtypes)}; see Policy.fnuz()"
    if units.e4m3 not in dtypes or dtype not in PRODUCT_DTYPES:
        return "emulation", f"FP8 units take at most one E5M2 and return 16 or 32 bits, got {_names(dtypes)} to {dtype}"
    left, right = contracted_last(a, layout[0] == "t"), contracted_last(b, layout[1] == "n")
    scales = granularity(left), granularity(right)
    if scales == ("tensor", "tensor"):
        return "tensor", ""
    rows = set(scales) <= {"tensor", "row"} and dtype == torch.bfloat16 and right.payload.dtype == units.e4m3
    if rows and units.rows:
        return "rows", ""
    if scales[0] == "1x128" and scales[1] in ("1x128", "128x128") and units.tiles:
        return "tiles", ""
    if scales == ("1x32", "1x32") and units.mx:
        return "mx", ""
    if units.triton and triton_products.inner_block(left, right):
        return "triton", ""
    return "emulation", f"no FP8 product of this device takes scales per {scales[0]} and {scales[1]}"


def _names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(map(str, dtypes)))


@functools.cache
def _name_fallback(reason: str) -> None:
    logger.warning("FP8 units not used: %s; operands are decoded to BF16 and multiplied there", reason)


def multiply_fp8(a: Operand, b: Operand, layout: str, dtype: torch.dtype) -> Tensor:
    """The product of operands of one scale each, FP32 accumulation, both scales applied before the one rounding."""
    left = transposed(a.payload, layout[0])
    right = transposed(b.payload, layout[1]).t()  # row-major here is column-major for the product
    rows, columns = left.shape[0], right.shape[0]
    forward = layout == "nt" and a.payload.dtype == b.payload.dtype == E4M3.dtype
    product = torch._scaled_mm(
        aligned(left, pad_rows=False),
        aligned(right, pad_rows=True).t(),
        scale_a=a.scale_inv.reshape(()),
        scale_b=b.scale_inv.reshape(()),
        out_dtype=dtype,
        use_fast_accum=forward,
    )
    return product if product.shape[1] == columns else product[:rows, :columns].contiguous()


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
