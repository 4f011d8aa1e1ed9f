"""The error of an FP8 reduction over 2 to 64 ranks against FP32's, in dB of SQNR.

    python -m benchmarks.reduction_error

The ranks are simulated in one process and run the product's own code (``comm/collectives.py``); a test holds worlds 2
and 4 against gloo ranks, bit for bit. A rank's tensor is 512 x 1024:

    normal          N(0, 1), independent on every rank
    student_t       Student's t with 3 degrees of freedom: a few elements hundreds of times larger than the rest
    identical       N(0, 1), the same on every rank: sums grow with the world, not with its root
    rows            N(0, 1) times a row's own 2^-u, u uniform in 0 to 20, on every rank alike

For each, at every world, beside each other:

    reduce_scatter  codes travel, the owner sums in FP32: what a sharded optimizer reads
    all_reduce      the same, rounded once more and gathered: what replicas read
    ..._between     both by NodeSums (``comm/hierarchical.py``): nodes of up to 8, partial sums in BF16 or E4M3
    ring, tree      summed in E4M3, rounded after every addition, under the best scale there is (``fp8_sums.py``)
    fp8_lm          the paper's scheme with mu, around a ring

and for ``rows`` the median row, the 5th percentile and the share of non-zero means that became zero, with one scale a
tensor and with one a block of (1, 128); two codes that cancel make a zero too, 1.4 % of all at world 2. To reach: at
least 27 dB for normal and student_t, and no more than 1 dB between any two worlds. The control is the ring, which must
fail both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fp8_sums import fp8_lm, fp8_sums
from benchmarks.products import sqnr_db
from benchmarks.result import parser, write
from benchmarks.simulated_ranks import SimulatedGroup, simulate
from msamp_like.comm.buckets import Layout
from msamp_like.comm.collectives import Steps, all_gather_quantized, reduce_scatter_quantized
from msamp_like.comm.hierarchical import NodeSums
from msamp_like.formats import BF16, E4M3, WHOLE, Block, Format
from msamp_like.policy import Rule
from msamp_like.scaling import quantize
from msamp_like.tensor import ScalingTensor

SHAPE = (512, 1024)
WORLDS = (2, 4, 8, 16, 64)
LEAST_DB, FLAT_DB = 27.0, 1.0
BLOCKS: dict[str, Block] = {"whole tensor": WHOLE, "blocks of (1, 128)": (1, 128)}
HELD = ("normal", "student_t")
OURS = ("reduce_scatter", "all_reduce")


# --- what is reduced ------------------------------------------------------------------------------------------------


def normal(generator: torch.Generator, shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=generator)


def student_t(generator: torch.Generator, shape: tuple[int, int]) -> Tensor:
    chi_squared = torch.randn(3, *shape, generator=generator).square().sum(0)
    return torch.randn(shape, generator=generator) / (chi_squared / 3).sqrt()


def inputs(kind: str, world: int, shape: tuple[int, int] = SHAPE, seed: int = 0) -> Tensor:
    """Every rank's tensor, (world, rows, columns)."""
    shared = torch.Generator().manual_seed(10_000 + seed)
    generators = [torch.Generator().manual_seed(100 * seed + rank) for rank in range(world)]
    if kind == "identical":
        return normal(shared, shape).expand(world, *shape).contiguous()
    values = torch.stack([(student_t if kind == "student_t" else normal)(g, shape) for g in generators])
    if kind == "rows":
        values *= torch.exp2(-20 * torch.rand(shape[0], 1, generator=shared))
    return values


def per_node(world: int) -> int:
    """Ranks a node where there are nodes: 8, or what leaves two nodes."""
    return min(8, world // 2)


# --- the product's reduction ----------------------------------------------------------------------------------------


def product(values: Tensor, block: Block, between: Format | None = None) -> dict[str, Tensor]:
    """Means over dim 0 of (world, rows, columns) by the product's two halves on simulated ranks.

    With ``between`` the first half sums inside nodes and then across, and partial sums travel in that format.
    """
    world, shape = values.shape[0], values[0].shape
    rule = Rule(format=E4M3, block=block)

    def steps(group: SimulatedGroup) -> Steps[tuple[Tensor, Tensor, Tensor]]:
        layout = Layout([shape], block, world, group.rank)
        packed = layout.pack([quantize(values[group.rank], rule)], rule.format, values.device)
        if between is None:
            shard, present = yield from reduce_scatter_quantized(*packed, layout, group)
        else:
            shard, present = yield from NodeSums(layout, rule, group, Rule(format=between)).reduce_scatter(*packed)
        gathered = yield from all_gather_quantized(shard, present, layout, rule, group)
        return shard, gathered[0], gathered[1]

    answers = simulate(world, steps, per_node(world) if between else 0)
    layout = Layout([shape], block, world, 0)
    exact_half = layout.unpack(torch.stack([shard for shard, _, _ in answers]), answers[0][2])[0][0]
    mean = ScalingTensor(*layout.unpack(answers[0][1], answers[0][2])[0], block)
    return {"reduce_scatter": exact_half, "all_reduce": mean.dequantize()}


# --- figures --------------------------------------------------------------------------------------------------------


def row_figures(exact: Tensor, found: Tensor) -> dict[str, float]:
    """SQNR of the median row and of the 5th percentile, and how many non-zero means are zero now."""
    error = (exact.double() - found.double()).square().sum(1)
    rows = 10 * torch.log10(exact.double().square().sum(1) / error)
    zeroed = ((found == 0) & (exact != 0)).double().sum() / (exact != 0).double().sum()
    return {
        "median_row_db": round(float(rows.median()), 2),
        "p5_row_db": round(float(rows.quantile(0.05)), 2),
        "zeroed_share": round(float(zeroed), 6),
    }


def measure(kind: str, world: int, block: Block, shape: tuple[int, int] = SHAPE) -> dict[str, Any]:
    """Every scheme on one input at one world."""
    values = inputs(kind, world, shape)
    exact = values.double().mean(0)
    found = product(values, block)
    for between in (BF16, E4M3) if world > 2 else ():
        found |= {f"{name}_{between}_between": mean for name, mean in product(values, block, between).items()}
    found |= fp8_sums(values, 0 if block == WHOLE else block[1])
    settled: dict[str, float] = {}
    if block == WHOLE:  # the paper has one scale a tensor
        found["fp8_lm"], settled["mu"] = fp8_lm(values)
    figures: Callable[[Tensor, Tensor], Any] = row_figures if kind == "rows" else _db
    return {name: figures(exact, value) for name, value in found.items()} | settled


def _db(exact: Tensor, found: Tensor) -> float:
    return round(sqnr_db(exact, found), 2)


def judge(results: dict[str, Any]) -> dict[str, bool]:
    """Whether the targets are reached, and whether the control fails them."""
    rows = {kind: results[kind]["whole tensor"].values() for kind in HELD}
    series = {(kind, name): [row[name] for row in rows[kind]] for kind in HELD for name in (*OURS, "ring")}
    ours = [figures for (_, name), figures in series.items() if name in OURS]
    control = [figures for (_, name), figures in series.items() if name == "ring"]
    return {
        "reached": all(min(s) >= LEAST_DB and max(s) - min(s) <= FLAT_DB for s in ours),
        "control_fails": all(min(s) < LEAST_DB and max(s) - min(s) > FLAT_DB for s in control),
    }


def draw(results: dict[str, Any], out: Path) -> None:
    """SQNR over the world size for the inputs that have one figure a scheme."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("normal", "student_t", "identical"), strict=True):
        rows = results[kind]["whole tensor"]
        worlds = [int(world) for world in rows]
        for name in (*OURS, "tree", "ring", "fp8_lm"):
            style = "-" if name in OURS else "--"
            axis.plot(worlds, [row[name] for row in rows.values()], style, marker=".", label=name)
        axis.axhline(LEAST_DB, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=kind, xlabel="ranks", xscale="log", xticks=worlds, xticklabels=worlds)
        axis.minorticks_off()
    axes[0].set_ylabel("SQNR, dB")
    axes[0].legend(fontsize="small")
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "msamp_like"}):
        figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)
    print(f"wrote {out}")


def main() -> None:
    options = parser(__doc__, "docs/results/reduction_error.json")
    options.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS), help="powers of two")
    options.add_argument("--plot", action="store_true", help="draw a picture beside the JSON too (needs matplotlib)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for kind in (*HELD, "identical", "rows"):
        results[kind] = {name: {} for name in BLOCKS}
        for name, block in BLOCKS.items():
            for world in arguments.worlds:
                row = results[kind][name][str(world)] = measure(kind, world, block)
                print(f"{kind:<10} {name:<19}{world:>3}  {row}", flush=True)
    verdict = judge(results)
    targets = {"least_db": LEAST_DB, "flat_db": FLAT_DB, "for": list(HELD)}
    write(arguments.out, {"shape": SHAPE, "sqnr_db": results, "targets": targets, **verdict})
    if arguments.plot:
        draw(results, arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
