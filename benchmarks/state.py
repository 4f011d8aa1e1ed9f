"""Bytes of training state per parameter, measured on the tensors: O0, O1 and O2, matrices in FP8.

    python -m benchmarks.state

A GPT whose matrices are all converted, after a step with gradients still there. ``at rest`` is what stays between steps
with gradients; a forward adds the cached compute copy, a second micro-batch the second byte of an accumulating
gradient. Scales are counted: one FP32 a block of 128. The plain parameters (norms) are reported beside, not mixed in.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.result import parser, write
from msamp_like import amp
from msamp_like.models import gpt

TARGETS = {"O0": 16.0, "O1": 11.0, "O2": 6.0}
TOLERANCE = 0.03
ROLES = ("weight", "grad_weight", "master_weight", "first_moment", "second_moment")


def measure(level: str) -> dict[str, Any]:
    """Bytes per matrix parameter by role, at rest, with compute copies, and while accumulating."""
    torch.manual_seed(0)
    model: Any = gpt.GPT(gpt.PRESETS["tiny"])
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = amp.initialize(model, optimizer, level=level, data_parallel=False)
    tokens = torch.randint(0, 256, (2, 65))

    def backward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens[:, :-1], tokens[:, 1:])[1].backward()

    backward()
    optimizer.step()
    found = {"at rest": _per_parameter(amp.state_bytes(model, optimizer))}
    model(tokens[:, :-1])
    found["with compute copies"] = _per_parameter(amp.state_bytes(model, optimizer))
    backward()
    optimizer_drops_copies = amp.state_bytes(model, optimizer)
    found["accumulating, with compute copies"] = _per_parameter(optimizer_drops_copies)
    return found


def _per_parameter(counted: dict[str, int]) -> dict[str, float]:
    parameters = counted["matrix_parameters"]
    by_role = {role: round(counted[role] / parameters, 4) for role in ROLES}
    plain = round(counted["plain"] / counted["plain_parameters"], 2)
    return {**by_role, "total": round(sum(counted[r] for r in ROLES) / parameters, 4), "plain_parameters": plain}


def main() -> None:
    arguments = parser(__doc__, "docs/results/state.json").parse_args()
    rows = {level: measure(level) for level in TARGETS}
    for level, states in rows.items():
        for name, row in states.items():
            print(f"{level}  {name:<36} {row}")
    over = {level: rows[level]["at rest"]["total"] / target - 1 for level, target in TARGETS.items()}
    reached = all(abs(excess) <= TOLERANCE for excess in over.values())
    excess = {level: round(value, 4) for level, value in over.items()}
    write(arguments.out, {"bytes_per_parameter": rows, "targets": TARGETS, "excess": excess, "reached": reached})


if __name__ == "__main__":
    main()
