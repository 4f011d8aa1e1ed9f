"""What ties a converted model together, and the class that a model gets with it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msamp_like.comm.axes import Axes, Norms
from msamp_like.comm.data_parallel import DataParallel
from msamp_like.comm.zero import OwnedWeights
from msamp_like.nn.conversion import Plan
from msamp_like.nn.linear import rearm_hooks
from msamp_like.nn.saved_activations import SavedActivations
from msamp_like.optim.offload import Offloaded, holding
from msamp_like.policy import Policy, Role, Rule
from msamp_like.scaling import quantize
from msamp_like.tensor import ScalingTensor, real, unscaled


class Wiring:
    """What ties a converted model together. A deep copy of the model stands outside data parallelism and optimizer."""

    def __init__(self, policy: Policy, plans: Sequence[Plan], axes: Axes) -> None:
        self.policy = policy
        self.plans = tuple(plans)
        self.axes = axes
        self.reducer: DataParallel | None = None
        self.norms: Norms | None = None
        self.placements: list[OwnedWeights | None] = []
        self.rounded: list[Tensor] = []
        self.scattered: list[Tensor] = []
        self.saved: SavedActivations | None = None
        self.removable: list[Any] = []
        self.released = False
        self.releases_gradients = False
        self.homes: list[Offloaded] = []

    def round_gradients(self, parameters: Iterable[Tensor], scattered: Sequence[Tensor]) -> None:
        """Have the first gradient of each of the parameters stored as the policy says, and marked if ``scattered``."""
        rule, elsewhere = self.policy[Role.GRAD_WEIGHT], {id(p) for p in scattered}
        self.scattered += scattered
        for parameter in parameters:
            if parameter.requires_grad:
                self.rounded.append(parameter)
                hook = _rounds_first(parameter, rule, id(parameter) in elsewhere)
                self.removable.append(parameter.register_hook(hook))

    def save_activations(self, model: nn.Module, saved: SavedActivations) -> None:
        """Have what the model keeps for backward stored as ``saved`` says."""
        self.saved = saved
        self.removable += saved.attach(model)

    def stepped(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """What stands for each of the parameters where it is stepped, and has its gradient."""
        found = {id(p): side[0] for home in self.homes for p, side in home.sides()}
        return [found.get(id(p), p) for p in parameters]

    def __deepcopy__(self, memo: dict[int, Any]) -> Wiring:
        made = Wiring(self.policy, [copy.deepcopy(plan, memo) for plan in self.plans], Axes())
        made.saved = copy.deepcopy(self.saved, memo)
        made.round_gradients(copy.deepcopy(self.rounded, memo), copy.deepcopy(self.scattered, memo))
        return made


class _Copied:
    """Rebuilds a converted model for ``copy.deepcopy``, and says why there is nothing to pickle."""

    def __init__(self, rebuild: Callable[..., Any]) -> None:
        self.rebuild = rebuild

    def __call__(self, *args: Any) -> Any:
        return self.rebuild(*args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a converted model is saved by its state, got the model itself, whose class and hooks live in this process "
            "alone; save amp.state_dict(model, optimizer) or model.state_dict(), or amp.restore(model) first"
        )


class Converted:
    """Mixed into the class of a model by :func:`initialize`; the model object stays the one the user built."""

    _wiring: Wiring

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Within it, backward accumulates gradients on this rank, on their device; the first backward outside of it
        reduces the sum, or sends it to the host."""
        reducer = self._wiring.reducer
        if self._wiring.releases_gradients:
            raise RuntimeError(
                "micro-batches add up in gradients that stay, got no_sync() with gradient_release, which frees each in "
                "the backward that made it; take one larger batch a step, or initialize without gradient_release"
            )
        return reducer.no_sync() if reducer is not None else holding(self._wiring.homes)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """torch's, of gradients wherever they are."""
        super().zero_grad(set_to_none)  # type: ignore[misc]
        for home in self._wiring.homes:
            home.drop()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What ``to``, ``cuda`` and ``half`` call. torch exchanges the contents of our weights there, and their hooks,
        which round gradients and reduce them, would be left behind."""
        made = super()._apply(fn, recurse)  # type: ignore[misc]
        rearm_hooks(self.parameters())  # type: ignore[attr-defined]
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts: Any = super().__reduce_ex__(protocol)
        return (_Copied(parts[0]), *parts[1:])


def adopt_class(model: nn.Module, wiring: Wiring) -> None:
    cls = type(model)
    model.__class__ = type(cls.__name__, (Converted, cls), {"__module__": cls.__module__})
    model._wiring = wiring  # type: ignore[assignment]


def wiring_of(model: nn.Module) -> Wiring:
    if not isinstance(model, Converted):
        raise ValueError(
            f"this needs the model that amp.initialize returned, got a plain {type(model).__name__}; initialize it "
            "first, and pass the model itself, not a wrapper of it"
        )
    return model._wiring


def policy_of(model: nn.Module) -> Policy:
    """The policy that the model was initialized with."""
    return wiring_of(model).policy


def release(model: nn.Module) -> None:
    """Let go of the model's parameters, for a host that puts shards in their place; ``amp.restore`` then refuses."""
    wiring = wiring_of(model)
    for removable in wiring.removable:
        removable.remove()
    wiring.rounded.clear()
    wiring.removable.clear()
    wiring.released = True


def _rounds_first(parameter: Tensor, rule: Rule, scattered: bool) -> Callable[[Tensor], Tensor]:
    def rounded(grad: Tensor) -> Tensor:
        """The first micro-batch's gradient is stored as the rule says; from the second on ``.grad`` is a BF16 sum."""
        held = parameter.grad
        if isinstance(held, ScalingTensor) and held.format.scaled:
            held.replace_(unscaled(real(held, torch.bfloat16), held.dtype))
        if held is not None or (isinstance(grad, ScalingTensor) and grad.format == rule.format):
            return grad
        stored = quantize(grad, rule)
        made = ScalingTensor(stored.payload, stored.scale_inv, stored.block, grad.dtype)
        made.scattered = scattered
        return made

    return rounded
