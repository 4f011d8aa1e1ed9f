"""Does a resumed run go on bit for bit? O1 and O2, one rank and two, delayed scaling, two micro-batches a step.

    python -m benchmarks.resume

A run of 40 steps that saves at 20, and a second process that resumes there: the losses and gradient norms of the next
20 steps are compared as they stand in metrics.jsonl, for equality. The control drops the amax histories from the
checkpoint, as runtimes that forget them do, and must differ.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.result import parser, write
from msamp_like import checkpoint

STEPS, SAVED = 40, 20
MODEL = ("--dim", "128", "--num-layers", "2", "--num-heads", "2", "--context", "64", "--micro-batches", "2")
SHORT = ("--eval-every", "1000", "--eval-batches", "2", "--save-every", str(SAVED))


def pretrain(world: int, out: Path, level: str, *options: str) -> list[tuple[int, float, float]]:
    """A run of the launcher in processes of its own; (step, loss, gradient norm) of its steps."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    run = [sys.executable, *launch, "-m", "msamp_like.launchers.pretrain", "--level", level, "--steps", str(STEPS)]
    command = [*run, "--out", str(out), "--threads", "1", *MODEL, *SHORT, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def forget_histories(source: Path, target: Path) -> None:
    """A copy of a checkpoint whose scalers know nothing."""
    state = checkpoint.load(source)
    for scaler in state["amp"]["scalers"].values():
        if scaler:
            scaler["filled"] = 0
            scaler["history"].zero_()
    checkpoint.save(target, state, identity=checkpoint.read_identity(source))


def compare(world: int, level: str, folder: Path) -> dict[str, Any]:
    """One case: how many of the next steps are identical, and the same for the control."""
    whole = pretrain(world, folder / "whole", level)
    saved = folder / "whole" / f"step-{SAVED:06d}"
    resumed = pretrain(world, folder / "resumed", level, "--resume", str(saved))
    control_source = folder / "forgotten" / saved.name
    forget_histories(saved, control_source)
    control = pretrain(world, folder / "control", level, "--resume", str(control_source))
    expected = [line for line in whole if line[0] > SAVED]
    same = sum(a == b for a, b in zip(expected, resumed, strict=True))
    same_control = sum(a == b for a, b in zip(expected, control, strict=True))
    return {"world": world, "level": level, "steps": len(expected), "identical": same, "control": same_control}


def main() -> None:
    arguments = parser(__doc__, "docs/results/resume.json").parse_args()
    rows = []
    for world, level in tqdm([(w, level) for w in (1, 2) for level in ("O1", "O2")], unit="case"):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(world, level, Path(folder)))
        tqdm.write(str(rows[-1]))
    reached = all(row["identical"] == row["steps"] and row["control"] < row["steps"] for row in rows)
    write(arguments.out, {"rows": rows, "reached": reached})


if __name__ == "__main__":
    main()
