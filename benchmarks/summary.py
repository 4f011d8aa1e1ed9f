"""The table of measured results in README.md, made from the JSON under docs/results, so that prose cannot drift from
it.

python -m benchmarks.summary            # rewrites the table
python -m benchmarks.summary --check    # exits 1 if README.md shows anything else
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results: make with python -m benchmarks.summary -->", "<!-- end of results -->"

Result = dict[str, Any]


def _loss_gap(r: Result) -> list[tuple[str, str, str]]:
    o2, broken = r["summary"]["O2"], r["summary"]["broken: FP8 master weights"]
    seeds = ", ".join(f"{gap:+.4f}" for gap in o2["gaps_nats"])
    return [
        (
            f"validation loss, O2 minus O0, `tiny`, {r['steps']} steps, {len(o2['gaps_nats'])} seeds",
            f"mean at most {r['gate_nats']} nats",
            f"{o2['mean_gap_nats']:+.4f} ({seeds}); FP8 master weights rounded to nearest fail it with "
            f"{broken['mean_gap_nats']:+.2f}",
        )
    ]


def _state(r: Result) -> list[tuple[str, str, str]]:
    rest = {level: states["at rest"]["total"] for level, states in r["bytes_per_parameter"].items()}
    return [
        (
            "bytes of state per parameter, matrices, gradients included",
            "O1 11, O2 6, within 3 %",
            ", ".join(f"{level} {total:.2f}" for level, total in rest.items()),
        )
    ]


def _wire(r: Result) -> list[tuple[str, str, str]]:
    shares = ", ".join(f"{row['fp8_share_of_bf16']:.3f}" for row in r["worlds"].values())
    quality = ", ".join(f"{row['sqnr_db']:.1f}" for row in r["worlds"].values())
    worlds = ", ".join(r["worlds"])
    return [
        (f"FP8 gradient bytes over a BF16 ring's, world {worlds}", "at most 0.52", shares),
        (
            f"reduced gradient against the exact mean, world {worlds}",
            "at least 27.5 dB",
            f"{quality} dB, identical bits on all ranks",
        ),
    ]


def _loss_gap_sharded(r: Result) -> list[tuple[str, str, str]]:
    row = r["summary"][r["level"]]
    seeds = ", ".join(f"{gap:+.4f}" for gap in row["gaps_nats"])
    return [
        (
            f"validation loss, O3 on 4 ranks (dp 2 x tp 2, sequence parallel) minus O0, `tiny`, {r['steps']} steps, "
            f"{len(row['gaps_nats'])} seeds",
            f"mean at most {r['gate_nats']} nats",
            f"{row['mean_gap_nats']:+.4f} ({seeds})",
        )
    ]


def _network(r: Result) -> list[tuple[str, str, str]]:
    limited = {
        preset: next(row for rate, row in rows.items() if "Mbit" in rate) for preset, rows in r["presets"].items()
    }
    free = ", ".join(f"`{preset}` {rows['unlimited']['speedup']:.2f}" for preset, rows in r["presets"].items())
    found = ", ".join(
        f"`{preset}` {row['speedup']:.2f} ({row['O0']['step_ms']:.0f} to {row['O3']['step_ms']:.0f} ms)"
        for preset, row in limited.items()
    )
    return [
        (
            "step of O3 against O0 over a link of 100 Mbit/s, 2 ranks of 1,024 tokens: times as fast",
            f"at least {r['target_speedup']}",
            f"{found}; unlimited {free}",
        )
    ]


def _zero(r: Result) -> list[tuple[str, str, str]]:
    rows = {name: row for name, row in r["rows"].items() if "O3, world 4" in name}
    stages = {stage: [row for name, row in rows.items() if name.endswith(f"stage {stage}")] for stage in (1, 2)}
    held = ", ".join(f"{max(row['bytes_per_parameter'] for row in found):.2f}" for found in stages.values())
    shares = [row["wire_share_of_bf16_fp32"] for name, row in r["rows"].items() if ", O3," in name]
    return [
        (
            "O3, world 4, ZeRO stage 1, 2: bytes of state per parameter on the fullest rank, matrices in FP8",
            "at most 3.25, 2.50, plus 3 %",
            held,
        ),
        (
            "O3: weight and gradient bytes of a step over a BF16 gather and an FP32 scatter",
            f"at most {r['targets']['wire_share_of_bf16_fp32']}",
            f"{max(shares):.3f}",
        ),
    ]


def _sequence(r: Result) -> list[tuple[str, str, str]]:
    shares = ", ".join(f"{row['O3_share']:.3f}" for row in r["worlds"].values())
    return [(f"sequence-parallel activation bytes over BF16, world {', '.join(r['worlds'])}", "at most 0.52", shares)]


def _reduction(r: Result) -> list[tuple[str, str, str]]:
    cells = [world for kind in ("normal", "student_t") for world in r["sqnr_db"][kind]["whole tensor"].values()]
    low, high = (f"{limit(cell['all_reduce'] for cell in cells):.1f}" for limit in (min, max))
    ring = r["sqnr_db"]["normal"]["whole tensor"]["64"]["ring"]
    return [
        (
            "FP8 all-reduce against the exact mean, N(0, 1) and Student-t(3), 2 to 64 ranks",
            "at least 27 dB, flat",
            f"{low} to {high} dB (a ring that sums in FP8: {ring:.1f} at 64)",
        )
    ]


def _products(r: Result) -> list[tuple[str, str, str]]:
    found, targets = r["sqnr_db"]["whole tensor"], r["targets_db"]
    return [
        (
            "Fp8Linear against FP32, N(0, 1), 1024 cubed: " + ", ".join(targets),
            "at least " + ", ".join(f"{db:g}" for db in targets.values()) + " dB",
            ", ".join(f"{found[name]:.2f}" for name in targets) + " dB",
        )
    ]


def _accumulation(r: Result) -> list[tuple[str, str, str]]:
    rows = r["sqnr_db"]["tiny"]
    stored = ", ".join(f"{row['stored_db']:.1f}" for row in rows.values())
    control = ", ".join(f"{row['control_db']:.1f}" for row in rows.values())
    return [
        (
            f"accumulated gradient, {', '.join(rows)} micro-batches",
            f"at least {r['target_stored_db']:g} dB",
            f"{stored} dB (rounded at every micro-batch: {control})",
        )
    ]


def _scales(r: Result) -> list[tuple[str, str, str]]:
    amaxes = sum(row["amaxes"] for row in r["sweeps"].values())
    errors = sum(n for row in r["sweeps"].values() for n in row["errors"].values())
    control = sum(r["control_log2_errors"].values())
    return [("scales around every binade, three formats", "exact", f"{errors} errors of {amaxes} (log2: {control})")]


def _casts(r: Result) -> list[tuple[str, str, str]]:
    speeds, mismatches = r["speeds"], sum(r["mismatches"].values())
    return [
        ("encode of every BF16 and FP16 input against ml_dtypes", "0 mismatches", f"{mismatches} mismatches"),
        (
            f"CPU encode FP32 to E4M3, decode to BF16, over copy bandwidth ({r['threads']} thread(s))",
            "at least 0.75",
            f"{speeds['encode']['ratio']:.2f}, {speeds['decode']['ratio']:.2f}",
        ),
    ]


def _step(r: Result) -> list[tuple[str, str, str]]:
    ratio, rows = r["ratio_to_O0"], r["variants"]
    return [
        (
            "CPU step of `tiny`, O2 over O0",
            f"at most {r['target_O2_to_O0']}",
            f"{ratio['O2']:.2f} ({rows['O2']['step_ms']:.0f} ms; O0 {rows['O0']['step_ms']:.0f} ms, torch alone "
            f"{rows['torch']['step_ms']:.0f} ms)",
        )
    ]


def _resume(r: Result) -> list[tuple[str, str, str]]:
    same = sum(row["identical"] for row in r["rows"])
    steps = sum(row["steps"] for row in r["rows"])
    return [("losses after a resume, O1 and O2, 1 and 2 ranks", "bit-identical", f"{same} of {steps} steps")]


def _moments(r: Result) -> list[tuple[str, str, str]]:
    second = {
        row["rounding"]: row
        for row in r["moments"]["second moment"]
        if (row["format"], row["block"], row["beta"]) == ("fp16", "1x128", 0.999)
    }
    each = "; ".join(
        f"{rounding} {row['stale']:.1%} (FP32 {row['stale_fp32']:.1%}), {row['bias']:+.1%} once gradients fell"
        for rounding, row in second.items()
    )
    return [("FP16 second moment, beta2 0.999: steps that leave it unchanged, bias", "it moves, without bias", each)]


ROWS: dict[str, tuple[str, Callable[[Result], list[tuple[str, str, str]]]]] = {
    "loss_gap": ("loss_gap.json", _loss_gap),
    "state": ("state.json", _state),
    "wire": ("wire.json", _wire),
    "loss_gap_sharded": ("loss_gap_sharded.json", _loss_gap_sharded),
    "network": ("network.json", _network),
    "zero": ("zero.json", _zero),
    "sequence_bytes": ("sequence_bytes.json", _sequence),
    "reduction_error": ("reduction_error.json", _reduction),
    "accumulation": ("accumulation.json", _accumulation),
    "products": ("products.json", _products),
    "scales": ("scales.json", _scales),
    "casts": ("casts-cpu.json", _casts),
    "step": ("step-cpu.json", _step),
    "resume": ("resume.json", _resume),
    "moments": ("moments.json", _moments),
}


def table(results: Path) -> list[str]:
    """The lines of the table, a result a line; a missed target says so."""
    lines = ["| figure | to reach | measured | |", "|---|---|---|---|"]
    for name, (file, rows) in ROWS.items():
        result = json.loads((results / file).read_text())
        link = f"[`{name}`](docs/results/{file})"
        missed = "" if result.get("reached", True) else "missed, "
        lines += [f"| {figure} | {target} | {measured} | {missed}{link} |" for figure, target, measured in rows(result)]
    return lines


def variants(results: Path) -> list[str]:
    """What the level costs in loss: the runs of loss_gap beside O0's of the same seeds."""
    result = json.loads((results / "loss_gap.json").read_text())
    lines = ["| policy | seeds | validation loss minus O0's, nats | mean |", "|---|---|---|---|"]
    for name, row in result["summary"].items():
        gaps = ", ".join(f"{gap:+.4f}" for gap in row["gaps_nats"])
        lines.append(f"| {name} | {len(row['gaps_nats'])} | {gaps} | {row['mean_gap_nats']:+.4f} |")
    return lines


PAGES: dict[str, Callable[[Path], list[str]]] = {"README.md": table, "docs/explanation/numerics.md": variants}


def rewritten(page: str, lines: list[str]) -> str:
    """The text of a page with fresh lines between the two marks."""
    head, _, rest = page.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise ValueError(f"a page must hold {BEGIN!r} and then {END!r}; put them where the table belongs")
    return "\n".join([head + BEGIN, *lines, END]) + tail


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = options.parse_args().check
    root = Path(__file__).resolve().parent.parent
    stale = []
    for name, lines in PAGES.items():
        page = root / name
        before = page.read_text()
        after = rewritten(before, lines(root / "docs" / "results"))
        if before != after:
            stale.append(name)
            if not check:
                page.write_text(after)
    print(f"out of date: {', '.join(stale)}" if stale else "every table is up to date")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
