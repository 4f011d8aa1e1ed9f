"""Muon: momentum, orthogonalized by a few matrix products; AdamW for what is not a matrix of a hidden layer.

References: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/ (the iteration and its coefficients); Liu et al., "Muon is Scalable for LLM
Training", 2025, https://arxiv.org/abs/2502.16982 (decoupled decay, and the step size that lets Muon and AdamW share a
learning rate); Bernstein and Newhouse, "Old Optimizer, New Norm: An Anthology", 2024, https://arxiv.org/abs/2409.20325
(why).

The momentum is one first moment, one byte an element at O2, where Adam keeps three. The iteration turns a matrix X of
norm 1 into one whose singular values all lie near 1:

    A = X X^T        X = (a I + b A + c A A) X

Its products read their operands as the policy has the inputs of products. As written that is useless in FP8: near the
end a, b and c cancel to a fifth of their size, rounding is amplified as much, and beyond a singular value of 1.3 the
iteration runs away. So the polynomial is taken about the mean eigenvalue of A, which its trace gives for nothing:

    A = m I + D      X = (a + b m + c m^2) X + ((b + 2 c m) D + c D D) X

The same polynomial, but what is rounded is D, which shrinks as X converges. FP8 products then give 20 dB where they
gave 8 or none, and BF16 ones 39 for 32 (``benchmarks/muon.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from msamp_like import kernels
from msamp_like.formats import BF16, FP32
from msamp_like.kernels import Operand, Row
from msamp_like.optim.adam import AdamW
from msamp_like.optim.base import Group
from msamp_like.policy import DEFAULT_EXCEPTIONS, Policy, Role, Rule, matches
from msamp_like.scaling import Scaler

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan et al.'s: the steepest quintic at 0 that keeps (0, 1] inside about (0.7, 1.2)."""

STEP_SIZES = (None, "original", "match_rms_adamw")


def orthogonalize(
    matrix: Tensor,
    rule: Rule,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
) -> Tensor:
    """The nearest matrix with singular values near 1, FP32. ``rule`` says how products read their operands; they return
    BF16, under a rule of FP32 FP32."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.t() if tall else matrix).contiguous()
    x = x / torch.linalg.vector_norm(x).clamp(min=eps)
    x = x.to(FP32.dtype if rule.format is FP32 else BF16.dtype)
    for _ in range(steps):
        x = _iterate(x, rule, coefficients)
    return (x.t() if tall else x).float()


def _iterate(x: Tensor, rule: Rule, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients
    stored = _stored(x, rule)
    deviation = kernels.scaled_matmul(stored, stored, "nt", x.dtype)
    mean = deviation.diagonal().float().mean()
    deviation.diagonal().sub_(mean)
    stored_deviation = _stored(deviation, rule)  # symmetric: itself times its transpose is its square
    square = kernels.scaled_matmul(stored_deviation, stored_deviation, "nt", x.dtype)
    factor = square.mul_(c).add_(deviation * (b + 2 * c * mean))
    return kernels.scaled_matmul(_stored(factor, rule), stored, "nn", x.dtype).add_(x * (a + b * mean + c * mean**2))


def _stored(x: Tensor, rule: Rule) -> Operand:
    return Scaler(rule).quantize(x, record=False)


def muon_update(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    rule: Rule,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    adjust_lr_fn: str | None = None,
) -> list[Tensor]:
    """m = mu m + (1 - mu) g;  w = w (1 - lr decay) - lr s orthogonal(mu m + (1 - mu) g if nesterov else m).

    ``s`` is sqrt(max(1, rows / columns)), or under "match_rms_adamw" 0.2 sqrt(max(rows, columns)): an orthogonal update
    then has the root mean square that Adam's usually has.
    """
    rows, columns = param.shape
    momentum_buffer = momentum_buffer * momentum + grad * (1 - momentum)
    direction = momentum_buffer * momentum + grad * (1 - momentum) if nesterov else momentum_buffer
    matched = adjust_lr_fn == "match_rms_adamw"
    size = 0.2 * max(rows, columns) ** 0.5 if matched else max(1.0, rows / columns) ** 0.5
    update = orthogonalize(direction, rule, steps, coefficients, eps)
    return [param * (1 - lr * weight_decay) - update * (lr * size), momentum_buffer]


class Muon(AdamW):
    """Muon for groups with ``use_muon`` (the default), which hold matrices; AdamW with ``betas`` for the others.

    :func:`muon_groups` makes the groups of a model. ``adjust_lr_fn`` is torch's: "match_rms_adamw" lets both kinds of
    groups have one learning rate, None and "original" ask for one of about ten times AdamW's. An update needs the whole
    matrix: a model whose matrices are split over ranks is refused, whole ones with owners (ZeRO) are not.
    """

    roles: ClassVar[Mapping[str, Role]] = {"momentum_buffer": Role.FIRST_MOMENT, **AdamW.roles}
    needs_whole_matrices: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        adjust_lr_fn: str | None = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        policy: Policy | None = None,
        seed: int = 0,
    ) -> None:
        if not (0 <= momentum < 1 and ns_steps >= 1):
            raise ValueError(
                f"momentum must lie in [0, 1) and ns_steps be at least 1, got momentum={momentum}, ns_steps={ns_steps}"
            )
        if adjust_lr_fn not in STEP_SIZES:
            raise ValueError(f"adjust_lr_fn must be one of {STEP_SIZES}, got {adjust_lr_fn!r}")
        self._own = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "adjust_lr_fn": adjust_lr_fn,
            "use_muon": True,
        }
        super().__init__(params, lr, betas, eps, weight_decay, policy=policy, seed=seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's; raises ValueError for a ``use_muon`` group with a parameter that is no matrix."""
        for name, value in self._own.items():
            self.defaults.setdefault(name, value)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"] if group["use_muon"] else ():
            if param.ndim != 2:
                self.param_groups.pop()
                raise ValueError(
                    f"a parameter that Muon steps must be a matrix, got shape {tuple(param.shape)}; give "
                    "muon_groups(model), or put it into a group with use_muon=False"
                )

    def roles_of(self, group: Group) -> Mapping[str, Role]:
        return {"momentum_buffer": Role.FIRST_MOMENT} if group["use_muon"] else AdamW.roles

    def betas(self, group: Group) -> Mapping[str, float]:
        return {"momentum_buffer": group["momentum"]} if group["use_muon"] else super().betas(group)

    def update(self, param: Tensor, grad: Tensor, states: list[Tensor], group: Group, step: int) -> list[Tensor]:
        if not group["use_muon"]:
            return super().update(param, grad, states, group, step)
        return muon_update(
            param,
            grad,
            states[0],
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=bool(group["nesterov"]),
            rule=replace(self.policy[Role.INPUT], history=0),
            steps=group["ns_steps"],
            coefficients=group["ns_coefficients"],
            eps=float(group["eps"]),
            adjust_lr_fn=group["adjust_lr_fn"],
        )

    def fused_update(self, rows: Sequence[Row], group: Group, bad: Tensor | None) -> bool:
        return not group["use_muon"] and super().fused_update(rows, group, bad)


def muon_groups(
    model: nn.Module, *, adamw: Sequence[str] = (), weight_decay: float = 0.1, **options: Any
) -> list[dict[str, Any]]:
    """Parameter groups of a model for :class:`Muon`: the weights of its Linears; other matrices; vectors, undecayed.

    Stepped by AdamW are embeddings and what is tied to one, output heads (``lm_head``, ``head``), vectors, parameters
    of more than two dims, and modules that a pattern of ``adamw`` names as a shell does. ``options`` go into the first
    group. Groups that would be empty are left out.
    """
    patterns = [*adamw, *(pattern for pattern, _ in DEFAULT_EXCEPTIONS)]
    hidden: dict[int, Tensor] = {}
    kept: set[int] = set()
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) and not any(matches(name, pattern) for pattern in patterns)
        for parameter in module.parameters(recurse=False):
            if linear and parameter.ndim == 2:
                hidden[id(parameter)] = parameter
            else:
                kept.add(id(parameter))
    rest = [p for p in model.parameters() if id(p) in kept or id(p) not in hidden]
    groups = [
        {"params": [p for i, p in hidden.items() if i not in kept], "weight_decay": weight_decay, **options},
        {"params": [p for p in rest if p.ndim >= 2], "use_muon": False, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "use_muon": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
