"""Lines of results about time and memory; see :mod:`benchmarks.rows`."""

from __future__ import annotations

from benchmarks.row import Result, Row, above, below

ACTIVATION_MEMORY = (
    (
        "peak activation memory, O2 with FP8 saved activations over O0 (BF16), GPT of the 125M shape",
        "at most 0.65",
    ),
)
OPTIMIZER = (
    ("CPU optimizer step, O2 AdamW over torch's fused FP32 AdamW", "at most 0.7"),
    ("CPU optimizer step, O2 AdamW over DeepSpeed CPUAdam", "at most 0.8"),
    ("CPU optimizer step, lean AdamW over O2 AdamW", "at most 1"),
)


def activation_memory(r: Result) -> list[Row]:
    peaks, kept, limit = r["peak"], r["kept"], r["target_ratio"]
    ours, plain, o2 = peaks["O2, FP8 saved"], peaks["O0"], peaks["O2"]
    again, again_plain = peaks["O2, FP8 saved, checkpointed"], peaks["O0, checkpointed"]
    share = kept["O2, FP8 saved"]["ratio"]
    largest = ", ".join(f"`{row['operation']}` {row['mib'] / ours['mib']:.0%}" for row in ours["largest"][:3])
    places = ", ".join(f"{name} {size / ours['mib']:.0%}" for name, size in ours["made_in"].items() if size)
    gradients = r["gradients_db"]
    return [
        Row(
            f"peak activation memory, O2 with FP8 saved activations over O0 (BF16), GPT of the 125M shape, "
            f"{r['batch']} x {r['context']:,} tokens",
            f"at most {limit}",
            f"{ours['ratio']:.3f} ({plain['mib']:,.0f} to {ours['mib']:,.0f} MiB; O2 alone {o2['ratio']:.3f}); "
            f"resident memory of the process {ours['resident_ratio']:.3f}",
            above(ours["ratio"], limit, f"alive at the peak: {largest}"),
        ),
        Row("alive at that peak, by where it was made; the largest operations", "", f"{places}; {largest}"),
        Row(
            "bytes kept for backward over O0's: a layer, the rest (head and loss), all",
            "",
            ", ".join(f"{share[kind]:.3f}" for kind in ("layer", "rest", "total")),
        ),
        Row(
            "the peak, each block under activation checkpointing, over O0's so",
            "",
            f"{again['mib'] / again_plain['mib']:.3f} ({again_plain['mib']:,.0f} to {again['mib']:,.0f} MiB)",
        ),
        Row(
            "what it costs: gradients against O0's, of O2 and with FP8 saved; forward and backward over O2's time",
            "",
            f"{gradients['O2 against O0']['all']:.1f}, {gradients['O2, FP8 saved against O0']['all']:.1f} dB; "
            f"{r['time_ratio_to_O2']:.2f}",
        ),
    ]


def optimizer(r: Result) -> list[Row]:
    found = []
    for target in r["targets"]:
        figure = f"CPU optimizer step, {target['case']} over {target['peer']}, {r['parameters']:,} parameters"
        if target["ratio"] is None:
            measured, missed = "unmeasured: " + r["rows"][target["peer"]].get("error", "the peer is missing"), ""
        else:
            row, peer = r["rows"][target["case"]], r["rows"][target["peer"]]
            measured = f"{target['ratio']:.2f} ({row['median_ns']:.2f} to {peer['median_ns']:.2f} ns a parameter)"
            missed = above(target["ratio"], target["most"], f"{row['of_bound']:.2f} of the time its bytes take")
        found.append(Row(figure, f"at most {target['most']}", measured, missed))
    named = {target[kind] for target in r["targets"] for kind in ("case", "peer")}
    others = [
        f"{name} " + (f"could not run ({row['error']})" if "error" in row else f"{row['ratio']:.2f}")
        for name, row in r["rows"].items()
        if name not in named and name != "copy"
    ]
    return [*found, Row("the others, over torch's fused FP32 AdamW", "", "; ".join(others))]


def fused(r: Result) -> list[Row]:
    rows, most = r["operations"], r["target_to_unfused"]
    worst = max(rows, key=lambda name: rows[name]["to_unfused"])
    each = ", ".join(f"{name} {row['to_unfused']:.2f}" for name, row in rows.items())
    limits = ", ".join(f"{name} {1 / row['to_limit']:.2f}" for name, row in rows.items())
    slowest = f"{worst}; {1 / rows[worst]['to_limit']:.2f} of copy speed"
    return [
        Row(
            "CPU norms, activations, softmax fused with their casts, over the time of separate passes",
            f"at most {most:g}",
            each,
            above(rows[worst]["to_unfused"], most, slowest),
        ),
        Row("the same, speed over that of a copy of as many bytes", "", limits),
    ]


def offload(r: Result) -> list[Row]:
    found, peer = r["devices"]["cpu"], r["computed"]["DeepSpeed ZeRO-Offload"]
    places = ("device", "host", "down", "up")
    limits = ", ".join(f"{peer[name]:g}" for name in places)
    lines = []
    for name, row in found["rows"].items():
        level, _, offloaded = name.partition(" ")
        if offloaded:
            excess = [above(row[place], peer[place], place) for place in places]
            lines.append(
                Row(
                    f"offload at {level}: bytes a parameter on the device, on the host, down and up in a step",
                    f"at most {limits} (ZeRO-Offload, computed)" if level != "O0" else "",
                    ", ".join(f"{row[place]:.2f}" for place in places),
                    ", ".join(one for one in excess if one) if level != "O0" else "",
                )
            )
    longer = ", ".join(f"{level} {ratio:.2f}" for level, ratio in found["step_with_over_without"].items())
    lines.append(Row("a step with offload over one without, device and host both this CPU", "", longer))
    overlap = "unmeasured: no GPU yet" if isinstance(r["devices"]["cuda"], str) else "see the JSON"
    return [*lines, Row("copies beside backward and step on a GPU", "", overlap)]


def overlap(r: Result) -> list[Row]:
    slowest, least = r["slowest"], r["target_speedup"]
    lines = []
    for preset, rates in r["presets"].items():
        row, free = rates[slowest], rates["unlimited"]["speedup"]
        hidden = ", ".join(
            f"{level} {row[f'{level}/apart'].get('exposed', 0):.2f} to {row[f'{level}/beside'].get('exposed', 0):.2f}"
            for level in row["speedup"]
        )
        each = ", ".join(f"{level} {ratio:.2f}" for level, ratio in row["speedup"].items())
        lines.append(
            Row(
                f"`{preset}` split over two nodes, {slowest}: exchanges beside products, times as fast as one after "
                "the other",
                f"at least {least:g}",
                f"{each} (share of the link's time not hidden: {hidden}; unlimited "
                + ", ".join(f"{level} {ratio:.2f}" for level, ratio in free.items())
                + ")",
                below(min(row["speedup"].values()), least, "smaller products cost more than is hidden"),
            )
        )
    return lines
