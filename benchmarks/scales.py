"""Exactness of the scales: every binade of both FP8 formats and FP16, and the amaxes that break other runtimes.

    python -m benchmarks.scales

For each power of two in FP32's range, the scale of the amax just below, at and just above ``largest * 2^k`` is compared
with the one that Python's exact rational arithmetic gives; 0 errors are allowed. Then amax 0, 1e-45, 1e-38, FLT_MAX,
inf and NaN. On a GPU the same amaxes are scaled there too, and must give the same bits.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy
import torch

from benchmarks.result import parser, write
from msamp_like import kernels
from msamp_like.formats import E4M3, E5M2, FP16, Format
from msamp_like.kernels import reference
from msamp_like.policy import Rule
from msamp_like.scaling import Scaler, quantize, roll


def exact_scale_inv(amax: float, format: Format) -> float:
    """The reciprocal of the largest power of two with ``amax * scale <= largest``, by rational arithmetic."""
    if amax == 0:
        return 1.0
    ratio = Fraction(format.largest) / Fraction(amax)
    exponent = math.floor(math.log2(ratio)) + 1
    while Fraction(2) ** exponent > ratio:
        exponent -= 1
    return 2.0 ** -max(-126, min(126, exponent))


def amaxes(format: Format) -> torch.Tensor:
    """``largest`` of the format in every binade of FP32 with its two neighbours, and every power of two."""
    mantissa = math.frexp(format.largest)[0]
    with numpy.errstate(over="ignore", under="ignore"):
        tops = numpy.ldexp(numpy.float32(mantissa), numpy.arange(-148, 129)).astype(numpy.float32)
        around = [tops, numpy.nextafter(tops, numpy.float32(0)), numpy.nextafter(tops, numpy.float32(numpy.inf))]
        around.append(numpy.ldexp(numpy.float32(1), numpy.arange(-149, 128)).astype(numpy.float32))
    values = numpy.unique(numpy.concatenate(around))
    return torch.from_numpy(values[numpy.isfinite(values)])


def sweep(format: Format) -> dict[str, Any]:
    """Errors of the reference, of the picked kernel and, where there is one, of the GPU."""
    values = amaxes(format)
    expected = torch.tensor([exact_scale_inv(float(v), format) for v in values], dtype=torch.float32)
    found = {"reference": reference.scale_inv_from_amax(values, format)}
    found["cpu"] = kernels.scale_inv_from_amax(values, format)
    found["quantize"] = torch.cat([quantize(v.view(1), Rule(format=format)).scale_inv.view(1) for v in values])
    if torch.cuda.is_available():
        found["cuda"] = kernels.scale_inv_from_amax(values.cuda(), format).cpu()
    errors = {name: int((scale_inv != expected).sum()) for name, scale_inv in found.items()}
    return {"amaxes": len(values), "errors": errors}


def naive_errors(format: Format) -> int:
    """The control: the same sweep for a scale taken by log2 in FP32."""
    values = amaxes(format)
    values = values[values > 2.0**-100]
    expected = torch.tensor([exact_scale_inv(float(v), format) for v in values], dtype=torch.float32)
    exponent = torch.floor(torch.log2(format.largest / values)).clamp(-126, 126)
    return int((torch.exp2(-exponent) != expected).sum())


def edges() -> dict[str, Any]:
    """Scale and flag of the amaxes that break other runtimes, and what they leave in a history."""
    found: dict[str, Any] = {}
    for amax in (0.0, 1e-45, 1e-38, float(numpy.finfo(numpy.float32).max), math.inf, math.nan):
        stored = quantize(torch.tensor([[amax]]), Rule(format=E4M3))
        scaler = Scaler(Rule(format=E4M3, history=4))
        for value in (3.0, amax):
            scaler.quantize(torch.tensor([[value]]), record=True)
            roll([scaler])
        scale_inv = float(stored.scale_inv)
        found[str(amax)] = {
            "scale_inv": str(scale_inv),
            "finite_and_positive": math.isfinite(scale_inv) and scale_inv > 0,
            "flagged": math.isinf(scale_inv),
            "history_finite": bool(torch.isfinite(scaler.history.view(torch.float32)).all()),
            "history_filled": scaler.filled,
        }
    return found


def main() -> None:
    arguments = parser(__doc__, "docs/results/scales.json").parse_args()
    sweeps = {format.name: sweep(format) for format in (E4M3, E5M2, FP16)}
    found = edges()
    for name, row in sweeps.items():
        print(f"{name}: {row['amaxes']} amaxes, errors {row['errors']}")
    control = {format.name: naive_errors(format) for format in (E4M3, E5M2, FP16)}
    print(f"control, log2 in FP32: errors {control}")
    for name, row in found.items():
        print(f"amax {name:<24} {row}")
    reached = not any(n for row in sweeps.values() for n in row["errors"].values())
    reached &= all(row["finite_and_positive"] != row["flagged"] and row["history_finite"] for row in found.values())
    write(arguments.out, {"sweeps": sweeps, "edges": found, "control_log2_errors": control, "reached": reached})


if __name__ == "__main__":
    main()
