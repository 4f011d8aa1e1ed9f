"""A line of a table of results, and by how much a target was missed."""

from __future__ import annotations

from typing import Any, NamedTuple

Result = dict[str, Any]


class Row(NamedTuple):
    """``to_reach`` is empty for what is reported and judged by nobody; ``missed`` says by how much, and what bounds the
    figure; it is empty where the target is reached."""

    figure: str
    to_reach: str
    measured: str
    missed: str = ""


def above(found: float, most: float, reason: str = "") -> str:
    """What to say of a figure that should be at most ``most``."""
    return "" if found <= most else _because(f"by {found / most - 1:.1%}", reason)


def below(found: float, least: float, reason: str = "") -> str:
    """What to say of a figure that should be at least ``least``."""
    return "" if found >= least else _because(f"by {1 - found / least:.1%}", reason)


def below_db(pairs: list[tuple[float, float]]) -> str:
    """The same of several (found, least) in dB."""
    worst = max(least - found for found, least in pairs)
    return "" if worst <= 0 else f"by {worst:.1f} dB"


def _because(by: str, reason: str) -> str:
    return f"{by} ({reason})" if reason else by
