"""Lines of results that a GPU has to be at hand for; see :mod:`benchmarks.rows`. Without one they say so."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.row import Result, Row, above, below

GPU = (
    ("one GPU: AdamW step of 1e9 parameters, O2, lean", "at most 3.2, 2.6 ms on an H200"),
    ("one GPU: cast of 1 GB BF16 to E4M3 with amax, delayed scale", "at least 4.0 TB/s on an H200"),
    ("one GPU: LayerNorm and quantize in one kernel, speed over a copy's", "at least 0.9"),
    (
        "one GPU: linear layer, h 4096, ffn 16384, M 16384, both ways, over BF16: delayed, current, blockwise",
        "at least 1.70, 1.60, 1.45 on an H200",
    ),
)
BLOCKS = (
    ("one GPU: stack of Llama-8B blocks, tokens/s over BF16 compiled, over torchao compiled", "at least 1.35, 1.05"),
    ("the same, peak memory over BF16 mixed precision", "at most 0.58"),
)


def gpu(r: Result) -> list[Row]:
    """What ``benchmarks.gpu`` found; a part that failed says so."""
    table, casts, products = (r.get(part, {"failed": "not run"}) for part in ("steps", "casts", "products"))
    steps = [table.get(f"AdamW, {name}", {}).get("ms per 1e9 parameters") for name in ("O2", "lean")]
    cast = casts.get("quantize and amax, delayed scale, tensor", {})
    norm = casts.get("LayerNorm and quantize, fused", {})
    speedups = [products.get("over BF16", {}).get(name) for name in ("delayed", "current", "blockwise")]
    pairs = list(zip(steps, (3.2, 2.6), strict=True))
    return [
        Row(*GPU[0], _listed(steps, "ms"), _first(above(ms, most) for ms, most in pairs if ms is not None)),
        Row(*GPU[1], _listed([cast.get("GB/s")], "GB/s"), below(cast["GB/s"], 4000.0) if cast else ""),
        Row(*GPU[2], _listed([norm.get("of copy")], ""), below(norm["of copy"], 0.9) if norm else ""),
        Row(
            *GPU[3],
            _listed(speedups, ""),
            _first(
                below(found, least)
                for found, least in zip(speedups, (1.70, 1.60, 1.45), strict=True)
                if found is not None
            ),
        ),
    ]


def blocks(r: Result) -> list[Row]:
    """What ``benchmarks.blocks`` found, of our best variant in speed; peers that failed say so."""
    ours, targets = r["ratios"], r["targets"]
    failed = [f"{name} could not run ({row['failed']})" for name, row in r["variants"].items() if "failed" in row]
    if not ours:
        return [Row(*line, "; ".join(failed)) for line in BLOCKS]
    best = max(ours, key=lambda name: ours[name].get("tokens/s over BF16", 0.0))
    speeds = [name for name in targets if name.startswith("tokens/s")]
    memory = ours[best].get("peak memory over BF16")
    return [
        Row(
            *BLOCKS[0],
            "; ".join([f"{best}: {_listed([ours[best].get(name) for name in speeds], '')}", *failed]),
            _first(below(ours[best][name], targets[name]) for name in speeds if name in ours[best]),
        ),
        Row(
            *BLOCKS[1],
            _listed([memory], ""),
            above(memory, targets["peak memory over BF16"]) if memory is not None else "",
        ),
    ]


def _listed(found: list[float | None], unit: str) -> str:
    return f"{', '.join('unmeasured' if x is None else f'{x:g}' for x in found)} {unit}".strip()


def _first(missed: Iterable[str]) -> str:
    return next((one for one in missed if one), "")
