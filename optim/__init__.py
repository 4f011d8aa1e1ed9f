"""Optimizers that keep their state in low precision."""

if __name__ != "msamp_like.optim":
    raise ImportError(
        f"this folder is the package msamp_like.optim, got an import of {__name__!r}; "
        "run 'pip install -e .' once and import msamp_like.optim"
    )

from msamp_like.optim.adam import Adam, AdamW
from msamp_like.optim.base import LowPrecisionOptimizer
from msamp_like.optim.from_torch import check, from_torch
from msamp_like.optim.lion import Lion
from msamp_like.optim.muon import Muon, muon_groups
from msamp_like.optim.release import GradientRelease
from msamp_like.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "GradientRelease",
    "Lion",
    "LowPrecisionOptimizer",
    "Muon",
    "check",
    "from_torch",
    "muon_groups",
]
