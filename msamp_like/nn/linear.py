"""Fp8Linear: ``nn.Linear`` with low-precision products; and what another layer says to be converted like it."""

from __future__ import annotations

import torch
from torch import Tensor

from msamp_like.nn.functional import LinearGemm
from msamp_like.tensor import ScalingTensor


class ReadsAsBase:
    """Mixed into a subclass of ``nn.Linear`` or ``nn.Embedding`` whose forward reads ``weight`` as its base does, in
    ``F.linear`` or ``F.embedding`` alone: the conversion then takes the weight and leaves the forward as it is."""


class Fp8Linear(torch.nn.Linear):
    """``nn.Linear`` whose products run as its policy says; made by :func:`msamp_like.nn.convert`."""

    weight: ScalingTensor  # type: ignore[assignment]
    gemm: LinearGemm

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) to (..., out_features)."""
        return self.gemm.linear(input, self.weight, self.bias)
