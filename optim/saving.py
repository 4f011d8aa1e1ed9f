"""A saved optimizer state beside the optimizer that is to take it: what belongs to which parameter, whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from msamp_like.optim.residual import AMAX

Saved = Mapping[str, Any]


def matched(optimizer: torch.optim.Optimizer, state_dict: Saved) -> Iterable[tuple[Tensor, Saved, Saved]]:
    """Each parameter that has a saved state, its group, and the state."""
    parameters = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    pairs = zip(parameters, indices, strict=True)
    return ((param, group, state_dict["state"][i]) for (param, group), i in pairs if i in state_dict["state"])


def steps(states: Saved) -> int:
    """The steps that a saved state has seen."""
    # torch's SGD counts no steps, but its buffer says that there was one
    return int(states.get("step", 1 if states else 0))


def check(
    optimizer: torch.optim.Optimizer,
    state_dict: Saved,
    names_of: Callable[[Saved], Iterable[str]],
    in_two_parts: Callable[[Tensor], bool],
) -> None:
    """Raise ValueError unless ``optimizer`` can take all of ``state_dict``; ``names_of`` a group are its states'."""
    sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (optimizer.param_groups, state_dict["param_groups"]))
    if sizes != saved_sizes:
        raise ValueError(
            f"a saved optimizer state must have the same parameter groups, got sizes {saved_sizes} for {sizes}; "
            "build the optimizer as it was when the state was saved"
        )
    for param, group, saved in matched(optimizer, state_dict):
        names, found = names_of(group), set(saved) - {"step", "master_weight", AMAX}
        if found and found != set(names):
            raise ValueError(
                f"a saved optimizer state must be of a {type(optimizer).__name__}, whose states are "
                f"{', '.join(names)}, got {', '.join(sorted(found))}; build the optimizer of the checkpoint"
            )
        if AMAX in saved and not in_two_parts(param):
            raise ValueError(
                "a saved residual is half of a master, got one for a parameter whose master is in one part; "
                "initialize with the level of the checkpoint"
            )
        for name, value in saved.items():
            if name not in ("step", AMAX) and value is not None and value.shape != param.shape:
                raise ValueError(
                    f"the state {name!r} of a parameter must have its shape {tuple(param.shape)}, got "
                    f"{tuple(value.shape)}; the checkpoint is of another model"
                )
