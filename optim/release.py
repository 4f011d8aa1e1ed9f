"""Gradient release: a parameter is stepped in backward, as soon as its gradient is complete, which is freed at once.

The gradients of a model never exist together: what they occupied, a byte a parameter here, is the memory of one of
them. Left in ``step()`` is what belongs to the step as a whole. This changes what the step means:

    clipping      the joint norm is known when the last gradient is, too late for the others: see GradientRelease
    not finite    such a gradient counts as zero for its parameter, whose averages decay, and the others are stepped as
                  ever; without release the whole step is skipped. (Whether it is finite stays on the device.)
    learning rate that of the moment of backward(): a scheduler has to have set it by then
    accumulation  is refused: a gradient that is gone cannot be added to

Reference: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), 2023,
https://arxiv.org/abs/2306.09782, who step plain SGD so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msamp_like.tensor import ScalingTensor, real

logger = logging.getLogger(__name__)

NORMS = ("previous", "parameter")


@dataclass(frozen=True, kw_only=True)
class GradientRelease:
    """How gradients that are released are clipped; ``max_norm`` None: they are not.

    ``norm`` "previous" divides by the joint norm of the step before, or by the gradient's own where that is larger:
    never more than exact clipping would where norms fall, and as much where they are steady. "parameter" clips each
    gradient by its own norm.
    """

    max_norm: float | None = None
    norm: str = "previous"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"the norm to clip by must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm must be positive, or None for no clipping, got {self.max_norm}")


class Released:
    """The gradients of one optimizer's parameters on their way: clipped, handed to ``update``, freed.

    ``update`` steps parameter number i, in the order of ``parameters``; ``prepare`` is called before that and gives a
    small tensor that is finite if and only if the gradient is. Nothing here waits for the device but :meth:`close`.
    """

    def __init__(
        self,
        settings: GradientRelease,
        parameters: Sequence[Tensor],
        prepare: Callable[[Tensor], Tensor],
        update: Callable[[int], None],
    ) -> None:
        self.settings = settings
        self.norm: Tensor | None = None  # of the last closed step's gradients, before clipping; FP32 scalar
        self._parameters = parameters
        self._index = {id(p): i for i, p in enumerate(parameters)}
        self._prepare, self._update = prepare, update
        self._powers: dict[int, Tensor] = {}
        self._finite: dict[int, Tensor] = {}

    def hooks(self) -> list[Any]:
        """One on each parameter, for gradients that nobody reduces; handles to remove them with."""
        trained = [p for p in self._parameters if p.requires_grad]
        return [p.register_post_accumulate_grad_hook(functools.partial(_call, self)) for p in trained]

    @torch.no_grad()
    def take(self, parameter: Tensor) -> None:
        """The parameter's gradient is complete: step it and let the gradient go."""
        index = self._index.get(id(parameter))
        if index is None or parameter.grad is None:
            return
        if index in self._finite:
            raise RuntimeError(
                "a released gradient is used up in the backward that made it, got a second one for a parameter of "
                f"shape {tuple(parameter.shape)} before optimizer.step(); step after every backward, with one batch "
                "in place of micro-batches and use_reentrant=False in checkpoints, or train without "
                "gradient_release"
            )
        finite = torch.isfinite(self._prepare(parameter)).all()
        self._finite[index] = finite
        _scale(parameter.grad, self._factor(index, parameter.grad), finite)
        self._update(index)
        parameter.grad = None

    def _factor(self, index: int, grad: Tensor) -> Tensor | None:
        """What the gradient is multiplied by."""
        if self.settings.max_norm is None:
            return None
        norm = torch.linalg.vector_norm(real(grad))
        self._powers[index] = torch.where(self._finite[index], norm.square(), 0.0)
        if self.settings.norm == "previous" and self.norm is not None:
            norm = torch.maximum(norm, self.norm.to(norm.device))
        return (self.settings.max_norm / (norm + 1e-6)).clamp(max=1.0)

    def close(self) -> int:
        """End of the step: 1 if a gradient was not finite, which is logged, else 0. One read of the device."""
        if self._powers:
            device = self._parameters[0].device
            powers = [self._powers[i].to(device) for i in sorted(self._powers)]  # not in the order of backward
            self.norm = torch.stack(powers).sum().sqrt()
        flags = [self._finite[i] for i in sorted(self._finite)]
        self._powers, self._finite = {}, {}
        bad = int(torch.stack([~f.to(flags[0].device) for f in flags]).sum()) if flags else 0
        if bad:
            logger.warning("%d of %d gradients are not finite: each counted as zero for its parameter", bad, len(flags))
        return int(bad > 0)


def _call(released: Released, parameter: Tensor) -> None:
    released.take(parameter)


def _scale(grad: Tensor, factor: Tensor | None, finite: Tensor) -> None:
    """Multiply a gradient in place, or make it zero where it is not finite."""
    if isinstance(grad, ScalingTensor):
        if not grad.format.scaled:  # what is not finite stands in the payload
            grad.payload.copy_(torch.where(finite, grad.payload, 0.0))
        parts = grad.scale_inv
    else:
        parts = grad
    parts.copy_(torch.where(finite, parts if factor is None else parts * factor, 0.0))
