"""Attention in FP8: a function of the signature of torch's, and a mode that puts it in torch's place.

Queries, keys, values, probabilities and their gradients are E4M3; softmax, its sums and all accumulation are FP32.
Every token of every head has a scale of its own, so a token that a query may not see changes no bit of what it gets:
:mod:`msamp_like.kernels.attention` is the definition. What backward keeps is one byte an element of queries, keys and
values, and the output.

Two ways to it, both in the user's sight. A model calls :func:`scaled_dot_product_attention` of this module instead of
torch's; or the training loop wraps its forward pass, as it does for autocast:

    with Fp8Attention():
        loss = model(x)

The mode sees calls of ``F.scaled_dot_product_attention`` by torch's own override protocol, in its thread, while it is
on. Nothing is in FP8 by default, and no level turns it on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.profiler import record_function

from msamp_like import kernels
from msamp_like.formats import E4M3, ROW, Format
from msamp_like.kernels import Operand
from msamp_like.policy import O2, Policy

logger = logging.getLogger(__name__)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    grad_format: Format = E4M3,
) -> Tensor:
    """torch's function of this name, in FP8; query (B, H, T, D), key and value (B, H / G, S, D), G 1 unless
    ``enable_gqa``. Returns the autocast dtype where autocast is on, else the query's.

    ``grad_format`` is that of dO and dS: E4M3, for with a scale a row it has the range, and keeps 3 dB more than E5M2
    (``benchmarks/attention.py``). Raises ValueError for a mask, dropout or shapes that are not defined here.
    """
    reason = _unsupported(query, key, value, attn_mask, dropout_p, enable_gqa)
    if reason:
        raise ValueError(
            f"attention in FP8 takes no mask but the causal one, and no dropout, got {reason}; call torch's"
        )
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(query, key, value, scale, is_causal, grad_format, dtype)  # type: ignore[no-any-return]


def _unsupported(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, enable_gqa: bool
) -> str:
    """Why a call cannot be in FP8, or an empty string."""
    if attn_mask is not None:
        return "attn_mask"
    if dropout_p:
        return f"dropout_p={dropout_p}"
    shapes = [tuple(t.shape) for t in (query, key, value)]
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape or min(query.numel(), key.numel()) == 0:
        return f"shapes {shapes}"
    same = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3]
    groups = query.shape[1] % key.shape[1] == 0 if enable_gqa else query.shape[1] == key.shape[1]
    if not (same and groups):
        return f"shapes {shapes} with enable_gqa={enable_gqa}"
    return ""


def _stored(x: Tensor, format: Format) -> Operand:
    payload, scale_inv, _ = kernels.quantize_current(x.contiguous(), format, ROW)
    return Operand(payload, scale_inv, ROW)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        causal: bool,
        grad_format: Format,
        dtype: torch.dtype,
    ) -> Tensor:
        with record_function("attention/quantize query, key and value"):
            q, k, v = (_stored(x, E4M3) for x in (query, key, value))
        with record_function("attention/output"):
            output, log_sum = kernels.attention_forward(q, k, v, scale, causal, dtype)
        ctx.save_for_backward(*q[:2], *k[:2], *v[:2], output, log_sum)
        ctx.settings = scale, causal, grad_format
        ctx.dtypes = [x.dtype for x in (query, key, value)]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *stored, output, log_sum = ctx.saved_tensors
        q, k, v = (Operand(stored[i], stored[i + 1], ROW) for i in (0, 2, 4))
        scale, causal, grad_format = ctx.settings
        with record_function("attention/quantize grad_output"):
            stored_grad = _stored(grad_output, grad_format)
        # of the gradient as it is rounded, so that dO V^T and its mean have the same rounding in them: the dS of a row
        # that looks at one key alone is 0, and not the difference of two roundings
        delta = (kernels.dequantize(*stored_grad[:3], torch.float32) * output).sum(-1)
        with record_function("attention/grad_query, grad_key and grad_value"):
            grads = kernels.attention_backward(
                q, k, v, stored_grad, log_sum, delta, scale, causal, grad_format, output.dtype
            )
        return (*(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)), None, None, None, None)


class Fp8Attention(TorchFunctionMode):
    """Within it, ``F.scaled_dot_product_attention`` runs in FP8 where :func:`scaled_dot_product_attention` can.

    A call that it cannot take (a mask, dropout) stays torch's, and the first of a reason is logged. ``taken`` and
    ``left`` count both. With a ``policy`` whose products are not FP8 every call is torch's. Activation checkpointing
    runs a forward again, in backward: give ``checkpoint`` a ``context_fn`` that enters the mode there too, or call the
    function in the model.
    """

    def __init__(self, policy: Policy = O2, *, grad_format: Format = E4M3) -> None:
        super().__init__()
        self.fp8 = policy.fp8_products
        self.grad_format = grad_format
        self.taken = 0
        self.left = 0
        self._named: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self.fp8:
            return func(*args, **kwargs)
        reason = _why_torch(*args, **kwargs)
        if not reason:
            self.taken += 1
            return scaled_dot_product_attention(*args, **kwargs, grad_format=self.grad_format)
        self.left += 1
        if reason not in self._named:
            self._named.add(reason)
            logger.warning("an attention stays in torch's precision: it has %s", reason)
        return func(*args, **kwargs)


def _why_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    return _unsupported(query, key, value, attn_mask, dropout_p, enable_gqa)
