"""Norms, activations, products and the cross-entropy whose backward reads FP8: what they keep is one byte an element.

The forward values are those of torch's own functions (up to the order of a sum), in the dtype that those return. What
backward keeps is quantized in groups, in the pass that makes the result, so only gradients are rounded: by the 31 dB of
one E4M3 rounding, whatever the range of the tensor, for each group has its own scale. The idea of keeping grouped FP8
activations: Xi et al., "COAT: Compressing Optimizer States and Activation for Memory-Efficient FP8 Training", 2024,
https://arxiv.org/abs/2410.19313.

These are autograd functions with ``save_for_backward`` and nothing else, so activation checkpointing, saved-tensor
hooks and torch.compile see what they keep as they see any function's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from msamp_like import kernels
from msamp_like.kernels import Operand, fused
from msamp_like.kernels.fused import Grouped, Kept, Target
from msamp_like.policy import Rule


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, rule: Rule, *, centered: bool
) -> Tensor:
    """LayerNorm (``centered``) or RMSNorm over the last dim, in ``dtype``; keeps the normalized input as ``rule``."""
    return _Norm.apply(x, weight, bias, eps, centered, dtype, rule)


def activation(x: Tensor, kind: str, rule: Rule) -> tuple[Tensor, Kept]:
    """One of ``kernels.fused.KINDS`` of ``x``; keeps ``x``, which comes along for :func:`gated`."""
    made, payload, scale_inv = _Activation.apply(x, kind, rule)
    return made, Kept(payload, scale_inv)


def gated(gate: Tensor, activated: Tensor, gate_kept: Kept, value: Tensor, kind: str, rule: Rule) -> Tensor:
    """``activated * value``, where ``activated`` is ``kind(gate)``; keeps gate and value, and not their product's two
    factors: the activation is computed again in backward."""
    return _Gated.apply(gate, value, activated.detach(), *gate_kept, kind, rule)


def product(a: Tensor, b: Tensor, rule: Rule) -> Tensor:
    """``a * b``; keeps a factor as large as the result as ``rule``, a smaller one, or a leaf, as it is: that costs
    little, or nothing, for whoever made it holds it anyway."""
    return _Product.apply(a, b, rule, (not a.is_leaf, not b.is_leaf))


def square(x: Tensor, rule: Rule) -> Tensor:
    """``x * x``; keeps ``x``."""
    return _Square.apply(x, rule)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, reduction: str, rule: Rule) -> Tensor:
    """``F.cross_entropy`` of class indices, FP32; logits (N, V), targets (N,). Keeps the softmax as ``rule``.

    torch keeps log-probabilities, in FP32. The part of the gradient that a target adds is exact; no FP32 tensor of the
    logits' size is made in forward.
    """
    counted = targets != ignore_index
    losses = _CrossEntropy.apply(logits, targets, counted, rule)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


def _grouped(rule: Rule) -> Grouped:
    return Grouped(rule.format, rule.block)


def _keep(x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    return kernels.quantize_current(x, rule.format, rule.block)[:2]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool,
        dtype: torch.dtype, rule: Rule,
    ) -> Tensor:  # fmt: skip
        made, kept, inverse = fused.norm_quantize(x, weight, bias, eps, centered, Target(dtype), _grouped(rule))
        ctx.save_for_backward(*kept, inverse, weight)
        ctx.centered, ctx.block = centered, rule.block
        ctx.dtypes = x.dtype, *(None if t is None else t.dtype for t in (weight, bias))
        return made.payload

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        payload, scale_inv, inverse, weight = ctx.saved_tensors
        dtype, weight_dtype, bias_dtype = ctx.dtypes
        kept = Operand(payload, scale_inv, ctx.block)
        grad_input, grad_weight, grad_bias = fused.norm_backward(grad, kept, inverse, weight, ctx.centered, dtype)
        return (
            grad_input,
            grad_weight.to(weight_dtype) if ctx.needs_input_grad[1] else None,
            grad_bias.to(bias_dtype) if ctx.needs_input_grad[2] else None,
            *(None, None, None, None),
        )


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        made, kept, _ = fused.activation_quantize(x, None, kind, Target(x.dtype), _grouped(rule))
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(*kept)
        ctx.kind, ctx.block = kind, rule.block
        return made.payload, *kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        payload, scale_inv = ctx.saved_tensors
        kept = Operand(payload, scale_inv, ctx.block)
        return fused.activation_backward(grad, kept, None, ctx.kind, Target(grad.dtype))[0].payload, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, gate: Tensor, value: Tensor, activated: Tensor, payload: Tensor, scale_inv: Tensor, kind: str,
        rule: Rule,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(payload, scale_inv, *_keep(value, rule))
        ctx.kind, ctx.block, ctx.dtypes = kind, rule.block, (gate.dtype, value.dtype)
        return activated * value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        gate, value = (Operand(saved[i], saved[i + 1], ctx.block) for i in (0, 2))
        grads = fused.activation_backward(grad, gate, value, ctx.kind, Target(grad.dtype))
        made = (stored.payload.to(dtype) for stored, dtype in zip(grads, ctx.dtypes, strict=True))
        return *made, None, None, None, None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, a: Tensor, b: Tensor, rule: Rule, made_here: tuple[bool, bool]
    ) -> Tensor:
        made = a * b
        large = (own and x.shape == made.shape for x, own in zip((a, b), made_here, strict=True))
        kept = (_keep(x, rule) if yes else (x, None) for x, yes in zip((a, b), large, strict=True))
        ctx.save_for_backward(*(t for pair in kept for t in pair))
        ctx.block, ctx.likes = rule.block, ((a.shape, a.dtype), (b.shape, b.dtype))
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, likes = ctx.saved_tensors, ctx.likes
        factors = [_read(saved[2 * i : 2 * i + 2], ctx.block, likes[i][1]) for i in (0, 1)]
        pairs = zip(reversed(factors), likes, strict=True)
        grads = [(grad * other).sum_to_size(shape).to(dtype) for other, (shape, dtype) in pairs]
        return *grads, None, None


def _read(kept: Sequence[Tensor | None], block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    payload, scale_inv = kept
    if payload is None:
        raise RuntimeError("a product's backward needs its factors, got none; forward keeps both")
    return payload if scale_inv is None else kernels.dequantize(payload, scale_inv, block, dtype)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*_keep(x, rule))
        ctx.block, ctx.dtype = rule.block, x.dtype
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        payload, scale_inv = ctx.saved_tensors
        return grad * 2 * kernels.dequantize(payload, scale_inv, ctx.block, ctx.dtype), None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, targets: Tensor, counted: Tensor, rule: Rule
    ) -> Tensor:
        sums, kept = fused.softmax_quantize(logits, _grouped(rule))
        chosen = logits.gather(1, torch.where(counted, targets, 0).unsqueeze(-1)).squeeze(-1).float()
        ctx.save_for_backward(*kept, torch.where(counted, targets, -1))
        ctx.block, ctx.dtype = rule.block, logits.dtype
        return torch.where(counted, sums - chosen, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        payload, scale_inv, targets = ctx.saved_tensors
        grad = torch.where(targets < 0, 0.0, grad.float())
        kept = Operand(payload, scale_inv, ctx.block)
        return fused.softmax_backward(kept, targets, grad, ctx.dtype), None, None, None
