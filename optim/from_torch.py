"""The user's torch optimizer, as one of ours: its groups, defaults and what it has stepped so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from msamp_like.optim.adam import Adam, AdamW
from msamp_like.optim.base import LowPrecisionOptimizer
from msamp_like.optim.lion import Lion
from msamp_like.optim.muon import Muon
from msamp_like.optim.placement import Placement
from msamp_like.optim.sgd import SGD
from msamp_like.policy import Policy

_OURS: Mapping[type[torch.optim.Optimizer], type[LowPrecisionOptimizer]] = {
    torch.optim.AdamW: AdamW,
    torch.optim.Adam: Adam,
    torch.optim.SGD: SGD,
    torch.optim.Muon: Muon,
    **{ours: ours for ours in (Adam, AdamW, SGD, Lion, Muon)},
}
_REFUSED = ("amsgrad", "maximize", "differentiable")


def check(optimizer: torch.optim.Optimizer) -> type[LowPrecisionOptimizer]:
    """The class of ours that does what ``optimizer`` does; raises TypeError or ValueError where there is none."""
    derived = type(optimizer) if isinstance(optimizer, LowPrecisionOptimizer) else None
    ours = _OURS.get(type(optimizer), derived)
    if ours is None:
        known = ", ".join(f"{cls.__module__.partition('.')[0]}.optim.{cls.__name__}" for cls in _OURS)
        raise TypeError(
            f"an optimizer must be one of {known}, got {type(optimizer).__module__}.{type(optimizer).__name__}; "
            "build one of these, or derive yours from msamp_like.optim.LowPrecisionOptimizer"
        )
    for group in optimizer.param_groups:
        for option in _REFUSED:
            if group.get(option):
                raise ValueError(f"{option} must be off, got {option}={group[option]}; build the optimizer without it")
    return AdamW if ours is Adam and optimizer.param_groups[0].get("decoupled_weight_decay") else ours


def from_torch(
    optimizer: torch.optim.Optimizer,
    policy: Policy,
    originals: Mapping[Tensor, Tensor],
    seed: int,
    placement: Placement | None = None,
    *,
    offload: bool = False,
) -> LowPrecisionOptimizer:
    """Ours in place of ``optimizer``, with the very same group dicts: a scheduler that holds the old one drives ours.

    ``originals`` are the FP32 values of the converted parameters, from which masters are made; of those that
    ``placement`` gives to other ranks none is. With ``offload`` states and masters are made on the host.
    """
    ours: Any = check(optimizer)  # each has its own hyperparameters, which the groups hold already
    made: LowPrecisionOptimizer = ours(optimizer.param_groups, policy=policy, seed=seed)
    made.defaults = {**optimizer.defaults}
    if placement is not None:
        made.place(placement)
    if offload:
        made.offload()
    for group in made.param_groups:
        for param in group["params"]:
            states: Mapping[str, Any] = optimizer.state.get(param, {})
            made.adopt(param, states, originals.get(param), group)
    optimizer.state.clear()  # its states are ours now; two copies would double the memory
    made.register_step_post_hook(_tells_schedulers(optimizer))
    return made


def _tells_schedulers(source: torch.optim.Optimizer) -> Any:
    def stepped(*_: Any) -> None:
        # A scheduler built on the source asks it whether a step came before its own, and warns if not.
        source._opt_called = True  # type: ignore[attr-defined]

    return stepped
