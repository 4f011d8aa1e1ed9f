"""What each committed result says in a line or two of a table: the figure, what it should reach, what was measured.

:mod:`benchmarks.summary` writes them into the pages. A function a result, from the JSON to the lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Result = dict[str, Any]
Row = tuple[str, str, str]
"""Figure, to reach, measured."""


class Entry(NamedTuple):
    """A result's file under docs/results, its lines, and whether they stand in README.md too."""

    file: str
    rows: Callable[[Result], list[Row]]
    headline: bool = True


def _loss_gap(r: Result) -> list[Row]:
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


def _state(r: Result) -> list[Row]:
    rows = r["bytes_per_parameter"]
    rest = {name: rows[name]["at rest"]["total"] for name in ("O0", "O1", "O2")}
    held = ", ".join(f"{name} {total:.2f}" for name, total in r["with compute copies"].items())
    limits = ", ".join(f"{name} {limit:g}" for name, limit in r["limits"].items())
    return [
        (
            "bytes of state per parameter, matrices, gradients included",
            "O1 11, O2 6, within 3 %",
            ", ".join(f"{level} {total:.2f}" for level, total in rest.items()),
        ),
        ("the same, with the compute copies of FP8 matrices", f"at most {limits}", held),
    ]


def _wire(r: Result) -> list[Row]:
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


def _loss_gap_sharded(r: Result) -> list[Row]:
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


def _network(r: Result) -> list[Row]:
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


def _zero(r: Result) -> list[Row]:
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


def _sequence(r: Result) -> list[Row]:
    shares = ", ".join(f"{row['O3_share']:.3f}" for row in r["worlds"].values())
    return [(f"sequence-parallel activation bytes over BF16, world {', '.join(r['worlds'])}", "at most 0.52", shares)]


def _reduction(r: Result) -> list[Row]:
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


def _products(r: Result) -> list[Row]:
    found, targets = r["sqnr_db"]["whole tensor"], r["targets_db"]
    return [
        (
            "Fp8Linear against FP32, N(0, 1), 1024 cubed: " + ", ".join(targets),
            "at least " + ", ".join(f"{db:g}" for db in targets.values()) + " dB",
            ", ".join(f"{found[name]:.2f}" for name in targets) + " dB",
        )
    ]


def _accumulation(r: Result) -> list[Row]:
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


def _scales(r: Result) -> list[Row]:
    amaxes = sum(row["amaxes"] for row in r["sweeps"].values())
    errors = sum(n for row in r["sweeps"].values() for n in row["errors"].values())
    control = sum(r["control_log2_errors"].values())
    return [("scales around every binade, three formats", "exact", f"{errors} errors of {amaxes} (log2: {control})")]


def _casts(r: Result) -> list[Row]:
    speeds, mismatches = r["speeds"], sum(r["mismatches"].values())
    return [
        ("encode of every BF16 and FP16 input against ml_dtypes", "0 mismatches", f"{mismatches} mismatches"),
        (
            f"CPU encode FP32 to E4M3, decode to BF16, over copy bandwidth ({r['threads']} thread(s))",
            "at least 0.75",
            f"{speeds['encode']['ratio']:.2f}, {speeds['decode']['ratio']:.2f}",
        ),
    ]


def _step(r: Result) -> list[Row]:
    return [
        (
            f"CPU step of `{preset}`, O2 over O0",
            f"at most {r['target_to_O0']}",
            f"{row['ratio_to_O0']['O2']:.2f} ({row['variants']['O2']['step_ms']:.0f} ms; O0 "
            f"{row['variants']['O0']['step_ms']:.0f} ms, torch alone {row['variants']['torch']['step_ms']:.0f} ms)",
        )
        for preset, row in r["presets"].items()
    ]


def _resume(r: Result) -> list[Row]:
    same = sum(row["identical"] for row in r["rows"])
    steps = sum(row["steps"] for row in r["rows"])
    return [("losses after a resume, O1 and O2, 1 and 2 ranks", "bit-identical", f"{same} of {steps} steps")]


def _moments(r: Result) -> list[Row]:
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


def _optimizer(r: Result) -> list[Row]:
    targets = [
        (
            f"CPU optimizer step, {target['case']} over {target['peer']}",
            f"at most {target['most']}",
            "not measured: the peer is missing"
            if target["ratio"] is None
            else f"{target['ratio']:.2f} ({r['rows'][target['case']]['median_ns']:.2f} ns a parameter)",
        )
        for target in r["targets"]
    ]
    names = ("O2 Lion", "lean Lion", "O2 SGD", "lean SGD", "torch SGD, fused, FP32")
    others = ", ".join(f"{name} {r['rows'][name]['ratio']:.2f}" for name in names)
    return [*targets, ("CPU optimizer step over torch AdamW, fused, FP32", "", others)]


ROWS: dict[str, Entry] = {
    "loss_gap": Entry("loss_gap.json", _loss_gap),
    "state": Entry("state.json", _state),
    "wire": Entry("wire.json", _wire),
    "loss_gap_sharded": Entry("loss_gap_sharded.json", _loss_gap_sharded),
    "network": Entry("network.json", _network),
    "zero": Entry("zero.json", _zero),
    "sequence_bytes": Entry("sequence_bytes.json", _sequence),
    "reduction_error": Entry("reduction_error.json", _reduction),
    "step": Entry("step-cpu.json", _step),
    "resume": Entry("resume.json", _resume),
    "accumulation": Entry("accumulation.json", _accumulation, headline=False),
    "products": Entry("products.json", _products, headline=False),
    "scales": Entry("scales.json", _scales, headline=False),
    "casts": Entry("casts-cpu.json", _casts, headline=False),
    "moments": Entry("moments.json", _moments, headline=False),
}
