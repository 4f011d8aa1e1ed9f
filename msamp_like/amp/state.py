"""What a converted model shows and saves: its state, its proof of FP8, the bytes it holds and sends; and clipping."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from msamp_like.amp.wiring import wiring_of
from msamp_like.comm.ledger import Line, ledger
from msamp_like.comm.zero import OwnedWeights
from msamp_like.nn import clip_grad
from msamp_like.nn.functional import LinearGemm
from msamp_like.optim import LowPrecisionOptimizer
from msamp_like.scaling import Scaler
from msamp_like.telemetry import memory
from msamp_like.telemetry.report import Report, make_report


def clip_grad_norm_(model: nn.Module | Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale the gradients so that their joint norm is at most ``max_norm``; returns the norm before, a scalar tensor.

    ``model`` is the one that :func:`initialize` returned: the norm is then that of all gradients, on whichever rank
    they lie, and every rank has to call this. Parameters do where every rank has all gradients. See
    :func:`msamp_like.nn.clip_grad_norm_`.
    """
    if not isinstance(model, nn.Module):
        return clip_grad.clip_grad_norm_(model, max_norm, norm_type)
    if wiring_of(model).releases_gradients:
        raise RuntimeError(
            "gradients are clipped while they exist, got clip_grad_norm_ with gradient_release, which has freed them; "
            "initialize with gradient_release=GradientRelease(max_norm=...) of msamp_like.optim"
        )
    wiring = wiring_of(model)
    for home in wiring.homes:
        home.collect()
    return clip_grad.clip_grad_norm_(wiring.stepped(model.parameters()), max_norm, norm_type, reduction=wiring.norms)


def set_precision(model: nn.Module, precision: str) -> None:
    """Take the products of the FP8 layers in "bf16" from now on, or in "fp8" again, as the policy says.

    For phases of a run, its last tenth say; between two steps, and alike on every rank. Weights, gradients, moments and
    what travels stay as they are, amax histories wait, and :func:`state_dict` saves the phase. A BF16 copy of a weight,
    2 bytes an element where the parameter is not BF16 itself, then takes the place of the E4M3 one.
    """
    if precision not in ("fp8", "bf16"):
        raise ValueError(f'a phase takes its products in "fp8" or "bf16", got {precision!r}; choose one of the two')
    wiring_of(model)
    for gemm in _gemms(model):
        gemm.pause(precision == "bf16")


def _gemms(model: nn.Module) -> list[LinearGemm]:
    return [module for module in model.modules() if isinstance(module, LinearGemm)]


def _precision(model: nn.Module) -> str:
    return "bf16" if any(gemm.paused for gemm in _gemms(model)) else "fp8"


def _scalers(model: nn.Module) -> Iterator[tuple[str, Scaler]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Scaler))


def _listed(optimizer: LowPrecisionOptimizer | Sequence[LowPrecisionOptimizer]) -> list[LowPrecisionOptimizer]:
    return list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]


def state_dict(model: nn.Module, optimizer: LowPrecisionOptimizer | Sequence[LowPrecisionOptimizer]) -> dict[str, Any]:
    """Everything a resume needs, the same on every data-parallel rank: weights, optimizer states, amax histories.

    Holds the live tensors, not copies, and no pickled object: nested dicts and lists of tensors and plain values. Where
    states are with their owners (ZeRO) every rank has to call this; those of the others then come as copies on the CPU.
    """
    wiring = wiring_of(model)
    saved = [o.state_dict() for o in _listed(optimizer)]
    for state, one in zip(saved, _listed(optimizer), strict=True):
        if isinstance(one.placement, OwnedWeights):
            state["state"] = one.placement.gather_states(state["state"])
    return {
        "policy": str(wiring.policy),
        "model": dict(model.state_dict()),
        "optimizers": saved,
        "scalers": {name: scaler.state() for name, scaler in _scalers(model)},
        "precision": _precision(model),
    }


def load_state_dict(
    model: nn.Module,
    optimizer: LowPrecisionOptimizer | Sequence[LowPrecisionOptimizer],
    state: Mapping[str, Any],
) -> None:
    """Continue from :func:`state_dict`, bit for bit, at any world size.

    Raises ValueError, before anything is written, for the state of another policy, model or set of optimizers.
    """
    policy, optimizers = str(wiring_of(model).policy), _listed(optimizer)
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
    set_precision(model, state.get("precision", "fp8"))


# --- proof ----------------------------------------------------------------------------------------------------------


def fp8_report(model: nn.Module) -> Report:
    """Every Linear and embedding: in FP8 or not now, why not, its share of FLOPs and bytes; and how what else is kept
    for backward is stored. Print it."""
    wiring = wiring_of(model)
    paused = {id(gemm) for gemm in _gemms(model) if gemm.paused}
    plans = [
        replace(plan, product="bf16", reason='for now: amp.set_precision(model, "bf16")')
        if plan.product == "fp8" and id(plan.module.gemm) in paused
        else plan
        for plan in wiring.plans
    ]
    return make_report(wiring.policy, plans)


def state_bytes(model: nn.Module, optimizer: LowPrecisionOptimizer | Sequence[LowPrecisionOptimizer]) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer states by role, measured on the tensors that exist now.

    With ``offload`` what is on the host is apart, as ``host_weight``, ``host_grad_weight`` and so on: states, and the
    buffers that weights leave from and gradients land in.
    """
    optimizers = _listed(optimizer)
    states = [(p, s) for o in optimizers for p, s in o.state.items()]
    roles = {name: role for o in optimizers for name, role in o.roles.items()}
    wiring = wiring_of(model)
    sides = {id(p): side for home in wiring.homes for p, side in home.sides()}
    return memory.state_bytes(model, states, roles, wiring.policy.parameter, sides if wiring.homes else None)


def wire_bytes(model: nn.Module) -> dict[str, int] | None:
    """Bytes that a step's gradients, and new weights where ranks own them, sent from this rank, and what an all-reduce
    of the gradients in BF16 would have; ``fp8_*`` are the FP8 gradients of these. None without data parallelism."""
    reducer = wiring_of(model).reducer
    if reducer is None:
        return None
    wire = reducer.wire
    return {"sent": wire.sent, "bf16": wire.bf16, "fp8_sent": wire.fp8_sent, "fp8_bf16": wire.fp8_bf16}


def wire_ledger(model: nn.Module) -> list[Line]:
    """Every collective of the step by mesh axis and label, gradients, weights and decisions alike: bytes that left this
    rank, and what the plan expects."""
    wiring = wiring_of(model)
    delayed = sum(scaler.rule.history > 0 for _, scaler in _scalers(model))
    decisions = {"scalers": delayed, "skip": 1, "norm": len(list(model.parameters()))}
    return ledger(wiring.axes, wiring.reducer, wiring.placements, decisions)
