"""Does a moment in few bits still move? Nearest against stochastic rounding of stored exponential averages.

    python -m benchmarks.moments

Every element gets its own gradient scale (log-normal over three decades) and Gaussian gradients; halfway the scales
fall tenfold, as they do when training settles. The averages are kept as the policy stores them, step by step, beside
FP32's on the same gradients:

    stale      share of the (element, step) pairs whose stored value did not change; ``stale_fp32`` is FP32's own share
    sqnr_db    stored average against FP32's at the end of each half, in dB, over all elements
    bias       mean of stored / FP32 - 1 at the end, over the elements: a frozen average is too high after the fall
    direction  the AdamW direction m / (sqrt(v) + eps) against FP32's

Rounding by role is chosen from this table (docs/explanation/numerics.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.products import sqnr_db
from benchmarks.result import parser, write
from msamp_like.formats import E4M3, FP16, WHOLE, Format
from msamp_like.kernels import Noise
from msamp_like.policy import Rule
from msamp_like.scaling import quantize

BLOCK = (1, 128)


def gradients(rows: int, columns: int, steps: int, seed: int) -> Any:
    """Yields one gradient a step, shape (rows, columns)."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(rows, columns, generator=generator) * 1.15) * 1e-4
    for step in range(steps):
        fall = 1.0 if step < steps // 2 else 0.1
        yield torch.randn(rows, columns, generator=generator) * scale * fall


def follow(
    format: Format, beta: float, power: int, rounding: str, arguments: Any, block: tuple[int, int]
) -> dict[str, Any]:
    """One stored average of ``gradient ** power`` beside FP32's."""
    rule = Rule(format=format, block=block)
    exact = torch.zeros(arguments.rows, arguments.columns)
    stored = quantize(exact, rule)
    stale = stale_fp32 = 0.0
    halves: list[float] = []
    for step, gradient in enumerate(gradients(*exact.shape, arguments.steps, seed=1)):
        new = (gradient**power) * (1 - beta)
        before, before_exact = stored.dequantize(), exact
        exact = exact * beta + new
        noise = Noise(0, 0, step, power) if rounding == "stochastic" else None
        stored.store_(before * beta + new, noise)
        stale += float((stored.dequantize() == before).float().mean())
        stale_fp32 += float((exact == before_exact).float().mean())
        if step + 1 in (arguments.steps // 2, arguments.steps):
            halves.append(round(sqnr_db(exact, stored.dequantize()), 2))
    ratio = stored.dequantize() / exact
    bias = float(ratio.clamp(-10, 10).mean() - 1) if power == 2 else float("nan")
    return {
        "format": format.name,
        "block": "tensor" if block == WHOLE else f"{block[0]}x{block[1]}",
        "beta": beta,
        "rounding": rounding,
        "stale": round(stale / arguments.steps, 4),
        "stale_fp32": round(stale_fp32 / arguments.steps, 4),
        "sqnr_db": halves,
        **({"bias": round(bias, 4)} if power == 2 else {}),
    }


def direction_db(
    first: tuple[Format, str], second: tuple[Format, str], betas: tuple[float, float], arguments: Any
) -> float:
    """SQNR of AdamW's direction with both moments stored, mean over the last tenth of the steps."""
    shape = (arguments.rows, arguments.columns)
    exact = [torch.zeros(shape), torch.zeros(shape)]
    rules = [(Rule(format=format, block=BLOCK), rounding) for format, rounding in (first, second)]
    stored = [quantize(torch.zeros(shape), rule) for rule, _ in rules]
    found: list[float] = []
    for step, gradient in enumerate(gradients(*shape, arguments.steps, seed=2)):
        for i, power in enumerate((1, 2)):
            new = (gradient**power) * (1 - betas[i])
            exact[i] = exact[i] * betas[i] + new
            noise = Noise(0, 0, step, i) if rules[i][1] == "stochastic" else None
            stored[i].store_(stored[i].dequantize() * betas[i] + new, noise)
        if step >= arguments.steps * 0.9:
            found.append(sqnr_db(_direction(*exact), _direction(*(s.dequantize() for s in stored))))
    return round(sum(found) / len(found), 2)


def _direction(first: Tensor, second: Tensor) -> Tensor:
    return first / (second.sqrt() + 1e-8)


def kept_updates(rate: float, rounding: str, arguments: Any) -> dict[str, Any]:
    """A master weight in FP16 with block scales that moves by about ``rate`` a step, beside FP32's.

    ``lost`` is the share of the updates that change nothing; ``sqnr_db`` compares the whole way travelled.
    """
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(arguments.rows, arguments.columns, generator=generator) * 0.02
    rule = Rule(format=FP16, block=BLOCK)
    stored = quantize(start, rule)
    first = stored.dequantize()
    exact, lost = first, 0.0
    drift = torch.randn(start.shape, generator=generator)
    for step in range(arguments.steps // 4):
        update = rate * (drift + torch.randn(start.shape, generator=generator)) / 2
        before = stored.dequantize()
        exact = exact + update
        stored.store_(before + update, Noise(0, 0, step, 4) if rounding == "stochastic" else None)
        lost += float((stored.dequantize() == before).float().mean())
    travelled = sqnr_db(exact - first, stored.dequantize() - first)
    lost_share = round(lost / (arguments.steps // 4), 4)
    return {"rate": rate, "rounding": rounding, "lost": lost_share, "sqnr_db": round(travelled, 2)}


def main() -> None:
    options = parser(__doc__, "docs/results/moments.json")
    options.add_argument("--steps", type=int, default=4000)
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--columns", type=int, default=512)
    arguments = options.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {"first moment": [], "second moment": []}
    for rounding in ("nearest", "stochastic"):
        for beta in (0.9, 0.95, 0.99):
            rows["first moment"].append(follow(E4M3, beta, 1, rounding, arguments, BLOCK))
        for beta in (0.95, 0.999):
            rows["second moment"].append(follow(FP16, beta, 2, rounding, arguments, BLOCK))
        rows["second moment"].append(follow(FP16, 0.999, 2, rounding, arguments, WHOLE))
        rows["second moment"].append(follow(E4M3, 0.999, 2, rounding, arguments, BLOCK))
    rows["master weight"] = [
        kept_updates(rate, rounding, arguments)
        for rate in (1e-3, 1e-4, 1e-5, 1e-6)
        for rounding in ("nearest", "stochastic")
    ]
    for name, found in rows.items():
        for row in found:
            print(f"{name:<14} {row}")
    directions = {
        f"{first[1]} first, {second[1]} second, betas {betas}": direction_db(first, second, betas, arguments)
        for betas in ((0.9, 0.95), (0.9, 0.999))
        for first in ((E4M3, "nearest"), (E4M3, "stochastic"))
        for second in ((FP16, "nearest"), (FP16, "stochastic"))
    }
    for name, value in directions.items():
        print(f"direction, {name}: {value} dB")
    write(arguments.out, {"steps": arguments.steps, "moments": rows, "direction_db": directions})


if __name__ == "__main__":
    main()
