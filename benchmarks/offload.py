"""What offload leaves on the device, keeps on the host and moves, and what it costs a step.

    python -m benchmarks.offload

A GPT; each level with ``offload="cpu"`` and under the very same policy without, steps taken in turns. Bytes a
parameter are of the matrices, measured on the tensors after a backward pass, and counted on the lanes that copy.
``step`` is forward, backward and optimizer; ``optimizer`` its last part, which on CUDA waits for gradients still on
their way.
Without CUDA device and host are one, the copies copy host memory: the overlap is then nobody's, and not measured.

The limit is the copy itself: seconds a byte of a large tensor each way, times the bytes that moved. ZeRO-Offload's
figures are computed from its paper (Ren et al., 2021, https://arxiv.org/abs/2101.06840): FP16 weights and gradients on
the wire, FP32 master, two moments and a gradient on the host. It does not run here. O2 and lean have to stay below each
of them.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.result import parser, write
from msamp_like import amp
from msamp_like import policy as policies
from msamp_like.models import gpt
from msamp_like.optim.offload import holding_weights

PLACES = ("device", "host", "down", "up")
COMPUTED: dict[str, dict[str, Any]] = {
    "DeepSpeed ZeRO-Offload": {
        "device": 2.0,
        "host": 16.0,
        "down": 2.0,
        "up": 2.0,
        "measured": False,
        "note": "computed: FP16 weight on the device, gradients in passing; FP32 master, moments and gradient",
    }
}
COUNTS = ("matrix_parameters", "plain_parameters")


class Variant:
    """One model under one policy, its steps timed."""

    def __init__(self, level: str, preset: str, device: torch.device, offload: str | None) -> None:
        torch.manual_seed(0)
        self.model: Any = gpt.GPT(gpt.PRESETS[preset]).to(device)
        source = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        policy = holding_weights(policies.resolve(level))
        _, self.optimizer = amp.initialize(self.model, source, policy, data_parallel=False, offload=offload)  # type: ignore[var-annotated]
        self.device, self.offload = device, offload
        self.step_s: list[float] = []
        self.optimizer_s: list[float] = []
        self.held: dict[str, int] = {}
        self.moved_before = self.optimizer.home.moved_bytes if offload else (0, 0)

    def step(self, tokens: Tensor) -> None:
        """One timed step."""
        synchronize(self.device)
        started = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        after = time.perf_counter()
        self.held = amp.state_bytes(self.model, self.optimizer)
        before = time.perf_counter()
        self.optimizer.step()
        synchronize(self.device)
        ended = time.perf_counter()
        self.optimizer.zero_grad()
        self.optimizer_s.append(ended - before)
        self.step_s.append(ended - before + after - started)

    def figures(self, warmup: int, copy_s: tuple[float, float]) -> dict[str, Any]:
        """Medians, and bytes a parameter of a matrix."""
        elements = self.held["matrix_parameters"]
        on_host = sum(n for name, n in self.held.items() if name.startswith("host_"))
        rest = sum(n for name, n in self.held.items() if name not in ("plain", *COUNTS)) - on_host
        found = {
            "device": round(rest / elements, 4),
            "host": round(on_host / elements, 4),
            "step_ms": round(statistics.median(self.step_s[warmup:]) * 1e3, 3),
            "optimizer_ns_per_parameter": round(statistics.median(self.optimizer_s[warmup:]) / elements * 1e9, 3),
        }
        if self.offload is None:
            return found
        now = self.optimizer.home.moved_bytes
        moved = [(n - before) / len(self.step_s) for n, before in zip(now, self.moved_before, strict=True)]
        copies = sum(n * s for n, s in zip(moved, copy_s, strict=True))
        per_parameter = {way: round(n / elements, 4) for way, n in zip(("down", "up"), moved, strict=True)}
        return {**found, **per_parameter, "copies_alone_ms": round(copies * 1e3, 3)}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_byte(device: torch.device, size: int = 1 << 26) -> tuple[float, float]:
    """Of one large copy down and up, the best of five."""
    there = torch.zeros(size, dtype=torch.uint8, device=device)
    here = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def best(target: Tensor, source: Tensor) -> float:
        times = []
        for _ in range(5):
            synchronize(device)
            started = time.perf_counter()
            target.copy_(source, non_blocking=True)
            synchronize(device)
            times.append(time.perf_counter() - started)
        return min(times) / size

    return best(here, there), best(there, here)


def measure(device: torch.device, preset: str, levels: list[str], steps: int, warmup: int) -> dict[str, Any]:
    """Every level with offload and without, in turns."""
    copy_s = seconds_per_byte(device)
    variants = {
        f"{level}{' offload' if offload else ''}": Variant(level, preset, device, offload)
        for level in levels
        for offload in (None, "cpu")
    }
    config = gpt.PRESETS[preset]
    tokens = torch.randint(0, config.vocab_size, (4, config.context + 1), device=device)
    for _ in range(steps + warmup):
        for variant in variants.values():
            variant.step(tokens)
    rows = {name: variant.figures(warmup, copy_s) for name, variant in variants.items()}
    longer = {level: round(rows[f"{level} offload"]["step_ms"] / rows[level]["step_ms"], 3) for level in levels}
    return {
        "rows": rows,
        "step_with_over_without": longer,
        "copy_gb_per_s": {way: round(1e-9 / s, 2) for way, s in zip(("down", "up"), copy_s, strict=True)},
    }


def main() -> None:
    options = parser(__doc__, "docs/results/offload.json")
    options.add_argument("--preset", default="tiny", help="of the GPT")
    options.add_argument("--levels", nargs="+", default=["O0", "O2", "lean"], help="levels of precision")
    options.add_argument("--steps", type=int, default=20, help="timed steps of each variant")
    options.add_argument("--warmup", type=int, default=18, help="the first 16 scale in time, before histories are full")
    arguments = options.parse_args()
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    figures: dict[str, Any] = {}
    for device in devices:
        found = measure(device, arguments.preset, arguments.levels, arguments.steps, arguments.warmup)
        figures[device.type] = found
        for name, row in found["rows"].items():
            print(f"{device.type:<5} {name:<14} {row}")
        print(f"{device.type:<5} a step with offload over one without: {found['step_with_over_without']}")
    if "cuda" not in figures:
        figures["cuda"] = "not measured: this machine has no CUDA device"
        print(figures["cuda"])
    for name, row in COMPUTED.items():
        print(f"{name}: {row}")
    peer, rows = COMPUTED["DeepSpeed ZeRO-Offload"], figures["cpu"]["rows"]
    ours = [rows[f"{level} offload"] for level in arguments.levels if level != "O0"]
    reached = all(row[name] <= peer[name] for row in ours for name in PLACES)
    write(arguments.out, {"preset": arguments.preset, "devices": figures, "computed": COMPUTED, "reached": reached})


if __name__ == "__main__":
    main()
