"""Norms, activations and a softmax with their casts in one pass, against torch's passes one after another.

    python -m benchmarks.fused

On the CPU, BF16 in and out, E4M3 in groups of 128 kept; interleaved, medians. ``torch`` is the operation
alone, as it runs without FP8 saved activations; ``unfused`` is torch's operation and then a quantizing pass over what
is kept; ``fused`` is one kernel. ``quantized`` also writes the result in FP8 under a delayed scale, as a linear layer
reads it: unfused, that is one more pass. Backward: ``unfused`` reads what was kept back into BF16 and runs torch's
derivative. The limit is a copy of as many bytes as the fused kernel moves. A fused kernel has to be no slower than the
passes that it replaces.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.result import parser, write
from msamp_like import kernels
from msamp_like.formats import E4M3, WHOLE
from msamp_like.kernels import Operand, fused
from msamp_like.kernels.fused import Grouped, Target

GROUP = (1, 128)
KEPT = Grouped(E4M3, GROUP)
DTYPE = torch.bfloat16
ATEN = torch.ops.aten
TARGET = 1.0
"""Of the fused kernel's time over that of the passes it replaces."""


def keep(x: Tensor) -> Operand:
    """The quantizing pass."""
    payload, scale_inv, _ = kernels.quantize_current(x, E4M3, GROUP)
    return Operand(payload, scale_inv, GROUP)


def read(kept: Operand) -> Tensor:
    """The pass back."""
    return kernels.dequantize(kept.payload, kept.scale_inv, GROUP, DTYPE)


def copied(size: int) -> Callable[[], Any]:
    """A copy that reads and writes ``size`` bytes in all."""
    source = torch.zeros(size // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def questions(rows: int, columns: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Operation -> way -> what to time."""
    x, value, grad = (torch.randn(rows, columns).to(DTYPE) for _ in range(3))
    weight, scale = torch.ones(columns, dtype=DTYPE), torch.full((1, 1), 2.0**-6)
    plain, delayed, elements = Target(DTYPE), Target(E4M3.dtype, WHOLE, scale), rows * columns
    kept, kept_value = keep(x), keep(value)
    _, normalized, inverse = fused.norm_quantize(x, weight, None, 1e-5, True, plain, KEPT)
    normal, mean, deviation = Operand(*normalized, GROUP), grad.new_zeros(rows, 1), inverse.view(-1, 1).to(DTYPE)

    def quantize(y: Tensor) -> Any:
        return kernels.quantize_amax(y, scale, E4M3, WHOLE)

    def norm(out: Target) -> Any:
        return fused.norm_quantize(x, weight, None, 1e-5, True, out, KEPT)

    def layer_norm() -> Tensor:
        return F.layer_norm(x, (columns,), weight)

    def norm_derivative(n: Tensor) -> Any:
        return ATEN.native_layer_norm_backward(grad, n, [columns], mean, deviation, weight, None, [True, True, False])

    def swiglu(out: Target) -> Any:
        return fused.activation_quantize(x, value, "silu", out, KEPT)

    def swiglu_derivative(a: Tensor, b: Tensor) -> Any:
        return ATEN.silu_backward(grad * b, a), grad * F.silu(a)

    return {
        "LayerNorm": {
            "torch": layer_norm,
            "unfused": lambda: (layer_norm(), keep(x)),
            "fused": lambda: norm(plain),
            "limit": copied(5 * elements),
        },
        "LayerNorm, quantized": {
            "torch": layer_norm,
            "unfused": lambda: (quantize(layer_norm()), keep(x)),
            "fused": lambda: norm(delayed),
            "limit": copied(4 * elements),
        },
        "LayerNorm backward": {
            "torch": lambda: norm_derivative(x),
            "unfused": lambda: norm_derivative(read(normal)),
            "fused": lambda: fused.norm_backward(grad, normal, inverse, weight, True, DTYPE),
            "limit": copied(5 * elements),
        },
        "GELU": {
            "torch": lambda: F.gelu(x),
            "unfused": lambda: (F.gelu(x), keep(x)),
            "fused": lambda: fused.activation_quantize(x, None, "gelu", plain, KEPT),
            "limit": copied(5 * elements),
        },
        "GELU, quantized": {
            "torch": lambda: F.gelu(x),
            "unfused": lambda: (quantize(F.gelu(x)), keep(x)),
            "fused": lambda: fused.activation_quantize(x, None, "gelu", delayed, KEPT),
            "limit": copied(4 * elements),
        },
        "GELU backward": {
            "torch": lambda: ATEN.gelu_backward(grad, x),
            "unfused": lambda: ATEN.gelu_backward(grad, read(kept)),
            "fused": lambda: fused.activation_backward(grad, kept, None, "gelu", plain),
            "limit": copied(5 * elements),
        },
        "SwiGLU, quantized": {
            "torch": lambda: F.silu(x) * value,
            "unfused": lambda: (quantize(F.silu(x) * value), keep(x), keep(value)),
            "fused": lambda: swiglu(delayed),
            "limit": copied(7 * elements),
        },
        "SwiGLU backward": {
            "torch": lambda: swiglu_derivative(x, value),
            "unfused": lambda: swiglu_derivative(read(kept), read(kept_value)),
            "fused": lambda: fused.activation_backward(grad, kept, kept_value, "silu", plain),
            "limit": copied(8 * elements),
        },
        "softmax": {
            "torch": lambda: torch.log_softmax(x.float(), -1),
            "unfused": lambda: keep(torch.softmax(x.float(), -1)),
            "fused": lambda: fused.softmax_quantize(x, KEPT),
            "limit": copied(3 * elements),
        },
    }


def medians(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    return {name: round(statistics.median(taken[1:]) * 1e3, 3) for name, taken in times.items()}


def main() -> None:
    options = parser(__doc__, "docs/results/fused-cpu.json")
    options.add_argument("--rows", type=int, default=8192, help="of each tensor (default: %(default)s)")
    options.add_argument("--columns", type=int, default=3072, help="of each tensor (default: %(default)s)")
    options.add_argument("--rounds", type=int, default=15, help="turns of each way, after one that is not counted")
    options.add_argument("--threads", type=int, default=2, help="of torch and of the native kernels")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = dict[str, Any]()
    for name, ways in questions(arguments.rows, arguments.columns).items():
        ms = medians(ways, arguments.rounds)
        ratios = {f"to_{other}": round(ms["fused"] / ms[other], 3) for other in ("torch", "unfused", "limit")}
        rows[name] = {"ms": ms, **ratios}
        print(f"{name:<22} {rows[name]}")
    figures = {"rows": arguments.rows, "columns": arguments.columns, "threads": torch.get_num_threads()}
    reached = all(row["to_unfused"] <= TARGET for row in rows.values())
    write(arguments.out, {**figures, "operations": rows, "target_to_unfused": TARGET, "reached": reached})


if __name__ == "__main__":
    main()
