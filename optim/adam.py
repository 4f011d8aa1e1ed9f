"""Adam and AdamW, with the moments and the master weight in few bits.

References: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, https://arxiv.org/abs/1412.6980;
Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, https://arxiv.org/abs/1711.05101.
The arithmetic is :func:`msamp_like.kernels.adam_update`, where its fused twins can see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from msamp_like import kernels
from msamp_like.kernels import AdamScalars, Row
from msamp_like.optim.base import Group, LowPrecisionOptimizer
from msamp_like.policy import Policy, Role


class Adam(LowPrecisionOptimizer):
    """Adam; ``weight_decay`` is added to the gradient (L2)."""

    roles: ClassVar[Mapping[str, Role]] = {"exp_avg": Role.FIRST_MOMENT, "exp_avg_sq": Role.SECOND_MOMENT}
    decoupled: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        policy: Policy | None = None,
        seed: int = 0,
    ) -> None:
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps >= 0 and lr >= 0 and weight_decay >= 0):
            raise ValueError(
                "lr, eps and weight_decay must not be negative and each beta must lie in [0, 1), got "
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, policy=policy, seed=seed)

    def betas(self, group: Group) -> Mapping[str, float]:
        return {"exp_avg": group["betas"][0], "exp_avg_sq": group["betas"][1]}

    def _scalars(self, group: Group) -> AdamScalars:
        return AdamScalars(
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=self.decoupled,
        )

    def update(self, param: Tensor, grad: Tensor, states: list[Tensor], group: Group, step: int) -> list[Tensor]:
        return kernels.adam_update(param, grad, states[0], states[1], self._scalars(group), step)

    def fused_update(self, rows: Sequence[Row], group: Group, bad: Tensor | None) -> bool:
        kernels.adam_steps_(rows, self._scalars(group), bad)
        return True


class AdamW(Adam):
    """AdamW; ``weight_decay`` acts on the weight."""

    decoupled: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        policy: Policy | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, policy=policy, seed=seed)
