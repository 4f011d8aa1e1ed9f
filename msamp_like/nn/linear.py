"""Fp8Linear: ``nn.Linear`` with low-precision products; and what another layer says to be converted like it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from msamp_like.nn.functional import LinearGemm
from msamp_like.tensor import ScalingTensor


def rearm_hooks(parameters: Iterable[Tensor]) -> None:
    """Make the hooks that parameters list fire again after ``swap_tensors``, which leaves the firing half behind."""
    for parameter in parameters:
        if parameter._backward_hooks is not None:
            parameter._backward_hooks = parameter._backward_hooks
        if parameter._post_accumulate_grad_hooks is not None:
            parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks


class KeepsHooks:
    """Mixed into a module: ``to``, ``cuda`` and ``half``, of it or of a module around it, keep its parameters' hooks.

    torch exchanges the contents of our weights there, and their hooks, which round gradients and reduce them, would be
    left behind.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        made = super()._apply(fn, recurse)  # type: ignore[misc]
        rearm_hooks(self.parameters())  # type: ignore[attr-defined]
        return made


class ReadsAsBase(KeepsHooks):
    """Mixed into a subclass of ``nn.Linear`` or ``nn.Embedding`` whose forward reads ``weight`` as its base does, in
    ``F.linear`` or ``F.embedding`` alone: the conversion then takes the weight and leaves the forward as it is."""


class Fp8Linear(KeepsHooks, torch.nn.Linear):
    """``nn.Linear`` whose products run as its policy says; made by :func:`msamp_like.nn.convert`."""

    weight: ScalingTensor  # type: ignore[assignment]
    gemm: LinearGemm

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features)."""
        return self.gemm.linear(input, self.weight, self.bias)
