"""Tables of explanations and how-to pages, from the committed results; see :mod:`benchmarks.summary`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from benchmarks.row import Result

Lines = list[str]


def _of(name: str) -> Callable[[Callable[[Result], Lines]], Callable[[Path], Lines]]:
    """A table of one result; where there is none, a line that says how to measure it."""

    def decorate(table: Callable[[Result], Lines]) -> Callable[[Path], Lines]:
        @wraps(table)
        def lines(results: Path) -> Lines:
            file = results / f"{name}.json"
            if not file.exists():
                return [f"Not measured yet: `python -m benchmarks.{name}` does that."]
            return table(json.loads(file.read_text()))

        return lines

    return decorate


@_of("loss_gap")
def loss(r: Result) -> Lines:
    """What the level costs in loss: the runs of loss_gap beside O0's of the same seeds."""
    lines = ["| policy | seeds | validation loss minus O0's, nats | mean |", "|---|---|---|---|"]
    for name, row in r["summary"].items():
        gaps = ", ".join(f"{gap:+.4f}" for gap in row["gaps_nats"])
        lines.append(f"| {name} | {len(row['gaps_nats'])} | {gaps} | {row['mean_gap_nats']:+.4f} |")
    return lines


@_of("invariance")
def invariance(r: Result) -> Lines:
    """What another token may change, a line a recipe: the same bits, or the dB that are left."""
    measures = [name for name in r["rows"][0] if name != "recipe"]
    lines = ["| recipe | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
    for row in r["rows"]:
        cells = [row[name] if row[name] == "exact" else f"{row[name]:.0f} dB" for name in measures]
        lines.append(f"| {row['recipe']} | " + " | ".join(cells) + " |")
    return lines


@_of("attention")
def attention(r: Result) -> Lines:
    """dB by kind of attention, on even and on uneven tokens."""
    columns = ("output", "grad_query", "grad_key", "grad_value")
    head = f"| dB of SQNR against FP32, causal, {r['length']} tokens | output | dQ | dK | dV |"
    lines = [head, "|---|---|---|---|---|"]
    for data, kinds in r["sqnr_db"].items():
        for kind, row in kinds.items():
            lines.append(f"| {data}: {kind} | " + " | ".join(f"{row[name]:.1f}" for name in columns) + " |")
    return lines


@_of("grouped")
def experts(r: Result) -> Lines:
    """dB of an expert's output whose weights are small."""
    control = r["control_db"]
    return [
        "| dB of SQNR of the output of an expert whose weights are 2^-17 of the others' | |",
        "|---|---|",
        *(f"| {name} | {db:.1f} |" for name, db in control.items()),
    ]


@_of("muon")
def muon(r: Result) -> Lines:
    """dB and the largest singular value, by matrix and kind of product."""
    kinds = {"e4m3 as written": "FP8 as usually written", "e4m3": "FP8 here", "bf16": "BF16 here"}
    names = " | ".join(kinds.values())
    head = f"| dB of SQNR against FP32 products (largest singular value) | {names} | FP32 against the polar factor |"
    lines = [head, "|---" * (len(kinds) + 2) + "|"]
    for matrix, row in r["iteration"].items():
        cells = [f"{row[kind]['sqnr_db']:.1f} ({row[kind]['singular_values'][1]:.2f})" for kind in kinds]
        lines.append(f"| {matrix} | " + " | ".join(cells) + f" | {row['polar_db']:.1f} |")
    return lines


@_of("activation_memory")
def saved_activations(r: Result) -> Lines:
    """Bytes a token, and the peak."""
    lines = ["| over O0 (BF16) | kept, a layer | kept, head and loss | kept, all | peak |", "|---|---|---|---|---|"]
    for name, row in r["kept"].items():
        share, peak = row["ratio"], r["peak"].get(name)
        cells = [f"{share[kind]:.3f}" for kind in ("layer", "rest", "total")]
        lines.append(
            f"| {name} | " + " | ".join(cells) + f" | {peak['ratio']:.3f} |"
            if peak
            else f"| {name} | " + " | ".join(cells) + " | |"
        )
    return lines
