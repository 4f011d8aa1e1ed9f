"""Ways to keep a moment in eight bits a value: each takes FP32 values and gives back what would be read.

Our own words of what others do, to compare with on the same numbers:

    COAT         Xi et al., "COAT: Compressing Optimizer States and Activation for Memory-Efficient FP8 Training", 2024,
                 https://arxiv.org/abs/2410.19313: a power of the values that stretches each block's range to E4M3's
    FlashOptim   Gonzalez Ortiz et al., "FlashOptim: Optimizers for Memory Efficient Training", 2026,
                 https://arxiv.org/abs/2602.23349: blocks of 32, 8-bit integers of 2x / (1 + |x|) for a first moment and
                 of the square root for a second, to nearest

``uniform`` in [0, 1) of the values' shape rounds stochastically, None to nearest. Unbiased means: in the moment itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Codec = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Grid:
    """Small floating-point numbers without their sign: a step of the lowest binade, and the largest number."""

    mantissa_bits: int
    smallest_exponent: int  # of the smallest normal
    largest: float

    def neighbours(self, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """(the number at or below, the unit above it)."""
        exponent = torch.frexp(magnitude).exponent - 1
        unit = torch.exp2((exponent.clamp(min=self.smallest_exponent) - self.mantissa_bits).float())
        return torch.floor(magnitude / unit) * unit, unit

    def round(self, magnitude: Tensor, uniform: Tensor | None) -> Tensor:
        """Each magnitude to a number of the grid."""
        below, unit = self.neighbours(magnitude.clamp(max=self.largest))
        steps = (magnitude.clamp(max=self.largest) - below) / unit
        up = torch.round(below / unit + steps) - below / unit if uniform is None else (steps > uniform).float()
        return (below + up * unit).clamp(max=self.largest)


E4M3 = Grid(3, -6, 448.0)
UE5M3 = Grid(3, -14, 61440.0)
UE4M4 = Grid(4, -7, 2.0**8 * (2 - 2.0**-4))


def in_blocks(codec: Codec, width: int) -> Codec:
    """``codec`` on runs of ``width`` values of a row, each over its power-of-two scale: amax falls in (0.5, 1]."""

    def coded(values: Tensor, uniform: Tensor | None) -> Tensor:
        rows, columns = values.shape
        blocks = values.view(rows, columns // width, width)
        amax = blocks.abs().amax(dim=2, keepdim=True)
        scale = torch.where(amax > 0, torch.exp2(torch.ceil(torch.log2(amax))), 1.0)
        drawn = None if uniform is None else uniform.view(blocks.shape)
        return (codec(blocks / scale, drawn) * scale).view(rows, columns)

    return coded


def of_grid(grid: Grid, *, keeps_small: bool = False) -> Codec:
    """The numbers as they are; with ``keeps_small``, what would become zero is the smallest number instead."""
    top = 2.0 ** math.floor(math.log2(grid.largest))  # a block's amax may be 1: the largest power of two is safe
    least = 2.0 ** (grid.smallest_exponent - grid.mantissa_bits) if keeps_small else 0.0

    def coded(values: Tensor, uniform: Tensor | None) -> Tensor:
        magnitude = values.abs() * top
        kept = torch.where(magnitude > 0, grid.round(magnitude, uniform).clamp(min=least), 0.0)
        return torch.copysign(kept / top, values)

    return coded


def root(grid: Grid, *, unbiased: bool) -> Codec:
    """The square root on a grid. ``unbiased``: the odds of the two neighbours keep the mean of the square; else of the
    root, and the mean of the square grows with every rounding."""
    top = 2.0 ** math.floor(math.log2(grid.largest))

    def coded(values: Tensor, uniform: Tensor | None) -> Tensor:
        stored = values.clamp(min=0.0).sqrt() * top
        if uniform is None or not unbiased:
            return (grid.round(stored, uniform) / top).square()
        below, unit = grid.neighbours(stored)
        low, high = (below / top).square(), ((below + unit) / top).square()
        return torch.where((values - low) / (high - low) > uniform, high, low)

    return coded


def expanded(grid: Grid) -> Codec:
    """COAT: sign(x) (|x| / sqrt(max min))^k, k such that the block's range becomes the format's, in sixteenths."""
    wide = math.log2(grid.largest**2 / 2)

    def coded(values: Tensor, uniform: Tensor | None) -> Tensor:
        magnitude = values.abs()
        high = magnitude.amax(dim=2, keepdim=True).clamp(min=1e-38)
        low = torch.where(magnitude > 0, magnitude, high).amin(dim=2, keepdim=True)
        spread = torch.log2(high / low).clamp(min=1e-3)
        k = (torch.floor(wide / spread * 16) / 16).clamp(1 / 16, 16.0)
        middle = (high * low).sqrt()
        scale = grid.largest / (high / middle).pow(k)
        stored = grid.round((magnitude / middle).pow(k) * scale, uniform) / scale
        return torch.copysign(stored.pow(1 / k) * middle, values) * (magnitude > 0)

    return coded


def _whole(value: Tensor, uniform: Tensor | None) -> Tensor:
    return value.round() if uniform is None else torch.floor(value + uniform)


def softsign() -> Codec:
    """FlashOptim's first moment: 127 steps of 2x / (1 + |x|) on each side."""

    def coded(values: Tensor, uniform: Tensor | None) -> Tensor:
        z = _whole(2 * values / (1 + values.abs()) * 127, uniform).clamp(-127, 127) / 127
        return z / (2 - z.abs())

    return coded


def linear_root() -> Codec:
    """FlashOptim's second moment: 255 steps of the square root."""

    def coded(values: Tensor, uniform: Tensor | None) -> Tensor:
        return (_whole(values.clamp(min=0.0).sqrt() * 255, uniform).clamp(0, 255) / 255).square()

    return coded


SECOND: dict[str, Codec] = {
    "e4m3": in_blocks(of_grid(E4M3), 128),
    "e4m3, block 32": in_blocks(of_grid(E4M3), 32),
    "ue5m3": in_blocks(of_grid(UE5M3), 128),
    "ue5m3, block 32": in_blocks(of_grid(UE5M3), 32),
    "ue4m4": in_blocks(of_grid(UE4M4), 128),
    "ue4m4, block 32": in_blocks(of_grid(UE4M4), 32),
    "ue4m4, never zero": in_blocks(of_grid(UE4M4, keeps_small=True), 128),
    "root in e4m3, unbiased": in_blocks(root(E4M3, unbiased=True), 128),
    "root in e4m3, biased": in_blocks(root(E4M3, unbiased=False), 128),
    "COAT": in_blocks(expanded(E4M3), 128),
    "FlashOptim": in_blocks(linear_root(), 32),
}
FIRST: dict[str, Codec] = {
    "e4m3": in_blocks(of_grid(E4M3), 128),
    "e4m3, block 32": in_blocks(of_grid(E4M3), 32),
    "COAT": in_blocks(expanded(E4M3), 128),
    "FlashOptim": in_blocks(softsign(), 32),
}
