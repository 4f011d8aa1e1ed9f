"""Time of a training step of GPT on this machine: each level against O0 and against torch alone, side by side.

    python -m benchmarks.step                      # tiny and 125M
    python -m benchmarks.step --presets tiny       # one

2,048 tokens a step. The variants take turns, step by step, so that whatever else the machine does falls on all of them;
the figures are medians and the ratios of medians. ``torch`` is the same model under BF16 autocast with torch's own
AdamW (its fused form) and clipping: the yardstick of the yardstick. The phases tell where the time goes. Steps of a few
tokens come first, until the amax histories are full: before that a step scales in time.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks.result import parser, write
from msamp_like import amp
from msamp_like.models import gpt
from msamp_like.tensor import ScalingTensor

TARGET = 1.25
LEVELS = ("torch", "O0", "O1", "O2")
STEPS = {"tiny": 60, "125M": 7}
WARMUP = 20
PHASES = ("forward", "backward", "clip", "optimizer")


class Variant:
    """One model and optimizer, stepped in turn with the others."""

    def __init__(self, level: str, preset: str = "tiny", *, data_parallel: bool = False) -> None:
        torch.manual_seed(0)
        self.model: Any = gpt.GPT(gpt.PRESETS[preset])
        self.optimizer: Any = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.converted = level != "torch"
        if self.converted:
            self.model, self.optimizer = amp.initialize(
                self.model, self.optimizer, level=level, data_parallel=data_parallel, overlap_forward=True
            )
        self.times: list[dict[str, float]] = []

    def step(self, tokens: torch.Tensor) -> None:
        """One timed step."""
        marks = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(tokens[:, :-1], tokens[:, 1:])[1]
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        if self.converted:
            amp.clip_grad_norm_(self.model, 1.0)
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        marks.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(time.perf_counter())
        self.times.append({name: b - a for name, a, b in zip(PHASES, marks, marks[1:], strict=False)})

    def settle(self) -> None:
        """Wait for new weights that the next forward would have waited for; the time is the last step's."""
        started = time.perf_counter()
        for parameter in self.model.parameters():
            if isinstance(parameter, ScalingTensor):
                parameter.await_arrival()
        self.times[-1]["optimizer"] += time.perf_counter() - started

    def figures(self, warmup: int) -> dict[str, float]:
        """Median milliseconds of the whole step and of its phases."""
        kept = self.times[warmup:]
        phases = {name: round(statistics.median(t[name] for t in kept) * 1e3, 2) for name in PHASES}
        return {"step_ms": round(statistics.median(sum(t.values()) for t in kept) * 1e3, 2), **phases}


def measure(preset: str, levels: tuple[str, ...], steps: int) -> dict[str, Any]:
    """Every level's step of one model, in turns."""
    variants = {level: Variant(level, preset) for level in levels}
    vocabulary = gpt.PRESETS[preset].vocab_size
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 65),) * WARMUP + ((8, 257),) * (steps + 1):
        tokens = torch.randint(0, vocabulary, shape, generator=generator)
        for variant in variants.values():
            variant.step(tokens)
    rows = {level: variant.figures(WARMUP + 1) for level, variant in variants.items()}
    ratios = {level: round(row["step_ms"] / rows["O0"]["step_ms"], 3) for level, row in rows.items()}
    for level, row in rows.items():
        print(f"{preset} {level:<6} {row}  x{ratios[level]} of O0", flush=True)
    return {"variants": rows, "ratio_to_O0": ratios}


def main() -> None:
    options = parser(__doc__, "docs/results/step-cpu.json")
    options.add_argument("--presets", nargs="+", choices=STEPS, default=list(STEPS), help="default: all")
    options.add_argument("--steps", type=int, help="timed steps of each variant (default: 60 of tiny, 7 of 125M)")
    arguments = options.parse_args()
    presets = {preset: measure(preset, LEVELS, arguments.steps or STEPS[preset]) for preset in arguments.presets}
    reached = all(row["ratio_to_O0"][level] <= TARGET for row in presets.values() for level in ("O1", "O2"))
    write(arguments.out, {"tokens_a_step": 2048, "presets": presets, "target_to_O0": TARGET, "reached": reached})


if __name__ == "__main__":
    main()
