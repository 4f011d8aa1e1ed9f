"""Fp8Linear, and what the weight of one knows about its products."""

from __future__ import annotations

import torch
from torch import Tensor

from msamp_like.kernels import Operand
from msamp_like.nn import functional
from msamp_like.policy import Policy, Role
from msamp_like.scaling import Scaler
from msamp_like.tensor import ScalingTensor


class LinearGemm(torch.nn.Module):
    """The rules and scalers of one weight's three products.

    The layer holds it as a submodule, so that ``model.to(device)`` and ``model.eval()`` reach it; the weight holds it
    too, so that ``F.linear`` with that weight, from wherever it is called, is the same computation.
    """

    def __init__(self, policy: Policy, name: str = "linear") -> None:
        super().__init__()
        self.name = name
        self.weight_rule = policy[Role.WEIGHT]
        self.input = Scaler(policy[Role.INPUT])
        self.grad_output = Scaler(policy[Role.GRAD_OUTPUT])

    def weight_operand(self, weight: ScalingTensor) -> Operand:
        """The compute copy of the weight, made once an optimizer step."""
        rule = self.weight_rule
        return weight.cast(rule.format, rule.block, rule.margin, rule.power_of_two)

    def linear(self, input: Tensor, weight: ScalingTensor, bias: Tensor | None) -> Tensor:
        """What ``F.linear(input, weight, bias)`` does with this weight."""
        return functional.linear(input, weight, bias, self)

    def extra_repr(self) -> str:
        return f"weight: {self.weight_rule}"


class Fp8Linear(torch.nn.Linear):
    """``nn.Linear`` whose products run as its policy says; made by :func:`msamp_like.nn.convert`."""

    weight: ScalingTensor  # type: ignore[assignment]
    gemm: LinearGemm

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features)."""
        return self.gemm.linear(input, self.weight, self.bias)
