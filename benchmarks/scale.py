"""Communication of GPT-7B, 13B and 175B on 32 to 16,384 GPUs, on paper: bytes and seconds of a step.

    python -m benchmarks.scale

An alpha-beta model (``costs.py``) of what each scheme sends (``workloads.py``). All constants are assumptions and
options: NVLink 4 and one 400 Gbit/s adapter a GPU as on an 8-GPU H100 node, 82 % and 90 % of their nominal 450 and
50 GB/s; latencies are what NCCL's own tuning table has for a ring with its Simple protocol (3.4 and 14 us); the gap
between two messages that do not wait for each other is ours, 1 and 2 us, and the crossovers are given for half a
microsecond and for the whole latency too. Buckets: ``fixed`` holds 8 Mi elements, as DataParallel's up to 8
ranks; ``grown`` holds max(40 million, 1 million a rank), Megatron-Core's default.

    scatter, gather     seconds of a step for gradients and for weights over the data-parallel group
    sent, across        bytes that one rank sends in both, and those of them that leave the node
    activations         bytes and seconds of a micro-batch for tensor and sequence parallelism
    limits              where the flat all-to-all stops
    cross_check         the published bytes and times beside this model's
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import costs
from benchmarks.costs import Cluster, Cost, Group, Link, repeated
from benchmarks.result import parser, write
from benchmarks.workloads import (
    ACTIVATIONS,
    GATHERS,
    PLANS,
    PUBLISHED,
    SCALE_BYTES,
    SCATTERS,
    SCHEMES,
    Plan,
    Scheme,
    activation_bytes,
    cross_check,
    parameters,
    volume,
)
from msamp_like.models.gpt import PRESETS

GPUS = tuple(32 * 2**i for i in range(10))
PAGE_GPUS = (32, 128, 512, 1024, 4096, 16384)
FIXED_ELEMENTS = 8 << 20
GAPS_US = (0.5, 2.0, 14.0)
GAIN = 1.1
"""How much faster counts as faster in the limits."""

Bucketing = Callable[[int], int]
BUCKETS: dict[str, Bucketing] = {
    "fixed": lambda ranks: FIXED_ELEMENTS,
    "grown": lambda ranks: max(40_000_000, 1_000_000 * ranks),
}


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The links that the options name, in GB/s and us."""
    inside = Link(
        bandwidth=options.inside_gb_s * 1e9,
        latency_s=options.inside_latency_us * 1e-6,
        gap_s=options.inside_gap_us * 1e-6,
    )
    across = Link(
        bandwidth=options.across_gb_s * 1e9,
        latency_s=options.across_latency_us * 1e-6,
        gap_s=options.across_gap_us * 1e-6,
    )
    return Cluster(node=options.node, inside=inside, across=across)


def data_group(cluster: Cluster, plan: Plan, gpus: int) -> Group:
    """The ranks that hold the same part of the model: tensor parallelism fills a node first."""
    ranks = gpus // (plan.tensor * plan.pipeline)
    return Group(ranks=ranks, per_node=min(ranks, max(1, cluster.node // plan.tensor)))


# --- one step -------------------------------------------------------------------------------------------------------


def scatter_cost(cluster: Cluster, group: Group, scheme: Scheme, buffer: float, tensors: int) -> Cost:
    """One bucket's reduce-scatter, with what settles its scales."""
    few = SCALE_BYTES * max(tensors, group.ranks)  # each rank gets the scales of its shard: one at the least
    if scheme.way == "flat":
        return costs.joined(costs.flat(cluster, group, buffer), costs.flat(cluster, group, few))
    if scheme.way == "forwarded":
        return costs.joined(costs.forwarded(cluster, group, buffer), costs.forwarded(cluster, group, few))
    if scheme.way == "summed":
        codes = costs.summed(cluster, group, buffer, buffer * scheme.partial)
        return costs.joined(codes, costs.summed(cluster, group, few, group.ranks))
    reduced = costs.ring(cluster, group, buffer)
    return costs.joined(reduced, costs.tree(cluster, group, SCALE_BYTES * tensors)) if scheme.scales else reduced


def gather_cost(cluster: Cluster, group: Group, scheme: Scheme, buffer: float, tensors: int) -> Cost:
    """One bucket's all-gather, with the amax that its scales come from."""
    gathered = costs.ring(cluster, group, buffer)
    return costs.joined(gathered, costs.tree(cluster, group, SCALE_BYTES * tensors)) if scheme.scales else gathered


def step(cluster: Cluster, plan: Plan, gpus: int, scheme: Scheme, bucketing: Bucketing) -> dict[str, float]:
    """Seconds and bytes of one rank in one step over its data-parallel group."""
    group, counts = data_group(cluster, plan, gpus), parameters(plan.preset)
    elements = volume(plan, {"matrices": 1, "tables": 1, "vectors": 1})
    buckets = math.ceil(elements / bucketing(group.ranks))
    tensors = math.ceil(counts["tensors"] / plan.pipeline / buckets)
    scatter = scatter_cost(cluster, group, scheme, volume(plan, scheme.scatter) / buckets, tensors)
    gather = gather_cost(cluster, group, scheme, volume(plan, scheme.gather) / buckets, tensors)
    across = buckets * (scatter.across_bytes + gather.across_bytes)
    return {
        "scatter_s": repeated(scatter, buckets),
        "gather_s": repeated(gather, buckets),
        "sent_gb": (across + buckets * (scatter.inside_bytes + gather.inside_bytes)) / 1e9,
        "across_gb": across / 1e9,
        "messages": buckets * (scatter.messages + gather.messages),
    }


def activations(cluster: Cluster, plan: Plan, scheme: str) -> dict[str, float]:
    """Bytes and seconds of one rank in one micro-batch, forward and backward, inside the node."""
    group, config = Group(ranks=plan.tensor, per_node=plan.tensor), PRESETS[plan.preset]
    elements = plan.micro_batch * config.context * config.dim
    gather, scatter = ACTIVATIONS[scheme]
    reduce = costs.flat if scheme == "ours" else costs.ring
    seconds = GATHERS * costs.ring(cluster, group, elements * gather).seconds
    seconds += SCATTERS * reduce(cluster, group, elements * scatter).seconds
    return {"sent_gb": activation_bytes(plan, scheme) / 1e9, "seconds": plan.layers * seconds}


# --- where it stops -------------------------------------------------------------------------------------------------


def first_gpus(cluster: Cluster, plan: Plan, bucketing: Bucketing, better: str, worse: str) -> int | None:
    """The fewest GPUs at which ``worse`` scatters gradients at least ``GAIN`` times slower than ``better``."""
    for gpus in GPUS:
        if gpus >= plan.tensor * plan.pipeline * 2:
            times = [step(cluster, plan, gpus, SCHEMES[s], bucketing)["scatter_s"] for s in (better, worse)]
            if times[1] >= GAIN * times[0]:
                return gpus
    return None


def limits(cluster: Cluster) -> dict[str, Any]:
    """For each gap: the ranks at which a bucket's part of a peer is smaller than what a gap could carry, and the first
    GPUs of the ladder where the flat form falls behind."""
    found: dict[str, Any] = {}
    for gap_us in GAPS_US:
        link = Link(
            bandwidth=cluster.across.bandwidth, latency_s=cluster.across.latency_s, gap_s=max(gap_us, 1e-9) * 1e-6
        )
        tried = Cluster(node=cluster.node, inside=cluster.inside, across=link)
        smallest = link.gap_s * link.bandwidth
        rows = {
            f"{name} {buckets}": {
                f"{better} over flat": first_gpus(tried, plan, bucketing, better, "flat")
                for better in ("bf16", "forwarded", "summed_bf16")
            }
            for name, plan in PLANS.items()
            for buckets, bucketing in BUCKETS.items()
        }
        found[f"{gap_us:g} us"] = {
            "smallest_message_kb": round(smallest / 1e3, 1),
            "ranks_of_a_fixed_bucket": int(FIXED_ELEMENTS / smallest),
            "first_gpus": rows,
        }
    return found


def published_times(cluster: Cluster) -> dict[str, Any]:
    """Seconds of weight communication a step: the paper's share of its step, and this model's with grown buckets."""
    rows: dict[str, Any] = {}
    for name, published in PUBLISHED.items():
        plan = PLANS[name]
        gpus = published["ranks"] * plan.tensor * plan.pipeline
        for kind, scheme, samples, rate in zip(
            ("bf16", "fp8"), ("bf16_fp32", "fp8_lm"), published["samples"], published["rate"], strict=True
        ):
            ours = step(cluster, plan, gpus, SCHEMES[scheme], BUCKETS["grown"])
            theirs = rate * published["batch"] / samples
            rows[f"{name} {kind}"] = {
                "published_s": round(theirs, 3),
                "ours_s": round(ours["scatter_s"] + ours["gather_s"], 3),
                "implied_gb_s": round(ours["sent_gb"] / theirs, 1),
            }
    return rows


# --- the whole ------------------------------------------------------------------------------------------------------


def figures(cluster: Cluster) -> dict[str, Any]:
    """Everything that the JSON holds but the assumptions."""
    steps = {
        name: {
            str(gpus): {
                buckets: {
                    kind: {key: float(f"{value:.4g}") for key, value in row.items()}
                    for kind, scheme in SCHEMES.items()
                    for row in [step(cluster, plan, gpus, scheme, bucketing)]
                }
                for buckets, bucketing in BUCKETS.items()
            }
            for gpus in GPUS
        }
        for name, plan in PLANS.items()
    }
    sequence = {
        name: {
            kind: {key: float(f"{value:.4g}") for key, value in activations(cluster, plan, kind).items()}
            for kind in ACTIVATIONS
        }
        for name, plan in PLANS.items()
        if plan.tensor > 1
    }
    return {
        "parameters": {name: dict(parameters(name)) for name in PLANS},
        "steps": steps,
        "activations": sequence,
        "limits": limits(cluster),
        "cross_check": cross_check() | {"seconds": published_times(cluster)},
    }


def page_table(result: dict[str, Any], buckets: str, gpus: Sequence[int] = PAGE_GPUS) -> str:
    """Milliseconds of the scatter under every scheme and of the gather in BF16 and in FP8, as Markdown."""
    columns = [(kind, "scatter_s") for kind in SCHEMES] + [("bf16", "gather_s"), ("flat", "gather_s")]
    heads = [*(f"`{kind}`" for kind in SCHEMES), "gather, BF16", "gather, FP8"]
    lines = ["| model | GPUs | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for name, rows in result["steps"].items():
        for count in gpus:
            row = rows[str(count)][buckets]
            if row["bf16"]["sent_gb"] > 0:
                cells = [_ms(row[kind][key]) for kind, key in columns]
                lines.append(f"| {name} | {count:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}"


def draw(result: dict[str, Any], out: Path) -> None:
    """Seconds of a step over GPUs, one panel a model and way of bucketing."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), sharex=True, sharey="col", layout="constrained")
    for column, (name, rows) in enumerate(result["steps"].items()):
        for line, buckets in enumerate(BUCKETS):
            axis = axes[line][column]
            for kind in SCHEMES:
                points = {int(g): r[buckets][kind]["scatter_s"] + r[buckets][kind]["gather_s"] for g, r in rows.items()}
                points = {g: s for g, s in points.items() if s > 0}
                style = "-" if SCHEMES[kind].way != "ring" else "--"
                axis.plot(list(points), list(points.values()), style, label=kind, linewidth=1.2)
            axis.set(title=f"{name}, {buckets} buckets", xscale="log", yscale="log")
            axis.minorticks_off()
            if column == 0:
                axis.set_ylabel("seconds a step")
            if line == 1:
                axis.set_xlabel("GPUs")
    axes[0][0].legend(fontsize="x-small")
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "msamp_like"}):
        figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)
    print(f"wrote {out}")


def options() -> argparse.ArgumentParser:
    """Every constant of the model."""
    made = parser(__doc__, "docs/results/scale.json")
    made.add_argument("--node", type=int, default=8, help="GPUs a node (default: %(default)s)")
    for name, value, unit in (
        ("inside-gb-s", 370.0, "GB/s of one GPU inside its node, one direction"),
        ("inside-latency-us", 3.4, "us of a message inside a node that the next waits for"),
        ("inside-gap-us", 1.0, "us of one more message inside a node"),
        ("across-gb-s", 45.0, "GB/s of one GPU's adapter, one direction"),
        ("across-latency-us", 14.0, "us of a message across nodes that the next waits for"),
        ("across-gap-us", 2.0, "us of one more message across nodes"),
    ):
        made.add_argument(f"--{name}", type=float, default=value, help=f"{unit} (default: %(default)s)")
    made.add_argument("--plot", action="store_true", help="draw a picture beside the JSON too (needs matplotlib)")
    return made


def main() -> None:
    arguments = options().parse_args()
    result = figures(cluster_of(arguments))
    for buckets in BUCKETS:
        print(f"{buckets} buckets, ms a step\n{page_table(result, buckets)}\n")
    assumptions = {k: v for k, v in vars(arguments).items() if k not in ("out", "plot")}
    write(arguments.out, {"assumptions": assumptions | {"fixed_bucket_elements": FIXED_ELEMENTS}, **result})
    if arguments.plot:
        draw(result, arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
