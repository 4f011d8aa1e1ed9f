"""Which CUDA and ROCm devices multiply FP8 in hardware; needs no Triton, so that a report can ask as well."""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_fp8_units(device: torch.device) -> bool:
    """Whether the device multiplies OCP E4M3 and E5M2: NVIDIA from capability 8.9, AMD gfx950 and gfx12.

    AMD's gfx942 has FP8 units for another encoding (no negative zero, other bias), which would need other payloads.
    """
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None:
        return capability == (9, 5) or capability >= (12, 0)
    return capability >= (8, 9)
