"""Bytes of training state per parameter, measured on the tensors, compute copies included, beside what others publish.

    python -m benchmarks.state

A GPT after a step, with gradients still there; its matrices whose products are FP8. ``at rest`` is what a step needs,
gradients included; products need the compute copy too, and a second micro-batch the second byte of an accumulating
gradient. Scales are counted: one FP32 a block of 128, or a tensor. With gradient release the gradient is the most that
was alive at once, divided by all parameters: the more layers, the less.

``every matrix`` has the embedding and the head too, whose product is BF16: a copy of two bytes where the master is
FP16, and a weight of two bytes with a master of its own where the parameter is the weight. The plain parameters (norms)
are reported beside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.result import parser, write
from msamp_like import amp
from msamp_like.formats import FP8_FORMATS
from msamp_like.models import gpt
from msamp_like.policy import Role
from msamp_like.tensor import ScalingTensor

ROLES = ("weight", "grad_weight", "master_weight", "first_moment", "second_moment")
TOLERANCE = 0.03


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row: ``at_rest`` is the level's own count, ``limit`` the most it may hold, compute copies included."""

    level: str
    release: bool = False
    at_rest: float | None = None
    limit: float | None = None


VARIANTS = {
    "O0": Variant(level="O0", at_rest=16.0),
    "O1": Variant(level="O1", at_rest=11.0),
    "O2": Variant(level="O2", at_rest=6.0, limit=7.1),
    "lean": Variant(level="lean", at_rest=5.0, limit=5.2),
    "O2 + release": Variant(level="O2", release=True),
    "lean + release": Variant(level="lean", release=True, limit=4.2),
}
TARGETS = {name: variant.at_rest for name, variant in VARIANTS.items() if variant.at_rest is not None}
CITED = {
    "FlashOptim AdamW": (7.0, "BF16 weight and gradient, 8-bit residual and moments, arXiv:2602.23349"),
    "FlashOptim AdamW, gradient release": (5.0, "the same without the gradient, arXiv:2602.23349"),
    "FP8-LM": (7.0, "its 6 bytes of states and gradient, and the FP8 weight that products read, arXiv:2310.18313"),
}
"""What others publish; none of these is installed or runs here, so nothing of it is measured."""


def measure(variant: Variant, preset: str) -> dict[str, Any]:
    """Bytes per parameter by role, at rest, with compute copies, and while accumulating."""
    torch.manual_seed(0)
    model: Any = gpt.GPT(gpt.PRESETS[preset])
    alive = watched(model)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = amp.initialize(
        model, optimizer, level=variant.level, data_parallel=False, gradient_release=variant.release
    )
    tokens = torch.randint(0, 256, (2, 65))

    def backward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens[:, :-1], tokens[:, 1:])[1].backward()

    def counted(*, copies: bool = True) -> dict[str, Any]:
        chosen = [p for p in model.parameters() if _in_fp8(p)] or [p for p in model.parameters() if p.dim() == 2]
        most = alive["most"] if variant.release else None
        every = _per_parameter([p for p in model.parameters() if p.dim() == 2], model, optimizer, most, copies)
        return {
            **_per_parameter(chosen, model, optimizer, most, copies),
            "every matrix": every["total"],
        }

    backward()
    optimizer.step()
    found = {"at rest": counted(copies=False)}
    with torch.no_grad():
        model(tokens[:, :-1])
    found["with compute copies"] = counted()
    if not variant.release:
        backward()
        found["accumulating, with compute copies"] = counted()
    return found


def watched(model: torch.nn.Module) -> dict[str, int]:
    """``most``: the bytes of all gradients, at the moment of backward at which they are most."""
    found = {"most": 0}

    def seen(_: Tensor) -> None:
        found["most"] = max(found["most"], sum(_bytes(p.grad) for p in model.parameters() if p.grad is not None))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(seen)
    return found


def _in_fp8(parameter: Tensor) -> bool:
    gemm: Any = parameter.gemm if isinstance(parameter, ScalingTensor) else None
    return gemm is not None and gemm.weight_rule.format in FP8_FORMATS


def _per_parameter(
    parameters: list[Tensor], model: torch.nn.Module, optimizer: Any, alive: int | None, copies: bool
) -> dict[str, float]:
    numel = sum(p.numel() for p in parameters)
    counted = dict.fromkeys(ROLES, 0)
    held = amp.policy_of(model).parameter
    for p in parameters:
        counted[held.value] += _bytes(p)
        counted["weight"] += p.cast_bytes if copies and isinstance(p, ScalingTensor) else 0
        counted["grad_weight"] += _bytes(p.grad) if p.grad is not None else 0
        for name, state in optimizer.state[p].items():
            role = optimizer.roles.get(name, Role.MASTER_WEIGHT)
            counted[role.value] += _bytes(state) if isinstance(state, Tensor) else 0
    by_role = {role: counted[role] / numel for role in ROLES}
    if alive is not None:
        by_role["grad_weight"] = alive / sum(p.numel() for p in model.parameters())
    plain = _average((p for p in model.parameters() if p.dim() < 2), optimizer)
    return {
        **{role: round(value, 4) for role, value in by_role.items()},
        "total": round(sum(by_role.values()), 4),
        "plain_parameters": plain,
    }


def _average(parameters: Iterable[Tensor], optimizer: Any) -> float:
    found = numel = 0
    for p in parameters:
        numel += p.numel()
        found += _bytes(p) + (_bytes(p.grad) if p.grad is not None else 0)
        found += sum(_bytes(state) for state in optimizer.state[p].values() if isinstance(state, Tensor))
    return round(found / numel, 2)


def _bytes(tensor: Tensor) -> int:
    return tensor.stored_bytes if isinstance(tensor, ScalingTensor) else tensor.nbytes


def main() -> None:
    options = parser(__doc__, "docs/results/state.json")
    options.add_argument("--preset", default="tiny", help="of the GPT")
    arguments = options.parse_args()
    rows = {name: measure(variant, arguments.preset) for name, variant in VARIANTS.items()}
    for name, states in rows.items():
        for state, row in states.items():
            print(f"{name:<15} {state:<34} {row}")
    for name, (figure, source) in CITED.items():
        print(f"{name:<50} {figure:>5}  published, not measured: {source}")
    excess = {name: round(rows[name]["at rest"]["total"] / target - 1, 4) for name, target in TARGETS.items()}
    limits = {name: v.limit for name, v in VARIANTS.items() if v.limit is not None}
    held = {name: rows[name]["with compute copies"]["total"] for name in limits}
    reached = all(abs(e) <= TOLERANCE for e in excess.values()) and all(held[n] <= limits[n] for n in limits)
    figures = {"targets": TARGETS, "excess": excess, "limits": limits, "with compute copies": held, "reached": reached}
    cited = {name: {"bytes_per_parameter": figure, "source": source} for name, (figure, source) in CITED.items()}
    write(arguments.out, {"preset": arguments.preset, "bytes_per_parameter": rows, **figures, "cited": cited})


if __name__ == "__main__":
    main()
