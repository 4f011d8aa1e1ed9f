"""Lion: the sign of an interpolated momentum, one state.

Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, https://arxiv.org/abs/2302.06675.
The arithmetic is :func:`msamp_like.kernels.lion_update`, where its fused twins can see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from msamp_like import kernels
from msamp_like.kernels import LionScalars, Row
from msamp_like.optim.base import Group, LowPrecisionOptimizer
from msamp_like.policy import Policy, Role


class Lion(LowPrecisionOptimizer):
    """Lion; a learning rate 3 to 10 times below AdamW's is usual, with a decay as much larger."""

    roles: ClassVar[Mapping[str, Role]] = {"exp_avg": Role.FIRST_MOMENT}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        policy: Policy | None = None,
        seed: int = 0,
    ) -> None:
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and lr >= 0 and weight_decay >= 0):
            raise ValueError(
                "lr and weight_decay must not be negative and each beta must lie in [0, 1), got "
                f"lr={lr}, betas={betas}, weight_decay={weight_decay}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, policy=policy, seed=seed)

    def betas(self, group: Group) -> Mapping[str, float]:
        return {"exp_avg": group["betas"][1]}

    def _scalars(self, group: Group) -> LionScalars:
        beta1, beta2 = group["betas"]
        return LionScalars(float(group["lr"]), float(beta1), float(beta2), float(group["weight_decay"]))

    def update(self, param: Tensor, grad: Tensor, states: list[Tensor], group: Group, step: int) -> list[Tensor]:
        return kernels.lion_update(param, grad, states[0], self._scalars(group), step)

    def fused_update(self, rows: Sequence[Row], group: Group, bad: Tensor | None) -> bool:
        kernels.lion_steps_(rows, self._scalars(group), bad)
        return True
