"""The operations with which ``torch.distributed.fsdp.fully_shard`` cuts a weight into shards, along dim 0 alone.

It pads each rank's rows with zeros to the first rank's number (``new_zeros``, ``slice``, ``copy_``), keeps a flat view
of the whole (``view``), and gives the gathered weight its shape (``as_strided``). A part shares the storage only where
what it leaves out is zero, for a write through it may change the one scale that both have; any other part is a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from msamp_like.formats import WHOLE
from msamp_like.tensor.scaling_tensor import HOST_OPERATIONS, OPERATIONS, ScalingTensor, real

aten = torch.ops.aten


def _one_scale(source: ScalingTensor, dim: int, operation: str) -> None:
    if source.block != WHOLE or dim not in (0, -source.dim()):
        raise NotImplementedError(
            f"{operation} on a ScalingTensor cuts dim 0 of a tensor with one scale, got dim {dim} and block "
            f"{source.block}; call .dequantize() where plain values are meant"
        )


def _part(source: ScalingTensor, start: int, end: int) -> ScalingTensor:
    payload = source.payload[start:end]
    rest = (source.payload[:start], source.payload[end:])
    if any(bool(_bits(r).any()) for r in rest if r.numel()):
        return _made(source, payload.clone(), source.scale_inv.clone())
    made = _made(source, payload, source.scale_inv)
    made._marks = source._marks
    if start == 0 and end < source.shape[0]:
        made.padded = source.payload
    return made


def _bits(payload: Tensor) -> Tensor:
    return payload.contiguous().view(torch.uint8)


def _made(source: ScalingTensor, payload: Tensor, scale_inv: Tensor, dtype: torch.dtype | None = None) -> ScalingTensor:
    made = ScalingTensor(payload, scale_inv, WHOLE, dtype or source.dtype)
    made.gemm = source.gemm
    return made


def _slice(
    source: ScalingTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> ScalingTensor:
    _one_scale(source, dim if step == 1 else -1, "slice")
    first, last, _ = slice(start, end).indices(source.shape[0])
    return _part(source, first, max(first, last))


def _split(source: ScalingTensor, size: int, dim: int = 0) -> list[ScalingTensor]:
    _one_scale(source, dim, "split")
    return [_part(source, at, min(at + size, source.shape[0])) for at in range(0, source.shape[0], max(1, size))]


def _new_zeros(source: ScalingTensor, size: Sequence[int], **options: Any) -> ScalingTensor:
    if source.block != WHOLE:
        raise NotImplementedError(
            f"new_zeros of another shape needs one scale for the whole tensor, got block {source.block}; "
            "use zeros_like, or .dequantize() where plain values are meant"
        )
    device = options.get("device") or source.device
    payload = torch.zeros(*size, dtype=source.payload.dtype, device=device)
    made = _made(source, payload, torch.ones_like(source.scale_inv, device=device), options.get("dtype"))
    made._marks = {"shard": True}
    return made


def _as_strided(
    source: ScalingTensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> ScalingTensor:
    contiguous = [math.prod(size[dim + 1 :]) for dim in range(len(size))]
    if list(stride) != contiguous or storage_offset or list(size[1:]) != list(source.shape[1:]):
        raise NotImplementedError(
            f"as_strided on a ScalingTensor takes its first rows, got size {list(size)}, stride {list(stride)} and "
            f"offset {storage_offset} of shape {tuple(source.shape)}; call .dequantize() where plain values are meant"
        )
    return source.first_rows(size[0])


def _chunk_cat(tensors: Sequence[Tensor], dim: int, num_chunks: int, out: Tensor) -> None:
    """Gradients into the flat buffer of a reduce-scatter: of a ScalingTensor its real values."""
    plain = [real(t, out.dtype) for t in tensors]
    torch.ops.fsdp.chunk_cat(plain, dim=dim, num_chunks=num_chunks, out=out)


_TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.new_zeros.default: _new_zeros,
    aten.new_empty.default: _new_zeros,  # uninitialised bytes can be NaN codes
    aten.as_strided.default: _as_strided,
}
OPERATIONS.update(_TABLE)
HOST_OPERATIONS["fsdp.chunk_cat.default"] = _chunk_cat
