"""Time of a training step of a model split over two nodes: exchanges beside its products, and one after the other.

    python -m benchmarks.overlap                     as root, on Linux: it makes two network namespaces
    python -m benchmarks.overlap --mbit 500          another link

The nodes are those of ``benchmarks.network``: two namespaces of this machine, one gloo rank in each, 1,024 tokens a
step. Tensor and sequence parallelism over both; every level as two models of the same values, which take turns of four
steps. Their bits are the same, so is what they send.

    step_ms        forward, backward, clipping, optimizer, on the slower rank; medians
    link_ms        the least time that a limited link needs for what a step sends
    exposed        the share of link_ms that a step takes longer on the limited link than on the unlimited one: 1 where
                   nothing runs beside an exchange, 0 where all of them are hidden
    speedup        step_ms one after the other over that side by side

The ranks share the cores of one machine, with a thread each. Without a limit there is next to nothing to hide, and
``speedup`` shows what smaller products cost.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.network import PORT, TOKENS, Pair, missing, summarize, two_nodes
from benchmarks.result import parser, write
from benchmarks.step import Variant
from msamp_like import amp
from msamp_like.comm.tensor_parallel import parallelize, plan_gpt
from msamp_like.models.gpt import GPT, PRESETS

WAYS = ("apart", "beside")
TARGET = 1.0
"""Of the speedup on the slowest link: hiding an exchange has to pay for the smaller products."""


class Split(Variant):
    """A model split over both ranks, named "LEVEL/WAY"."""

    def __init__(self, name: str, preset: str) -> None:
        level, way = name.split("/")
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        torch.manual_seed(0)
        config = PRESETS[preset]
        model = parallelize(GPT(config), mesh["tp"], plan_gpt(config), sequence=True, overlap=way == "beside")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        self.model, self.optimizer = amp.initialize(model, optimizer, level=level, mesh=mesh)
        self.converted = True
        self.times: list[dict[str, float]] = []


def serve(rank: int, address: str, preset: str, levels: Sequence[str], threads: int) -> None:
    """One rank: for every line "LEVEL/WAY STEPS" that comes in, that many steps, and a line of JSON of their times."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"tcp://{address}:{PORT}", rank=rank, world_size=2)
    config = PRESETS[preset]
    variants = {name: Split(name, preset) for name in names(levels)}
    size = (TOKENS // config.context, config.context + 1)
    tokens = torch.randint(0, config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    for line in sys.stdin:
        name, steps = line.split()
        variant = variants[name]
        for _ in range(int(steps)):
            dist.barrier()
            variant.step(tokens)
        variant.settle()
        sent = sum(entry.sent for entry in amp.wire_ledger(variant.model))
        print(json.dumps({"times": variant.times[-int(steps) :], "sent": sent}), flush=True)
    dist.destroy_process_group()


def names(levels: Sequence[str]) -> list[str]:
    """Every level in both ways."""
    return [f"{level}/{way}" for level in levels for way in WAYS]


def run(preset: str, rates: Sequence[float], arguments: argparse.Namespace) -> dict[str, Any]:
    """Every level of one model in both ways at every rate, the unlimited one first."""
    rows: dict[str, Any] = {}
    with two_nodes() as nodes:
        pair = Pair(nodes, preset, arguments.threads, "overlap", ["--levels", *arguments.levels])
        for name in names(arguments.levels):
            pair.steps(name, arguments.warmup)
        for mbit in rates:
            rate = f"{mbit:g} Mbit/s" if mbit < math.inf else "unlimited"
            for node in nodes:
                node.limit(f"{mbit:g}mbit" if mbit < math.inf else None)
            measured: dict[str, list[dict[str, float]]] = {name: [] for name in names(arguments.levels)}
            for _ in range(arguments.steps):
                for name, turns in measured.items():
                    turns.append(pair.measure(name))
            rows[rate] = {name: summarize(turns, mbit) for name, turns in measured.items()}
            show(preset, rate, rows, arguments.levels)
        pair.close()
    return rows


def show(preset: str, rate: str, rows: dict[str, Any], levels: Sequence[str]) -> None:
    """Add what follows from the rows of one rate, and print them."""
    row, free = rows[rate], rows["unlimited"]
    for name in names(levels):
        if row[name]["link_ms"] > 0:
            longer = row[name]["step_ms"] - free[name]["step_ms"]
            row[name]["exposed"] = round(longer / row[name]["link_ms"], 3)
        print(f"{preset:<6} {rate:<11} {name:<9} {row[name]}")
    row["speedup"] = {n: round(row[f"{n}/apart"]["step_ms"] / row[f"{n}/beside"]["step_ms"], 3) for n in levels}
    print(f"{preset:<6} {rate:<11} side by side is {row['speedup']} times as fast", flush=True)


def main() -> None:
    options = parser(__doc__, "docs/results/overlap.json")
    options.add_argument("--presets", nargs="+", default=["tiny"], help="models to train")
    options.add_argument("--levels", nargs="+", default=["O0", "O3"], help="levels of precision")
    options.add_argument("--mbit", nargs="+", type=float, default=[1000.0, 100.0], help="rates of the limited link")
    options.add_argument("--steps", type=int, default=5, help="turns of each model at each rate, after --warmup")
    options.add_argument("--warmup", type=int, default=18, help="the first 16 scale in time, before histories are full")
    options.add_argument("--threads", type=int, default=1, help="of each rank; the two share this machine")
    options.add_argument("--serve", default="", help=argparse.SUPPRESS)
    options.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.serve:
        serve(arguments.rank, arguments.serve, arguments.presets[0], arguments.levels, arguments.threads)
        return
    if reason := missing():
        print(f"not measured: two nodes need network namespaces: {reason}")
        return
    rows = {preset: run(preset, (math.inf, *arguments.mbit), arguments) for preset in arguments.presets}
    slowest = f"{min(arguments.mbit):g} Mbit/s"
    reached = all(speedup >= TARGET for row in rows.values() for speedup in row[slowest]["speedup"].values())
    figures = {"world": 2, "tokens_a_step": TOKENS, "presets": rows, "slowest": slowest, "target_speedup": TARGET}
    write(arguments.out, {**figures, "reached": reached})


if __name__ == "__main__":
    main()
