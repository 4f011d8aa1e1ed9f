"""Recipes: how the operands of the products are scaled, by name; any level can have any of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from msamp_like.formats import ROW, WHOLE, Block


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the operands of the products are scaled: blocks of INPUT, WEIGHT and GRAD_OUTPUT as the product reads them
    that contracts over their last dim, the steps of history, and whether a scale serves so few elements that gradients
    of outputs are in the INPUT's format, which has more precision (6 dB) and less range."""

    blocks: tuple[Block, Block, Block] = (WHOLE, WHOLE, WHOLE)
    history: int = 0
    narrow_gradients: bool = False


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "delayed": Recipe(history=16),
        "current": Recipe(),
        "rowwise": Recipe(blocks=(ROW, ROW, ROW), narrow_gradients=True),
        "blockwise": Recipe(blocks=((1, 128), (128, 128), (1, 128)), narrow_gradients=True),
        "mxfp8": Recipe(blocks=((1, 32), (1, 32), (1, 32)), narrow_gradients=True),
    }
)
"""One scale a tensor from past steps or from the tensor at hand; one a row; one a block (DeepSeek-AI, "DeepSeek-V3
Technical Report", 2024, https://arxiv.org/abs/2412.19437); one for each 32 elements, a power of two (OCP Microscaling
Formats (MX) Specification, revision 1.0, 2023)."""
