"""Lines of results about how close FP8 stays; see :mod:`benchmarks.rows`."""

from __future__ import annotations

from benchmarks.loss_gap import GATED
from benchmarks.row import Result, Row, below_db


def loss_gap(r: Result) -> list[Row]:
    """Every policy that is gated or was run; the broken ones, which have to fail, last."""
    names = [name for name in dict.fromkeys([*GATED, *r["summary"]]) if name != "O0"]
    return [_gap(r, name) for name in sorted(names, key=lambda name: name.startswith("broken"))]


def _gap(r: Result, name: str) -> Row:
    row, gate, broken = r["summary"].get(name), r["gate_nats"], name.startswith("broken")
    figure = f"validation loss, {name} minus O0, `tiny`, {r['steps']} steps"
    to_reach = f"mean {'above' if broken else 'at most'} {gate} nats"
    if row is None:
        return Row(figure, to_reach, "unmeasured: not run yet")
    mean, gaps = row["mean_gap_nats"], row["gaps_nats"]
    measured = f"{mean:+.4f} ({', '.join(f'{gap:+.4f}' for gap in gaps)}; {len(gaps)} seeds)"
    if broken:
        return Row(figure, to_reach, measured, "" if mean > gate else "the control passes")
    return Row(figure, to_reach, measured, f"by {mean - gate:.4f} nats" if mean > gate else "")


def muon(r: Result) -> list[Row]:
    rows = r["iteration"]
    found = {name: (row["e4m3"]["sqnr_db"], row["polar_db"]) for name, row in rows.items()}
    control = ", ".join(f"{row['e4m3 as written']['sqnr_db']:.1f}" for row in rows.values())
    ms, gaps = r["step"]["ms"], r["gap_nats"]
    return [
        Row(
            f"Muon's update, FP8 products against FP32's: {', '.join(rows)}",
            "at least " + ", ".join(f"{polar:.1f}" for _, polar in found.values()) + " dB (FP32's to the polar factor)",
            ", ".join(f"{db:.1f}" for db, _ in found.values()) + f" dB (polynomial as usually written: {control})",
            below_db(list(found.values())),
        ),
        Row(
            f"Muon's step of a matrix of {r['step']['size']} squared on this CPU, O2 over O0",
            "",
            f"{r['step']['o2_over_o0']:.2f} ({ms['O0']:.0f} to {ms['O2']:.0f} ms; torch's Muon {ms['torch']:.0f})",
        ),
        Row(
            f"validation loss, O2 minus O0, `tiny`, {r['steps']} steps, one seed: Muon, AdamW",
            "",
            f"{gaps['muon']:+.4f}, {gaps['adamw']:+.4f} nats",
        ),
    ]


def attention(r: Result) -> list[Row]:
    rows, targets = r["sqnr_db"]["N(0, 1)"], r["targets_db"]
    ours, plain = rows["fp8, E4M3 gradients"], rows["bf16"]
    causal, kept, time = r["causal_to_the_bit"], r["kept_bytes_per_element"], r["time"]
    broken = not causal["a scale a row"]
    return [
        Row(
            f"FP8 attention against FP32, N(0, 1), causal, {r['length']} tokens: output, dQ, dK, dV",
            "at least " + ", ".join(f"{db:g}" for db in targets.values()) + " dB",
            ", ".join(f"{ours[name]:.1f}" for name in targets)
            + " dB (BF16 "
            + ", ".join(f"{plain[name]:.1f}" for name in targets)
            + ")",
            below_db([(ours[name], db) for name, db in targets.items()]),
        ),
        Row(
            "earlier outputs of FP8 attention, a last token 1e5 times as large",
            "same bits",
            ("others" if broken else "same bits")
            + f" (one scale a tensor: {'same bits' if causal['one scale a tensor'] else 'others'})",
            "a scale reaches further than a row" if broken else "",
        ),
        Row(
            "bytes an element of Q that backward keeps, and time on this CPU, over BF16's",
            "",
            f"{kept['fp8'] / kept['bf16']:.2f} ({kept['bf16']:.2f} to {kept['fp8']:.2f}), {time['fp8_over_bf16']:.1f}",
        ),
        Row(
            f"validation loss, FP8 attention minus BF16's at O2, `tiny`, {r['steps']} steps, one seed",
            "",
            f"{r['gap_nats']:+.4f} nats",
        ),
    ]


def grouped(r: Result) -> list[Row]:
    ours, targets, control, time = r["sqnr_db"]["O2"], r["targets_db"], r["control_db"], r["time"]
    return [
        Row(
            f"FP8 grouped linear layer against FP32, {r['sizes']['experts']} experts: {', '.join(targets)}",
            "at least " + ", ".join(f"{db:g}" for db in targets.values()) + " dB",
            ", ".join(f"{ours[name]:.2f}" for name in targets) + " dB",
            below_db([(ours[name], db) for name, db in targets.items()]),
        ),
        Row(
            "output of an expert whose weights are 2^-17 of the others'",
            f"at least {targets['output']:g} dB",
            f"{control['a scale an expert']:.1f} dB (one scale for all: {control['one scale']:.1f})",
            below_db([(control["a scale an expert"], targets["output"])]),
        ),
        Row(
            "forward and backward on this CPU, O2 over O0 and over torch's grouped product in BF16",
            "",
            f"{time['o2_over_O0']:.2f}, {time['o2_over_torch']:.2f}",
        ),
    ]


def recipes(r: Result) -> list[Row]:
    targets = list(r["targets_db"].values())
    times = {row["recipe"]: row["ms"] for row in r["rows"]}
    lines = []
    for row in r["rows"]:
        if row["recipe"] in ("torch", "O0"):
            continue
        lines.append(
            Row(
                f"recipe `{row['recipe']}`, one linear layer: {', '.join(r['targets_db'])}; small tokens beside large",
                "at least " + ", ".join(f"{db:g}" for db in targets) + " dB",
                ", ".join(f"{db:.1f}" for db in row["even"])
                + " dB; "
                + ", ".join(f"{db:.1f}" for db in row["uneven"])
                + f" dB; keeps {row['kept']:.2f} bytes an element; {row['ms'] / times['O0']:.2f} of O0's time",
                below_db(list(zip(row["even"], targets, strict=True))),
            )
        )
    limit = f"{r['limit ms'] / times['O0']:.2f} (torch's layer {times['torch'] / times['O0']:.2f})"
    return [*lines, Row("the limit there, three BF16 products alone, over O0's time", "", limit)]


def invariance(r: Result) -> list[Row]:
    measures = ("causality", "padding", "batch split")
    held = [row for row in r["rows"] if row["recipe"] not in r["shared"]]
    failed = {row["recipe"]: [m for m in measures if row[m] != "exact"] for row in held}
    lost = "; ".join(
        f"`{row['recipe']}` " + ", ".join(f"{row[m]}" for m in measures) + " dB"
        for row in r["rows"]
        if row["recipe"] in r["shared"]
    )
    gradients = ", ".join(f"{row['recipe']} {row['gradients, batch split']}" for row in held)
    return [
        Row(
            "outputs beside a later token, padding, another sequence a thousand times as large: "
            + ", ".join(row["recipe"] for row in held),
            "same bits",
            "; ".join(f"{name}: {', '.join(found)} changed" for name, found in failed.items() if found)
            or f"same bits (controls: {lost})",
            "a scale reaches over tokens" if any(failed.values()) else "",
        ),
        Row("gradients of weights of one batch against those of four, sums over tokens", "", f"{gradients} dB"),
    ]
