"""Gradient clipping over FP8 and plain gradients alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from msamp_like.tensor import real


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    reduce_sum: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Scale the gradients so that their joint norm is at most ``max_norm``; returns the norm before, a scalar tensor.

    Equal to ``torch.nn.utils.clip_grad_norm_`` on the dequantized gradients. An FP8 gradient is clipped through its
    scale alone, so nothing is rounded again. A non-finite gradient stays non-finite, and the optimizer skips the step.
    ``reduce_sum`` adds the norm's powers (its maximum, for an infinite norm) over ranks that hold different parameters.
    """
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in tensors if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = torch.stack([torch.linalg.vector_norm(real(g), norm_type).to(grads[0].device) for g in grads])
    if norm_type == float("inf"):
        total = norms.max()
        if reduce_sum is not None:
            reduce_sum(total)
    else:
        power = norms.pow(norm_type).sum()
        if reduce_sum is not None:
            reduce_sum(power)
        total = power.pow(1.0 / norm_type)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.device))
    return total
