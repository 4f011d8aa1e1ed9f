"""FP8 training in one line: ``model, optimizer = amp.initialize(model, optimizer, level="O2")``.

This file wires the parts together and holds no arithmetic of its own: conversion (:mod:`msamp_like.nn`), optimizer
(:mod:`msamp_like.optim`), data parallelism (:mod:`msamp_like.comm`), and the state that a resume needs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msamp_like import policy as policies
from msamp_like.comm.collectives import replicate
from msamp_like.comm.data_parallel import DataParallel
from msamp_like.comm.group import CountedGroup
from msamp_like.nn import conversion
from msamp_like.nn.clip_grad import clip_grad_norm_
from msamp_like.nn.conversion import Plan
from msamp_like.optim import LowPrecisionOptimizer, check, from_torch
from msamp_like.policy import Policy, Role, Rule
from msamp_like.scaling import Scaler, quantize, roll
from msamp_like.telemetry import memory
from msamp_like.telemetry.report import Report, make_report
from msamp_like.tensor import ScalingTensor, real, unscaled

__all__ = [
    "Converted",
    "clip_grad_norm_",
    "fp8_report",
    "initialize",
    "load_state_dict",
    "policy_of",
    "release",
    "restore",
    "state_bytes",
    "state_dict",
    "wire_bytes",
]

Model = TypeVar("Model", bound=nn.Module)
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


class _Wiring:
    """What ties a converted model together. A deep copy of the model stands outside data parallelism and optimizer."""

    def __init__(self, policy: Policy, plans: Sequence[Plan], reducer: DataParallel | None = None) -> None:
        self.policy = policy
        self.plans = tuple(plans)
        self.reducer = reducer
        self.rounded: list[Tensor] = []
        self.removable: list[Any] = []
        self.released = False

    def round_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Have the first gradient of each of the parameters stored as the policy says."""
        for parameter in parameters:
            if parameter.requires_grad:
                self.rounded.append(parameter)
                self.removable.append(parameter.register_hook(_rounds_first(parameter, self.policy[Role.GRAD_WEIGHT])))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Wiring:
        made = _Wiring(self.policy, [copy.deepcopy(plan, memo) for plan in self.plans])
        made.round_gradients(copy.deepcopy(self.rounded, memo))
        return made


class Converted:
    """Mixed into the class of a model by :func:`initialize`; the model object stays the one the user built."""

    _wiring: _Wiring

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Within it, backward accumulates gradients on this rank; the first backward outside of it reduces the sum."""
        reducer = self._wiring.reducer
        return reducer.no_sync() if reducer is not None else contextlib.nullcontext()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What ``to``, ``cuda`` and ``half`` call. torch exchanges the contents of our weights there, and their hooks,
        which round gradients and reduce them, would be left behind."""
        made = super()._apply(fn, recurse)  # type: ignore[misc]
        conversion.rearm_hooks(self.parameters())  # type: ignore[attr-defined]
        return made


def initialize(
    model: Model,
    optimizer: Optimizers = None,
    level: str | Policy = "O2",
    *,
    recipe: str | None = None,
    overrides: Mapping[str, str] | None = None,
    data_parallel: bool = True,
    process_group: dist.ProcessGroup | None = None,
    seed: int = 0,
) -> tuple[Model, Any]:
    """Convert ``model`` in place to train in FP8 and return it with the optimizer that steps it.

    ``level`` is "O0", "O1", "O2" or a :class:`~msamp_like.policy.Policy`. ``recipe`` is "delayed" (the level's own) or
    "current". ``overrides`` maps module-name patterns to "fp8", "bf16" or "skip". ``optimizer`` is the torch optimizer
    built on the model's parameters (one of ours comes back), a sequence of them (a list does), or None (None does) for
    a model that only runs; schedulers built on it go on working. Where a process group of more than one rank is
    initialised the model becomes data-parallel over it, unless ``data_parallel=False``. ``seed`` starts the random
    stream of stochastic rounding.

    Everything is checked before anything is changed. Raises ValueError or TypeError for an unknown level, recipe or
    override, a model that is converted already or has nothing to convert, an optimizer that cannot be mapped or holds
    parameters that are not the model's, and a parameter in two optimizers.
    """
    policy = policies.resolve(level)
    policy = policy.with_recipe(recipe) if recipe is not None else policy
    policy = policy.override(overrides) if overrides else policy
    several = isinstance(optimizer, Sequence)
    sources = [] if optimizer is None else list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    _check(model, sources, overrides or {})

    initialized = data_parallel and dist.is_available() and dist.is_initialized()
    parallel = initialized and dist.get_world_size(process_group) > 1
    if parallel:  # before conversion: masters are made from the values that every rank starts with
        replicate([*model.named_parameters(), *model.named_buffers()], CountedGroup(process_group))
    plans = conversion.plan(model, policy)
    originals = conversion.convert(model, policy)
    wiring = _Wiring(policy, plans)
    _adopt_class(model, wiring)
    wiring.round_gradients(originals)
    optimizers = [from_torch(source, policy, originals, seed) for source in sources]
    if parallel:
        wiring.reducer = DataParallel(
            list(model.named_parameters()),
            list(model.named_buffers()),
            rule=policy[Role.GRAD_WEIGHT],
            group=process_group,
        )
    _roll_with(model, optimizers, wiring.reducer)
    return model, optimizers if several else optimizers[0] if optimizers else None


def _check(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], overrides: Mapping[str, str]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, Converted) or any(isinstance(p, ScalingTensor) for p in model.parameters()):
        raise ValueError(
            "a model is initialized once, got one that is converted already; call amp.restore(model) first to "
            "change its level, and give several optimizers in one call as a list"
        )
    names = [name for name, _ in model.named_modules()]
    for pattern in overrides:
        if not any(policies.matches(name, pattern) for name in names):
            raise ValueError(
                f"an override must match a module's name, got {pattern!r}, which matches none of {len(names)}; "
                "list them with model.named_modules()"
            )
    known = {id(p): name for name, p in model.named_parameters()}
    owner: dict[int, int] = {}
    for number, optimizer in enumerate(optimizers):
        check(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in known:
                    raise ValueError(
                        f"an optimizer's parameters must be the model's, got one of shape {tuple(parameter.shape)} "
                        "that is not; build it on model.parameters() of this very model, after moving it to its device"
                    )
                if owner.setdefault(id(parameter), number) != number:
                    raise ValueError(
                        f"a parameter belongs to one optimizer, got {known[id(parameter)]!r} in two; "
                        "take it out of one of them"
                    )


def _adopt_class(model: nn.Module, wiring: _Wiring) -> None:
    cls = type(model)
    model.__class__ = type(cls.__name__, (Converted, cls), {"__module__": cls.__module__})
    model._wiring = wiring  # type: ignore[assignment]


def _rounds_first(parameter: Tensor, rule: Rule) -> Callable[[Tensor], Tensor]:
    def rounded(grad: Tensor) -> Tensor:
        """The first micro-batch's gradient is stored as the rule says; from the second on ``.grad`` is a BF16 sum."""
        held = parameter.grad
        if isinstance(held, ScalingTensor) and held.format.scaled:
            held.replace_(unscaled(real(held, torch.bfloat16), held.dtype))
        if held is not None or (isinstance(grad, ScalingTensor) and grad.format == rule.format):
            return grad
        stored = quantize(real(grad), rule)
        return ScalingTensor(stored.payload, stored.scale_inv, stored.block, grad.dtype)

    return rounded


def _roll_with(model: nn.Module, optimizers: Sequence[LowPrecisionOptimizer], reducer: DataParallel | None) -> None:
    """Each optimizer's step rolls the scalers of its weights; those of frozen weights go with the first."""
    owned: list[list[Scaler]] = [[] for _ in optimizers]
    owner = {id(p): number for number, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    seen: set[int] = set()
    for parameter in model.parameters():
        gemm = parameter.gemm if isinstance(parameter, ScalingTensor) else None
        if optimizers and gemm is not None and id(gemm) not in seen:
            seen.add(id(gemm))
            owned[owner.get(id(parameter), 0)] += [gemm.input, gemm.grad_output]  # type: ignore[attr-defined]
    for optimizer, scalers in zip(optimizers, owned, strict=True):
        optimizer.register_step_post_hook(_rolls(scalers, reducer.reduce_max if reducer is not None else None))


def _rolls(scalers: list[Scaler], reduce_max: Callable[[Tensor], None] | None) -> Callable[..., None]:
    def rolled(*_: Any) -> None:
        roll(scalers, reduce_max)

    return rolled


def restore(model: nn.Module) -> nn.Module:
    """Back to a plain torch model, in place: parameters hold the values that FP8 training gave them, hooks are gone.

    The optimizer that ``initialize`` returned has nothing to step any more; build a torch optimizer to go on.
    """
    wiring = _wiring(model)
    if wiring.released:
        raise RuntimeError(
            "a model is restored while it holds its own parameters, got one whose shards fully_shard holds; "
            "gather plain values with msamp_like.integrations.fsdp2.full_state_dict(model)"
        )
    conversion.check_swappable((n, p) for n, p in model.named_parameters() if isinstance(p, ScalingTensor))
    for removable in wiring.removable:
        removable.remove()
    if wiring.reducer is not None:
        wiring.reducer.remove()
    model.__class__ = type(model).__mro__[2]
    del model._wiring
    return conversion.restore(model)


def _wiring(model: nn.Module) -> _Wiring:
    if not isinstance(model, Converted):
        raise ValueError(
            f"this needs the model that amp.initialize returned, got a plain {type(model).__name__}; initialize it "
            "first, and pass the model itself, not a wrapper of it"
        )
    return model._wiring


def policy_of(model: nn.Module) -> Policy:
    """The policy that the model was initialized with."""
    return _wiring(model).policy


def release(model: nn.Module) -> None:
    """Let go of the model's parameters, for a host that puts shards in their place; :func:`restore` then refuses."""
    wiring = _wiring(model)
    for removable in wiring.removable:
        removable.remove()
    wiring.rounded.clear()
    wiring.removable.clear()
    wiring.released = True


# --- state ----------------------------------------------------------------------------------------------------------


def _scalers(model: nn.Module) -> Iterator[tuple[str, Scaler]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Scaler))


def _listed(optimizer: LowPrecisionOptimizer | Sequence[LowPrecisionOptimizer]) -> list[LowPrecisionOptimizer]:
    return list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]


def state_dict(model: nn.Module, optimizer: LowPrecisionOptimizer | Sequence[LowPrecisionOptimizer]) -> dict[str, Any]:
    """Everything a resume needs, the same on every data-parallel rank: weights, optimizer states, amax histories.

    Holds the live tensors, not copies, and no pickled object: nested dicts and lists of tensors and plain values.
    """
    return {
        "policy": str(_wiring(model).policy),
        "model": dict(model.state_dict()),
        "optimizers": [o.state_dict() for o in _listed(optimizer)],
        "scalers": {name: scaler.state() for name, scaler in _scalers(model)},
    }


def load_state_dict(
    model: nn.Module,
    optimizer: LowPrecisionOptimizer | Sequence[LowPrecisionOptimizer],
    state: Mapping[str, Any],
) -> None:
    """Continue from :func:`state_dict`, bit for bit, at any world size.

    Raises ValueError, before anything is written, for the state of another policy, model or set of optimizers.
    """
    policy, optimizers = str(_wiring(model).policy), _listed(optimizer)
    if state.get("policy") != policy:
        raise ValueError(
            "a saved state must be of the policy that the model was initialized with, got\n"
            f"{state.get('policy')}\nfor\n{policy}\ninitialize with the level, recipe and overrides of the checkpoint"
        )
    if len(state["optimizers"]) != len(optimizers):
        raise ValueError(f"the state holds {len(state['optimizers'])} optimizers, got {len(optimizers)} to load into")
    current = model.state_dict()
    shapes = {n: getattr(t, "shape", None) for n, t in current.items()}  # an extra state is no tensor
    wrong = [n for n, t in state["model"].items() if n not in current or shapes[n] != getattr(t, "shape", None)]
    wrong += [n for n in current if n not in state["model"]]
    scalers = dict(_scalers(model))
    wrong += sorted(set(scalers) ^ set(state["scalers"]))
    if wrong:
        raise ValueError(
            f"a saved state must be of the same model, {len(wrong)} names or shapes differ, first {wrong[0]!r}; "
            "build the model with the settings of the checkpoint"
        )
    for one, saved in zip(optimizers, state["optimizers"], strict=True):
        one.check_state(saved)
    model.load_state_dict(state["model"])
    for one, saved in zip(optimizers, state["optimizers"], strict=True):
        one.load_state_dict(saved)
    for name, scaler in scalers.items():
        scaler.load_state(state["scalers"][name])


# --- proof ----------------------------------------------------------------------------------------------------------


def fp8_report(model: nn.Module) -> Report:
    """Every Linear and embedding: in FP8 or not, why not, and the share of the FLOPs and bytes. Print it."""
    wiring = _wiring(model)
    return make_report(wiring.policy.name, wiring.plans)


def state_bytes(model: nn.Module, optimizer: LowPrecisionOptimizer | Sequence[LowPrecisionOptimizer]) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer states by role, measured on the tensors that exist now."""
    optimizers = _listed(optimizer)
    states = [(p, s) for o in optimizers for p, s in o.state.items()]
    roles = {name: role for o in optimizers for name, role in o.roles.items()}
    return memory.state_bytes(model, states, roles, _wiring(model).policy.parameter)


def wire_bytes(model: nn.Module) -> dict[str, int] | None:
    """Bytes this rank sent in the last reduced backward, and what BF16 would have; None without data parallelism."""
    reducer = _wiring(model).reducer
    if reducer is None:
        return None
    wire = reducer.wire
    return {"sent": wire.sent, "bf16": wire.bf16, "fp8_sent": wire.fp8_sent, "fp8_bf16": wire.fp8_bf16}
