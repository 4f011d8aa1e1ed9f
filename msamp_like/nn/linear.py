"""Fp8Linear: ``nn.Linear`` with low-precision products."""

from __future__ import annotations

import torch
from torch import Tensor

from msamp_like.nn.functional import LinearGemm
from msamp_like.tensor import ScalingTensor


class Fp8Linear(torch.nn.Linear):
    """``nn.Linear`` whose products run as its policy says; made by :func:`msamp_like.nn.convert`."""

    weight: ScalingTensor  # type: ignore[assignment]
    gemm: LinearGemm

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features)."""
        return self.gemm.linear(input, self.weight, self.bias)
