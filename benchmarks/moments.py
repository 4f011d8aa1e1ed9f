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

Then which eight bits: the codecs of :mod:`benchmarks.moment_codecs` on the same synthetic gradients and on those of a
``tiny`` run (:mod:`benchmarks.moment_gradients`), Adam's both betas. There ``error`` is the median of
|stored / FP32 - 1|, ``lost`` the share that became zero, ``direction_db`` that of m / (sqrt(v) + eps) with the other
moment in FP32, the mean over the last tenth. COAT moves every value with each new power, so it is never stale.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.moment_codecs import FIRST, SECOND, Codec
from benchmarks.moment_gradients import recorded
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


def in_eight_bits(
    source: Sequence[Tensor], codec: Codec, betas: tuple[float, float], rounding: str, moment: int
) -> dict[str, float]:
    """One moment (0 first, 1 second) kept by ``codec`` beside FP32's; ``source`` is one (rows, columns) a step."""
    generator = torch.Generator().manual_seed(5)
    exact = [torch.zeros(source[0].shape), torch.zeros(source[0].shape)]
    stored = exact[moment]
    stale, directions = 0.0, []
    for step, stored_gradient in enumerate(source):
        gradient = stored_gradient.float()
        new = [gradient * (1 - betas[0]), gradient.square() * (1 - betas[1])]
        exact = [e * beta + n for e, beta, n in zip(exact, betas, new, strict=True)]
        before = stored
        uniform = torch.rand(gradient.shape, generator=generator) if rounding == "stochastic" else None
        stored = codec(before * betas[moment] + new[moment], uniform)
        stale += float((stored == before).float().mean())
        if step >= len(source) * 0.9:
            seen = [stored, exact[1]] if moment == 0 else [exact[0], stored]
            correction = 1 - betas[1] ** (step + 1)
            directions.append(
                sqnr_db(_direction(exact[0], exact[1] / correction), _direction(seen[0], seen[1] / correction))
            )
    alive = exact[moment] != 0
    ratio = (stored / exact[moment])[alive]
    return {
        "sqnr_db": round(sqnr_db(exact[moment], stored), 2),
        "error": round(float((ratio - 1).abs().median()), 4),
        "bias": round(float(ratio.clamp(-10, 10).mean() - 1), 4),
        "stale": round(stale / len(source), 4),
        "lost": round(float((ratio == 0).float().mean()), 4),
        "direction_db": round(sum(directions) / len(directions), 2),
    }


def eight_bits(sources: Mapping[str, Sequence[Tensor]]) -> list[dict[str, Any]]:
    """Every codec, beta and rounding on every source."""
    rows = []
    for (name, source), betas in itertools.product(sources.items(), ((0.9, 0.95), (0.9, 0.999))):
        for moment, codecs in enumerate((FIRST, SECOND)):
            if moment == 0 and betas[1] != 0.95:
                continue  # the same first moment again
            for (codec_name, codec), rounding in itertools.product(codecs.items(), ("nearest", "stochastic")):
                row = {"gradients": name, "moment": ("first", "second")[moment], "beta": betas[moment]}
                found = in_eight_bits(source, codec, betas, rounding, moment)
                rows.append({**row, "codec": codec_name, "rounding": rounding, **found})
                print(
                    "  ".join(
                        f"{value:>9}" if isinstance(value, float) else f"{value:<22}" for value in rows[-1].values()
                    )
                )
    return rows


def main() -> None:
    options = parser(__doc__, "docs/results/moments.json")
    options.add_argument("--steps", type=int, default=4000, help="of the synthetic gradients, half of them small")
    options.add_argument("--rows", type=int, default=16, help="of the synthetic gradients (default: %(default)s)")
    options.add_argument("--columns", type=int, default=512, help="of the synthetic gradients (default: %(default)s)")
    options.add_argument("--gradients", type=Path, default=Path("runs/gradients.pt"), help="scratch: real gradients")
    options.add_argument("--gradient-steps", type=int, default=200, help="steps of the run that makes them")
    options.add_argument("--only", choices=("rounding", "eight bits"), help="one of the two questions")
    arguments = options.parse_args()
    found: dict[str, Any] = {"steps": arguments.steps}
    if arguments.only != "eight bits":
        found.update(rounding(arguments))
    if arguments.only != "rounding":
        real = recorded(arguments.gradients, arguments.gradient_steps)
        joined = torch.cat([g.view(len(g), -1, 128) for g in real.values()], dim=1)
        synthetic = list(gradients(arguments.rows, arguments.columns, len(joined), seed=1))
        found["eight_bits"] = eight_bits({"synthetic": synthetic, "tiny": list(joined)})
    write(arguments.out, found)


def rounding(arguments: Any) -> dict[str, Any]:
    """Nearest against stochastic for the formats that levels store in."""
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
    return {"moments": rows, "direction_db": directions}


if __name__ == "__main__":
    main()
