"""Gradient clipping over FP8 and plain gradients alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from msamp_like.tensor import ScalingTensor, norm

INFINITY = float("inf")


class NormReduction(Protocol):
    """Joins norms of gradients on several ranks; a power is ``norm ** norm_type``, or the norm if that is infinite."""

    def join(self, powers: Tensor, norm_type: float) -> Tensor:
        """FP32 (parameters,) of this rank to those of all that share the layers; 0 stands for what is elsewhere."""
        ...

    def total(self, total: Tensor, norm_type: float) -> Tensor:
        """The sum (the maximum, if infinite) over this rank's layers to that over all layers."""
        ...


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    reduction: NormReduction | None = None,
) -> Tensor:
    """Scale the gradients so that their joint norm is at most ``max_norm``; returns the norm before, a scalar tensor.

    Equal to ``torch.nn.utils.clip_grad_norm_`` on the dequantized gradients. An FP8 gradient is clipped through its
    scale alone, so nothing is rounded again. A non-finite gradient stays non-finite, and the optimizer skips the step.
    ``reduction`` is for ranks that hold different gradients; all of them call this with the same parameters. Raises
    ValueError for gradients that need one.
    """
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in tensors if p.grad is not None]
    if reduction is None and any(isinstance(g, ScalingTensor) and g.scattered for g in grads):
        raise ValueError(
            "a joint norm needs all gradients, got some whose rest lies on other ranks; pass the model: "
            "amp.clip_grad_norm_(model, max_norm)"
        )
    if not grads and (reduction is None or not tensors):
        return torch.zeros(())
    device = tensors[0].device
    powers = torch.stack([_power(p.grad, norm_type, device) for p in tensors])
    powers = powers if reduction is None else reduction.join(powers, norm_type)
    total = powers.max() if norm_type == INFINITY else powers.sum()
    total = total if reduction is None else reduction.total(total, norm_type)
    total = total if norm_type == INFINITY else total.pow(1.0 / norm_type)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.device))
    return total


def _power(grad: Tensor | None, norm_type: float, device: torch.device) -> Tensor:
    """One gradient's share of the joint norm; of none it is 0, so that the order of the sum is that of parameters."""
    if grad is None:
        return torch.zeros((), device=device)
    length = norm(grad, norm_type).to(device)
    return length if norm_type == INFINITY else length.pow(norm_type)
