"""Time of a training step over a slow link: O3 against O0 on two nodes, side by side.

    python -m benchmarks.network                     as root, on Linux: it makes two network namespaces
    python -m benchmarks.network --presets small     another model

The nodes are two namespaces of this machine, joined by a pair of virtual devices; each runs one gloo rank with 1,024
tokens a step. The link is as fast as memory, or limited in either direction by a token bucket. Each rank holds a model
of each level, and the levels take turns of four steps, so that whatever else the machine does falls on both and new
weights may arrive while the next step begins; at the end of a turn all have arrived. A step is a quarter of a turn on
its slower rank, the figures are medians.

    step_ms        forward, backward with its exchange of gradients, clipping, optimizer
    wire_bytes     what the library counts as sent by a rank in a step
    link_bytes     what the first node put on the link meanwhile, headers and acknowledgements included
    link_ms        the least time that a limited link needs for them; what a step takes beyond it is computing that
                   did not run meanwhile
    speedup        step_ms of O0 over that of O3; at 100 Mbit/s at least 1.5

O0 sends BF16 gradients in buckets while backward goes on, as O3 sends FP8. Two ranks share the cores of one machine
here, so both levels compute more slowly than on two, which makes the ratio smaller.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.result import parser, write
from benchmarks.step import PHASES, Variant
from msamp_like import amp
from msamp_like.models.gpt import PRESETS
from tests.distributed.namespaces import PORT, Node, missing, two_nodes

LEVELS = ("O0", "O3")
TOKENS = 1024
TARGET = 1.5
TURN = 4


def serve(rank: int, address: str, preset: str, threads: int) -> None:
    """One rank: for every line "LEVEL STEPS" that comes in, that many steps, and a line of JSON with their times."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"tcp://{address}:{PORT}", rank=rank, world_size=2)
    config = PRESETS[preset]
    variants = {level: Variant(level, preset, data_parallel=True) for level in LEVELS}
    size = (TOKENS // config.context, config.context + 1)
    tokens = torch.randint(0, config.vocab_size, size, generator=torch.Generator().manual_seed(rank))
    for line in sys.stdin:
        level, steps = line.split()
        variant = variants[level]
        for _ in range(int(steps)):
            dist.barrier()
            variant.step(tokens)
        variant.settle()
        sent = sum(entry.sent for entry in amp.wire_ledger(variant.model))
        answer = {"times": variant.times[-int(steps) :], "sent": sent}
        print(json.dumps(answer), flush=True)
    dist.destroy_process_group()


class Pair:
    """The two ranks of one model, each in its node, and the ``benchmark`` that they serve, with ``more`` options."""

    def __init__(
        self,
        nodes: Sequence[Node],
        preset: str,
        threads: int,
        benchmark: str = "network",
        more: Sequence[str] = (),
    ) -> None:
        self.nodes = nodes
        options = ["--serve", nodes[0].address, "--presets", preset, "--threads", str(threads), *more]
        self.ranks = [
            node.start(
                [sys.executable, "-m", f"benchmarks.{benchmark}", *options, "--rank", str(rank)],
                environment={"OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank, node in enumerate(nodes)
        ]

    def steps(self, level: str, count: int) -> list[dict[str, Any]]:
        """That many steps on both ranks, and what each says of them."""
        for rank in self.ranks:
            print(level, count, file=rank.stdin, flush=True)
        answers = [rank.stdout.readline() for rank in self.ranks if rank.stdout is not None]
        if not all(answers):
            self.close()
            raise RuntimeError(f"both ranks must answer, got {answers}; their errors stand above")
        return [json.loads(answer) for answer in answers]

    def measure(self, level: str) -> dict[str, float]:
        """One turn: a step's times on its slower rank, and its bytes."""
        before = self.nodes[0].sent
        answers = self.steps(level, TURN)
        means = [{name: sum(t[name] for t in a["times"]) / TURN for name in PHASES} for a in answers]
        slower = max(means, key=lambda times: sum(times.values()))
        seen = {"wire_bytes": answers[0]["sent"], "link_bytes": (self.nodes[0].sent - before) / TURN}
        return {"step": sum(slower.values()), **slower, **seen}

    def close(self) -> None:
        for rank in self.ranks:
            if rank.stdin is not None:
                rank.stdin.close()
        for rank in self.ranks:
            rank.wait()


def summarize(measured: Sequence[dict[str, float]], mbit: float) -> dict[str, float]:
    """Medians over the steps, in milliseconds and bytes; ``mbit`` is the link's Mbit/s, infinite without a limit."""
    median = {name: statistics.median(one[name] for one in measured) for name in measured[0]}
    times = {"step_ms" if name == "step" else name: round(median[name] * 1e3, 1) for name in ("step", *PHASES)}
    fastest = round(min(one["step"] for one in measured) * 1e3, 1)
    seen = {name: round(median[name]) for name in ("wire_bytes", "link_bytes")}
    return {**times, "fastest_ms": fastest, **seen, "link_ms": round(seen["link_bytes"] * 8 / mbit / 1e3, 1)}


def run(preset: str, rates: Sequence[float], arguments: argparse.Namespace) -> dict[str, Any]:
    """Both levels of one model at every rate."""
    rows: dict[str, Any] = {}
    with two_nodes() as nodes:
        pair = Pair(nodes, preset, arguments.threads)
        for level in LEVELS:
            pair.steps(level, arguments.warmup)
        for mbit in rates:
            rate = f"{mbit:g} Mbit/s" if mbit < math.inf else "unlimited"
            for node in nodes:
                node.limit(f"{mbit:g}mbit" if mbit < math.inf else None)
            measured: dict[str, list[dict[str, float]]] = {level: [] for level in LEVELS}
            for _ in range(arguments.steps):
                for level in LEVELS:
                    measured[level].append(pair.measure(level))
            row = rows[rate] = {level: summarize(measured[level], mbit) for level in LEVELS}
            row["speedup"] = round(row["O0"]["step_ms"] / row["O3"]["step_ms"], 3)
            for level in LEVELS:
                print(f"{preset:<6} {rate:<11} {level} {row[level]}")
            print(f"{preset:<6} {rate:<11} O3 is {row['speedup']} times as fast as O0", flush=True)
        pair.close()
    return rows


def main() -> None:
    options = parser(__doc__, "docs/results/network.json")
    options.add_argument("--presets", nargs="+", default=["tiny", "small"], help="models to train")
    options.add_argument("--mbit", type=float, default=100.0, help="rate of the limited link, Mbit/s")
    options.add_argument("--steps", type=int, default=12, help="turns of each level at each rate, after --warmup")
    options.add_argument("--warmup", type=int, default=18, help="the first 16 scale in time, before histories are full")
    options.add_argument("--threads", type=int, default=1, help="of each rank; the two share this machine")
    options.add_argument("--serve", default="", help=argparse.SUPPRESS)
    options.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.serve:
        serve(arguments.rank, arguments.serve, arguments.presets[0], arguments.threads)
        return
    if reason := missing():
        print(f"not measured: two nodes need network namespaces: {reason}")
        return
    rows = {preset: run(preset, (math.inf, arguments.mbit), arguments) for preset in arguments.presets}
    best = max(row[f"{arguments.mbit:g} Mbit/s"]["speedup"] for row in rows.values())
    figures = {"world": 2, "tokens_a_rank": TOKENS, "presets": rows, "target_speedup": TARGET}
    write(arguments.out, {**figures, "reached": best >= TARGET})


if __name__ == "__main__":
    main()
