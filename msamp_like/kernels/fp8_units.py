"""What CUDA and ROCm devices multiply in FP8; needs no Triton, so that a report can ask as well."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from msamp_like.formats import E4M3, E4M3FNUZ


class Units(NamedTuple):
    """What FP8 units multiply; ``e4m3`` is the dtype of the format of 3 mantissa bits that they know, None without
    units."""

    e4m3: torch.dtype | None = None
    rows: bool = False  # one scale a row of either operand, in torch's product
    tiles: bool = False  # 1x128 and 128x128, likewise
    mx: bool = False  # 1x32 with scales in E8M0, likewise
    triton: bool = False  # Triton's dot product takes the formats


@functools.cache
def fp8_units(device: torch.device) -> Units:
    """The units of a CUDA or ROCm device."""
    return _units(device)


@functools.cache
def has_fp8_units(device: torch.device) -> bool:
    """Whether the device multiplies OCP E4M3 and E5M2, what the levels store."""
    return _units(device).e4m3 == E4M3.dtype


def _units(device: torch.device) -> Units:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None:
        return amd_units(capability)
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return nvidia_units(capability, (int(major), int(minor)))


def nvidia_units(capability: tuple[int, int], cuda: tuple[int, int]) -> Units:
    """The OCP formats from capability 8.9. torch's product takes row scales from 9.0; tiles of 128 on 9.x alone, from
    CUDA 12.9; MX blocks from 10.0."""
    return Units(
        E4M3.dtype if capability >= (8, 9) else None,
        rows=capability >= (9, 0),
        tiles=capability[0] == 9 and cuda >= (12, 9),
        mx=capability >= (10, 0) and cuda >= (12, 8),
        triton=capability >= (8, 9),
    )


def amd_units(capability: tuple[int, int]) -> Units:
    """The fnuz formats on gfx94x, the OCP ones on gfx950 and gfx12; row scales where there are units, no tiles."""
    if capability == (9, 4):
        return Units(E4M3FNUZ.dtype, rows=True)
    return Units(E4M3.dtype, rows=True) if capability == (9, 5) or capability >= (12, 0) else Units()
