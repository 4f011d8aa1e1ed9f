"""Stochastic gradient descent with momentum, the momentum stored as a first moment.

Reference: Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum in deep learning",
ICML 2013, https://proceedings.mlr.press/v28/sutskever13.html; the buffer starts at the first gradient, as torch's does.
The arithmetic is :func:`msamp_like.kernels.sgd_update`, where its fused twins can see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from msamp_like import kernels
from msamp_like.kernels import Row, SgdScalars
from msamp_like.optim.base import Group, LowPrecisionOptimizer
from msamp_like.policy import Policy, Role


class SGD(LowPrecisionOptimizer):
    """SGD with momentum; without momentum the buffer is kept, zero, so that every optimizer has the same shape."""

    roles: ClassVar[Mapping[str, Role]] = {"momentum_buffer": Role.FIRST_MOMENT}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        policy: Policy | None = None,
        seed: int = 0,
    ) -> None:
        if lr < 0 or momentum < 0 or weight_decay < 0:
            raise ValueError(
                "lr, momentum and weight_decay must not be negative, got "
                f"lr={lr}, momentum={momentum}, weight_decay={weight_decay}"
            )
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                f"nesterov needs momentum and no dampening, got momentum={momentum}, dampening={dampening}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, policy=policy, seed=seed)

    def betas(self, group: Group) -> Mapping[str, float]:
        return {"momentum_buffer": group["momentum"]}

    def _scalars(self, group: Group) -> SgdScalars:
        return SgdScalars(
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=bool(group["nesterov"]),
        )

    def update(self, param: Tensor, grad: Tensor, states: list[Tensor], group: Group, step: int) -> list[Tensor]:
        return kernels.sgd_update(param, grad, states[0], self._scalars(group), step)

    def fused_update(self, rows: Sequence[Row], group: Group, bad: Tensor | None) -> bool:
        kernels.sgd_steps_(rows, self._scalars(group), bad)
        return True
