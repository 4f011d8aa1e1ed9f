"""Tests that need a CUDA or ROCm device: its kernels against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, PyTorch sees none")
