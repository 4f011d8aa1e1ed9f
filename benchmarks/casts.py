"""Casts on the CPU, against what the memory of the same machine gives in the same run.

    python -m benchmarks.casts

Speed is bytes read plus bytes written, a second. The yardstick is the fastest copy found: torch's ``copy_``, the C
library's ``memmove`` in as many threads, and this library's own streaming pass from FP32 to FP32. Rounds alternate:
each runs everything once, so that what else the machine does hits all alike. ``median`` and ``best`` are over the
rounds, ``ratio`` is the median over rounds of speed by the fastest copy's of that round, ``best_ratio`` best by best.
Results go into memory that is there already, for the copy as for the casts; ``op`` is the same encode through the
public op, which allocates. ``--clock cpu --threads 1`` counts only the time the process ran: the figure to take on a
machine that others keep busy.

The encoder's result for every BF16 and FP16 number is counted against ml_dtypes; 0 differences are allowed. The
control is an encoder that drops the bits it cannot store.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from benchmarks.result import parser, write
from msamp_like import kernels
from msamp_like.formats import E4M3, FP8_FORMATS, WHOLE, Block, Format
from msamp_like.kernels import Noise, Operand, cpu

REACHED = 0.75
TILE: Block = (1, 128)
OTHER = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}


class Case(NamedTuple):
    """Something to time: it moves ``bytes`` for ``elements``."""

    run: Callable[[], object]
    bytes: int
    elements: int


# --- exactness ------------------------------------------------------------------------------------------------------


def mismatches(dtype: torch.dtype, format: Format, encode: Callable[[Tensor, Format], Tensor]) -> int:
    """Finite 16-bit numbers whose code differs from that of ml_dtypes after a clamp."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[torch.isfinite(x)]
    clamped = np.clip(x.float().numpy(), -format.largest, format.largest)
    expected = clamped.astype(OTHER[format.name]).view(np.uint8)
    return int((encode(x, format).view(torch.uint8).numpy() != expected).sum())


def encode(x: Tensor, format: Format) -> Tensor:
    """The op under test, at scale 1."""
    return kernels.quantize(x, torch.ones(1, 1), format, WHOLE)


def encode_dropping_bits(x: Tensor, format: Format) -> Tensor:
    """The control: rounds towards zero."""
    dropped = 23 - format.mantissa_bits
    return encode((x.float().view(torch.int32) >> dropped << dropped).view(torch.float32), format)


def exactness() -> dict[str, Any]:
    """Differences by source dtype and format, and the control's."""
    pairs = [(dtype, format) for dtype in (torch.bfloat16, torch.float16) for format in FP8_FORMATS]
    names = [f"{str(dtype).removeprefix('torch.')} to {format}" for dtype, format in pairs]
    return {
        "mismatches": {name: mismatches(*pair, encode) for name, pair in zip(names, pairs)},
        "control_mismatches": {name: mismatches(*pair, encode_dropping_bits) for name, pair in zip(names, pairs)},
    }


# --- speed ----------------------------------------------------------------------------------------------------------


def copies(n: int) -> dict[str, Case]:
    """Three ways to copy n FP32 numbers."""
    source, target, one = torch.randn(n), torch.zeros(n), torch.ones(1, 1)
    threads = torch.get_num_threads()
    pool, part = ThreadPoolExecutor(threads), 4 * n // threads

    def move(thread: int) -> None:
        offset = thread * part
        ctypes.memmove(target.data_ptr() + offset, source.data_ptr() + offset, part)

    return {
        "copy torch": Case(lambda: target.copy_(source), 8 * n, n),
        "copy memmove": Case(lambda: list(pool.map(move, range(threads))), 8 * n, n),
        "copy streamed": Case(lambda: cpu.dequantize_into(target, source, one, WHOLE), 8 * n, n),
    }


def casts(n: int) -> dict[str, Case]:
    """Casts of n elements seen as rows of 4096."""
    x, scale_inv = torch.randn(n // 4096, 4096), torch.full((1, 1), 2.0**-6)
    half = x.bfloat16()
    payload, decoded = torch.zeros(x.shape, dtype=E4M3.dtype), torch.zeros(x.shape, dtype=torch.bfloat16)
    tiles, noise = torch.full((n // 4096, 32), 2.0**-6), Noise(1, 2, 3, 4)
    target = Operand(payload, tiles, TILE)

    return {
        "encode": Case(lambda: cpu.quantize_into(payload, x, scale_inv, WHOLE), 5 * n, n),
        "encode op": Case(lambda: kernels.quantize(x, scale_inv, E4M3, WHOLE), 5 * n, n),
        "encode bf16": Case(lambda: cpu.quantize_into(payload, half, scale_inv, WHOLE), 3 * n, n),
        "encode stochastic": Case(lambda: cpu.quantize_into(payload, x, scale_inv, WHOLE, noise), 5 * n, n),
        "encode (1, 128), current": Case(lambda: cpu.store_(target, x), 5 * n, n),
        "decode": Case(lambda: cpu.dequantize_into(decoded, payload, scale_inv, WHOLE), 3 * n, n),
        "decode (1, 128)": Case(lambda: cpu.dequantize_into(decoded, payload, tiles, TILE), 3 * n, n),
        "amax": Case(lambda: cpu.amax(x, WHOLE), 4 * n, n),
        "torch cast, no clamp": Case(lambda: payload.copy_(x), 5 * n, n),
    }


def speeds(cases: dict[str, Case], rounds: int, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """GB/s, ns an element, and the ratio to the fastest copy, of every case."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            start = clock()
            case.run()
            seconds[name].append(clock() - start)
    rates = {name: [cases[name].bytes / t / 1e9 for t in times[1:]] for name, times in seconds.items()}
    fastest = [max(rate) for rate in zip(*(rates[name] for name in cases if name.startswith("copy")))]
    return {
        name: {
            "median_gb_s": statistics.median(rate),
            "best_gb_s": max(rate),
            "ratio": statistics.median(r / copy for r, copy in zip(rate, fastest)),
            "best_ratio": max(rate) / max(fastest),
            "median_ns": statistics.median(seconds[name][1:]) / cases[name].elements * 1e9,
            "best_ns": min(seconds[name][1:]) / cases[name].elements * 1e9,
        }
        for name, rate in rates.items()
    }


def main() -> None:
    made = parser(__doc__, "docs/results/casts-cpu.json")
    made.add_argument("--elements", type=int, default=2**26, help="elements of a cast (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=15, help="rounds measured, after one that is not")
    made.add_argument("--threads", type=int, default=2, help="of torch and of the native kernels")
    made.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: the time the process ran")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    if not cpu.available():
        raise RuntimeError(f"there is nothing to measure: {cpu.status().reason}")
    exact = exactness()
    print(exact)
    # A copy of half as many FP32 numbers moves about the bytes of an encode: 4 n, where that moves 5 n.
    cases = {**copies(arguments.elements // 2), **casts(arguments.elements)}
    found = speeds(cases, arguments.rounds, time.perf_counter if arguments.clock == "wall" else time.process_time)
    for name, row in found.items():
        print(
            f"{name:26} median {row['median_gb_s']:6.2f} best {row['best_gb_s']:6.2f} GB/s"
            f"  of copy: median {row['ratio']:.2f} best {row['best_ratio']:.2f}  {row['best_ns']:.3f} ns an element"
        )
    figures = {
        **vars(arguments),
        "out": str(arguments.out),
        "load_average": os.getloadavg()[0],
        **exact,
        "speeds": found,
    }
    ratio = min(found[name]["ratio"] for name in ("encode", "decode"))
    write(
        arguments.out,
        {**figures, "target_of_copy": REACHED, "reached": ratio >= REACHED and not any(exact["mismatches"].values())},
    )


if __name__ == "__main__":
    main()
