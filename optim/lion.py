"""Lion: the sign of an interpolated momentum, one state.

Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, https://arxiv.org/abs/2302.06675.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from msamp_like.optim.base import Group, LowPrecisionOptimizer
from msamp_like.policy import Policy, Role


def lion_update(
    param: Tensor, grad: Tensor, momentum: Tensor, *, lr: float, beta1: float, beta2: float, weight_decay: float
) -> list[Tensor]:
    """w = w (1 - lr decay) - lr sign(beta1 m + (1 - beta1) g);  m = beta2 m + (1 - beta2) g."""
    direction = (momentum * beta1 + grad * (1 - beta1)).sign()
    return [param * (1 - lr * weight_decay) - direction * lr, momentum * beta2 + grad * (1 - beta2)]


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

    def update(self, param: Tensor, grad: Tensor, states: list[Tensor], group: Group, step: int) -> list[Tensor]:
        beta1, beta2 = group["betas"]
        decay = float(group["weight_decay"])
        return lion_update(param, grad, states[0], lr=float(group["lr"]), beta1=beta1, beta2=beta2, weight_decay=decay)
