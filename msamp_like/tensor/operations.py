"""The table of operations that a ScalingTensor defines; every other raises.

Views keep the shape, writes quantize with scales from the values written, a product with one number touches the scale
alone, and a sum is BF16 where it makes a new tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from msamp_like import kernels
from msamp_like.formats import BF16
from msamp_like.kernels import fused
from msamp_like.tensor.scaling_tensor import OPERATIONS, ScalingTensor, norm, real, unscaled

aten = torch.ops.aten


def _defines(*operations: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS.update(dict.fromkeys(operations, implementation))
        return implementation

    return register


def _like(source: ScalingTensor, payload: Tensor, scale_inv: Tensor, dtype: torch.dtype | None = None) -> ScalingTensor:
    made = ScalingTensor(payload, scale_inv, source.block, dtype or source.dtype)
    made.scattered = source.scattered
    return made


def _carry_gemm(source: ScalingTensor, made: ScalingTensor) -> ScalingTensor:
    made.gemm = source.gemm
    return made


@_defines(aten.detach.default, aten.alias.default)
def _detach(source: ScalingTensor) -> ScalingTensor:
    # nn.Parameter(t) detaches: a parameter made from a weight (Module.to does that) has to stay that weight
    made = _carry_gemm(source, _like(source, source.payload.detach(), source.scale_inv.detach()))
    made.padded, made._marks = source.padded, source._marks
    made._casts = source._casts  # a write through either, weight.data.copy_() say, makes the copies of both stale
    return made


@_defines(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.view_as.default)
def _view(source: ScalingTensor, size: Sequence[int] | Tensor) -> ScalingTensor:
    shape = size.shape if isinstance(size, Tensor) else size
    if source.shard and list(shape) == [-1]:  # fully_shard keeps its padded shard flat
        return _like(source, source.payload.view(-1), source.scale_inv)
    _keeps_shape(source, shape)
    return _detach(source)


def _keeps_shape(source: ScalingTensor, size: Sequence[int]) -> None:
    if list(size) != list(source.shape):
        raise NotImplementedError(
            f"a view of a ScalingTensor keeps its shape {tuple(source.shape)}, got {list(size)}; call .dequantize(). "
            "Torch's DistributedDataParallel asks for one: a model that amp.initialize converted under a process group "
            "is data-parallel by itself, call it as it is and accumulate with model.no_sync()"
        )


@_defines(aten.clone.default)
def _clone(source: ScalingTensor, memory_format: Any = None) -> ScalingTensor:
    return _like(source, source.payload.clone(), source.scale_inv.clone())


@_defines(aten._to_copy.default)
def _to_copy(source: ScalingTensor, dtype: Any = None, device: Any = None, **_: Any) -> ScalingTensor:
    whole = (source.payload if source.padded is None else source.padded).to(device, copy=True)
    payload = whole if source.padded is None else whole[: source.shape[0]]
    made = _carry_gemm(source, _like(source, payload, source.scale_inv.to(device, copy=True), dtype))
    made.padded, made._marks = None if source.padded is None else whole, dict(source._marks)
    return made


@_defines(aten.empty_like.default, aten.zeros_like.default)
def _zeros_like(source: ScalingTensor, dtype: Any = None, device: Any = None, **_: Any) -> ScalingTensor:
    # empty is zero here: uninitialised bytes can be NaN codes, and a scale must never be garbage
    payload = torch.zeros_like(source.payload, device=device)
    made = _like(source, payload, torch.ones_like(source.scale_inv, device=device), dtype)
    return _carry_gemm(source, made)  # Module.to_empty() builds parameters this way


@_defines(aten.new_empty_strided.default)
def _new_empty(source: ScalingTensor, size: Sequence[int], stride: Sequence[int], **options: Any) -> ScalingTensor:
    # autograd copies a gradient into one of these when somebody else, a hook say, holds on to it
    _keeps_shape(source, size)
    return _zeros_like(source, options.get("dtype"), options.get("device"))


@_defines(aten.t.default, aten.numpy_T.default)
def _transpose(source: ScalingTensor) -> ScalingTensor:
    block = (source.block[1], source.block[0])
    return ScalingTensor(source.payload.t().contiguous(), source.scale_inv.t().contiguous(), block, source.dtype)


@_defines(aten.copy_.default)
def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, ScalingTensor):
        return target.copy_(real(source, target.dtype))
    same = isinstance(source, ScalingTensor) and source.format is target.format and source.block == target.block
    if same and source.shape == target.shape:
        target.payload.copy_(source.payload)  # type: ignore[attr-defined]
        target.scale_inv.copy_(source.scale_inv)  # type: ignore[attr-defined]
        target.agreed = source.agreed  # type: ignore[attr-defined]
        target.drop_casts()
        return target
    values = real(source).to(target.device).expand(target.shape)
    return target.store_(values)


@_defines(aten.zero_.default)
def _zero_(target: ScalingTensor) -> ScalingTensor:
    target.payload.zero_()
    target.scale_inv.fill_(1.0)
    target.agreed = False
    target.drop_casts()
    return target


@_defines(aten.fill_.Scalar, aten.fill_.Tensor)
def _fill_(target: ScalingTensor, value: Any) -> ScalingTensor:
    return target.store_(torch.empty(target.shape, device=target.device).fill_(value))


def _drawn(operation: str) -> Callable[..., ScalingTensor]:
    def fill_(target: ScalingTensor, *args: Any, **kwargs: Any) -> ScalingTensor:
        values = torch.empty(target.shape, device=target.device)
        return target.store_(getattr(values, operation)(*args, **kwargs))

    return fill_


for _name in ("normal_", "uniform_", "exponential_", "log_normal_", "cauchy_"):  # what nn.init draws from
    _defines(getattr(aten, _name).default)(_drawn(_name))


@_defines(aten.mul_.Tensor, aten.mul_.Scalar)
def _mul_(target: ScalingTensor, factor: Any) -> ScalingTensor:
    target.scale_inv.mul_(_scalar(factor, "mul_"))
    target.agreed = False
    target.drop_casts()
    return target


@_defines(aten.div_.Tensor, aten.div_.Scalar)
def _div_(target: ScalingTensor, divisor: Any) -> ScalingTensor:
    target.scale_inv.div_(_scalar(divisor, "div_"))
    target.agreed = False
    target.drop_casts()
    return target


def _scalar(value: Any, operation: str) -> Any:
    if isinstance(value, ScalingTensor) or (isinstance(value, Tensor) and value.numel() != 1):
        raise NotImplementedError(
            f"{operation} on a ScalingTensor takes one number, which multiplies the scale alone, got shape "
            f"{tuple(value.shape)}; compute on .dequantize() and write it back with copy_()"
        )
    return value.reshape(()) if isinstance(value, Tensor) else value


@_defines(aten.add.Tensor)
def _add(a: Tensor, b: Tensor, alpha: float = 1) -> ScalingTensor:
    """A new tensor, so in BF16 with scale 1: autograd's sum where a weight is used twice, rounded once when stored."""
    dtype = a.dtype if isinstance(a, ScalingTensor) else b.dtype
    return unscaled((real(a) + real(b) * alpha).to(BF16.dtype), dtype)


@_defines(aten.add_.Tensor)
def _add_(target: Tensor, other: Tensor, alpha: float = 1) -> Tensor:
    if not isinstance(target, ScalingTensor):
        return target.add_(real(other, target.dtype), alpha=alpha)
    alike = other.shape == target.shape and other.device == target.device
    if not isinstance(other, ScalingTensor) or not alike or alpha != 1:
        return target.store_(real(target) + real(other).to(target.device) * alpha)
    fused.accumulate_(target.operand, other.operand)
    target.agreed = False
    target.drop_casts()
    return target


@_defines(aten.lerp_.Scalar)
def _lerp_(target: Tensor, end: Tensor, weight: float) -> Tensor:
    value = real(target).lerp(real(end), weight)
    return target.store_(value) if isinstance(target, ScalingTensor) else target.copy_(value)


@_defines(aten.linalg_vector_norm.default)
def _vector_norm(
    source: ScalingTensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    _not_scattered(source)
    if dim is None and not keepdim and dtype is None:
        return norm(source, ord)
    return torch.linalg.vector_norm(source.dequantize(torch.float32), ord, dim, keepdim, dtype=dtype)


def _not_scattered(tensor: Tensor) -> None:
    if isinstance(tensor, ScalingTensor) and tensor.scattered:
        raise NotImplementedError(
            "a norm or a check of gradients needs all of them, got some whose rest lies on other ranks; call "
            "amp.clip_grad_norm_(model, max_norm), and train without GradScaler, which FP8 gradients do not need"
        )


@_defines(aten.equal.default)
def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(real(a), real(b))


@_defines(aten.embedding.default)
def _embedding(
    weight: ScalingTensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of the weight in its outer dtype; only the rows asked for are dequantized."""
    rows = indices.reshape(-1)
    payload = weight.payload
    raw = payload.view(torch.uint8) if payload.dtype.itemsize == 1 else payload  # indexing is not defined on float8
    picked = raw.index_select(0, rows).view(payload.dtype)
    block_rows = weight.shape[0] if weight.block[0] == -1 else weight.block[0]
    scales = weight.scale_inv.index_select(0, rows // block_rows)
    values = kernels.dequantize(picked, scales, (1, weight.block[1]), weight.dtype)
    return values.view(*indices.shape, weight.shape[1])


# --- lists of tensors: torch's own clipping, GradScaler and weight averaging ----------------------------------------


@_defines(aten._foreach_norm.Scalar)
def _foreach_norm(tensors: Sequence[Tensor], ord: float = 2, dtype: Any = None) -> list[Tensor]:
    for tensor in tensors:
        _not_scattered(tensor)
    return [norm(t, ord) for t in tensors]


@_defines(aten._foreach_mul_.Scalar, aten._foreach_mul_.Tensor)
def _foreach_mul_(tensors: Sequence[Tensor], factor: Any) -> None:
    for tensor in tensors:
        tensor.mul_(factor)


@_defines(aten._foreach_mul_.ScalarList)
def _foreach_mul_list_(tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
    for tensor, factor in zip(tensors, factors, strict=True):
        tensor.mul_(factor)


@_defines(aten._foreach_zero_.default)
def _foreach_zero_(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.zero_()


@_defines(aten._foreach_copy_.default)
def _foreach_copy_(targets: Sequence[Tensor], sources: Sequence[Tensor], non_blocking: bool = False) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


@_defines(aten._foreach_lerp_.Scalar)
def _foreach_lerp_(targets: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    for target, end in zip(targets, ends, strict=True):
        target.lerp_(end, weight)


@_defines(aten._amp_foreach_non_finite_check_and_unscale_.default)
def _unscale_(tensors: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    for tensor in tensors:
        _not_scattered(tensor)
        flagged = isinstance(tensor, ScalingTensor) and tensor.format.scaled
        seen = tensor.scale_inv if flagged else real(tensor)  # type: ignore[attr-defined]
        found_inf.logical_or_(~torch.isfinite(seen).all())
        tensor.mul_(inv_scale)
