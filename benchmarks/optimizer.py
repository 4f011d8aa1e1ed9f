"""What an optimizer step costs on this machine, in nanoseconds a parameter, beside its peers and the machine's memory.

    python -m benchmarks.optimizer

Ours: AdamW, Lion and SGD with momentum at O2 (FP16 master, E4M3 gradient and first moment, FP16 second moment; the E4M3
compute weight is written in the same pass) and lean (E4M3 weight and 8-bit residual, E4M3 and UE5M3 moments), with the
stochastic rounding that the policies ask for; AdamW also to nearest, and with one scale a tensor as FP8-LM has it. Such
scales cost a second pass, and so does the one of lean's weight where no bound of an update is used: Lion's and SGD's.
Peers: torch's fused AdamW in FP32 and BF16 and its fused SGD (it has no fused Lion), and torchao's, bitsandbytes' and
DeepSpeed's where they are installed; one that cannot run is listed with its error, and what is to be reached beside it
as not measured.

Rounds alternate over all cases. ``median`` and ``best`` are over the rounds; ``ratio`` is the median over rounds of a
case's time by that of torch's fused FP32 AdamW in the same round. ``bound`` is the time that the bytes alone take at
the speed of the machine's fastest copy in the same round, ``of_bound`` the step's time by it. Targets are medians over
rounds too. ``--shapes gpt`` steps a table of the shapes of GPT-125M instead of one large tensor.
"""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.result import parser, write
from msamp_like import kernels, optim
from msamp_like.formats import E4M3, FP16, FP32, UE5M3, WHOLE, Block, Format
from msamp_like.kernels import AdamScalars, LionScalars, Noise, Operand, Residual, Row, SgdScalars, cpu
from msamp_like.policy import O2
from msamp_like.tensor import ScalingTensor

SCALARS = AdamScalars(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, decoupled=True)
LION = LionScalars(lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.1)
SGD = SgdScalars(lr=1e-3, momentum=0.9, dampening=0.0, weight_decay=0.1, nesterov=False)
TILE: Block = (1, 128)
YARDSTICK = "torch AdamW, fused, FP32"
Shape = tuple[int, ...]


class Target(NamedTuple):
    """The time of ``case`` is at most ``most`` times that of ``peer``."""

    case: str
    peer: str
    most: float


TARGETS = (
    Target("O2 AdamW", YARDSTICK, 0.7),
    Target("O2 AdamW", "DeepSpeed CPUAdam", 0.8),
    Target("lean AdamW", "O2 AdamW", 1.0),
)


class Case(NamedTuple):
    """A step to time, and the bytes a parameter that it has to move."""

    run: Callable[[], object]
    bytes: float


def shapes_of(kind: str, parameters: int) -> list[Shape]:
    """One tensor of rows of 4096, or twelve layers of width 768 with embeddings."""
    if kind == "one":
        return [(parameters // 4096, 4096)]
    layer: list[Shape] = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    plain: list[Shape] = [(768,), (768,), (2304,), (768,), (3072,), (768,)]
    return [(50304, 768), (1024, 768), *(layer + plain) * 12, (768,), (768,)]


# --- ours -----------------------------------------------------------------------------------------------------------


def stored(values: Tensor, format: Format, block: Block, noise: Noise | None = None) -> Operand:
    return Operand(*kernels.quantize_current(values, format, block)[:2], block, noise)


def row(shape: Shape, index: int, *, lean: bool, noisy: bool, block: Block = TILE) -> Row:
    """A parameter as a policy stores it; one of a single dim in FP32."""
    weight, grad = torch.randn(shape) * 0.02, torch.randn(shape) * 1e-3
    first, second = grad * 0.1, grad * grad
    if len(shape) == 1:
        plain = [stored(x, FP32, WHOLE) for x in (weight, grad, first, second)]
        return Row(plain[0], plain[1], tuple(plain[2:]), 10)
    noises = [Noise(0, index, 10, role) if noisy else None for role in (4, 6)]
    gradient, average = stored(grad, E4M3, WHOLE), stored(first, E4M3, block)
    if lean:
        payload, scale_inv, rest, amax = kernels.quantize_with_residual(weight, kernels.amax(weight, WHOLE), E4M3)
        states = (average, stored(second, UE5M3, block, noises[1]))
        return Row(Operand(payload, scale_inv, WHOLE, noises[0]), gradient, states, 10, None, Residual(rest, amax))
    states = (average, stored(second, FP16, block, noises[1]))
    return Row(stored(weight, FP16, block, noises[0]), gradient, states, 10, stored(weight, E4M3, WHOLE))


def adamw(shapes: list[Shape], bytes: float, **kind: Any) -> Case:
    """One call for all; gradients and states as after ten steps."""
    rows = [row(shape, index, **kind) for index, shape in enumerate(shapes)]
    return Case(lambda: kernels.adam_steps_(rows, SCALARS), bytes)


def lion(shapes: list[Shape], bytes: float, *, lean: bool) -> Case:
    """One call for all; the policies round a momentum that decays by 0.99 stochastically."""
    rows = [momentum_row(shape, index, lean=lean, noisy=True) for index, shape in enumerate(shapes)]
    return Case(lambda: kernels.lion_steps_(rows, LION), bytes)


def sgd(shapes: list[Shape], bytes: float, *, lean: bool) -> Case:
    """One call for all; the policies round a momentum that decays by 0.9 to nearest."""
    rows = [momentum_row(shape, index, lean=lean, noisy=False) for index, shape in enumerate(shapes)]
    return Case(lambda: kernels.sgd_steps_(rows, SGD), bytes)


def momentum_row(shape: Shape, index: int, *, lean: bool, noisy: bool) -> Row:
    """A parameter whose first moment is its only state, ``noisy`` or not; the master is rounded stochastically."""
    found = row(shape, index, lean=lean, noisy=True)
    noise = Noise(0, index, 10, 5) if noisy and len(shape) > 1 else None
    return found._replace(states=(found.states[0]._replace(noise=noise),))


def whole_step(shapes: list[Shape], cls: type[optim.LowPrecisionOptimizer], bytes: float, **options: Any) -> Case:
    """The optimizer itself, its checks and tables included."""
    params = []
    for shape in shapes:
        values = torch.randn(shape) * 0.02
        held: Tensor = values
        if len(shape) > 1:
            held = ScalingTensor(*kernels.quantize_current(values, FP16, TILE)[:2], TILE)
        param = torch.nn.Parameter(held)
        grad = torch.randn(shape) * 1e-3
        param.grad = ScalingTensor(*kernels.quantize_current(grad, E4M3, WHOLE)[:2]) if len(shape) > 1 else grad
        if isinstance(param, ScalingTensor):
            param.cast(E4M3)
        params.append(param)
    return Case(cls(params, lr=1e-3, policy=O2, **options).step, bytes)


# --- peers ----------------------------------------------------------------------------------------------------------


def peer(module: str, name: str, dtype: torch.dtype, bytes: float, **options: Any) -> Callable[[list[Shape]], Case]:
    """A case that imports ``module`` when it is made."""

    def make(shapes: list[Shape]) -> Case:
        params = [torch.nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in shapes]
        for param in params:
            param.grad = (torch.randn(param.shape) * 1e-3).to(dtype)
        optimizer = getattr(importlib.import_module(module), name)(params, lr=1e-3, **options)
        optimizer.step()
        return Case(optimizer.step, bytes)

    return make


PEERS: dict[str, Callable[[list[Shape]], Case]] = {
    YARDSTICK: peer("torch.optim", "AdamW", torch.float32, 28, fused=True),
    "torch AdamW, fused, BF16": peer("torch.optim", "AdamW", torch.bfloat16, 14, fused=True),
    "torch SGD, fused, FP32": peer("torch.optim", "SGD", torch.float32, 20, fused=True, momentum=0.9),
    "torchao AdamWFp8": peer("torchao.optim", "AdamWFp8", torch.float32, 16),
    "torchao AdamW8bit": peer("torchao.optim", "AdamW8bit", torch.float32, 16),
    "bitsandbytes AdamW8bit": peer("bitsandbytes.optim", "AdamW8bit", torch.float32, 16),
    "DeepSpeed CPUAdam": peer("deepspeed.ops.adam", "DeepSpeedCPUAdam", torch.float32, 28),
}

OURS: dict[str, Callable[[list[Shape]], Case]] = {
    "O2 AdamW": lambda shapes: adamw(shapes, 12, lean=False, noisy=True),
    "O2 AdamW, to nearest": lambda shapes: adamw(shapes, 12, lean=False, noisy=False),
    "O2 AdamW, one scale a tensor": lambda shapes: adamw(shapes, 18, lean=False, noisy=True, block=WHOLE),
    "O2 AdamW, the optimizer's step": lambda shapes: whole_step(shapes, optim.AdamW, 12),
    "lean AdamW": lambda shapes: adamw(shapes, 9, lean=True, noisy=True),
    "lean AdamW, to nearest": lambda shapes: adamw(shapes, 9, lean=True, noisy=False),
    "O2 Lion": lambda shapes: lion(shapes, 8, lean=False),
    "O2 Lion, the optimizer's step": lambda shapes: whole_step(shapes, optim.Lion, 8),
    "lean Lion": lambda shapes: lion(shapes, 11, lean=True),
    "O2 SGD": lambda shapes: sgd(shapes, 8, lean=False),
    "O2 SGD, the optimizer's step": lambda shapes: whole_step(shapes, optim.SGD, 8, momentum=0.9),
    "lean SGD": lambda shapes: sgd(shapes, 11, lean=True),
}


# --- time -----------------------------------------------------------------------------------------------------------


def copies(n: int) -> dict[str, Callable[[], object]]:
    """Copies of n FP32 numbers, torch's and the library's streaming one."""
    source, target, one = torch.randn(n), torch.zeros(n), torch.ones(1, 1)
    return {
        "copy, torch": lambda: target.copy_(source),
        "copy, streamed": lambda: cpu.dequantize_into(target, source, one, WHOLE),
    }


def times(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every case in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in seconds.items()}


def measure(shapes: list[Shape], rounds: int) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """One row a case, an error where it cannot run; and what came of the targets."""
    numel, copied = sum(torch.Size(shape).numel() for shape in shapes), 2**25
    cases: dict[str, Case] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in {**PEERS, **OURS}.items():
        try:
            cases[name] = make(shapes)
        except (ImportError, AttributeError, RuntimeError, TypeError, ValueError, AssertionError, OSError) as error:
            rows[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    seconds = times({**copies(copied), **{name: case.run for name, case in cases.items()}}, rounds)
    fastest = [8 * copied / min(pair) for pair in zip(seconds.pop("copy, torch"), seconds.pop("copy, streamed"))]
    rows["copy"] = {"median_gb_s": statistics.median(fastest) / 1e9}
    for name, found in seconds.items():
        bounds = [cases[name].bytes * numel / speed for speed in fastest]
        rows[name] = {
            "median_ns": statistics.median(found) / numel * 1e9,
            "best_ns": min(found) / numel * 1e9,
            "ratio": median_ratio(found, seconds[YARDSTICK]),
            "bytes": cases[name].bytes,
            "bound_ns": statistics.median(bounds) / numel * 1e9,
            "of_bound": median_ratio(found, bounds),
        }
    return rows, compared(seconds)


def median_ratio(seconds: list[float], others: list[float]) -> float:
    """Of times in the same rounds."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def compared(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Every target with the ratio that was measured; None where one of the two could not run."""
    return [
        {
            **target._asdict(),
            "ratio": median_ratio(seconds[target.case], seconds[target.peer]) if target.peer in seconds else None,
        }
        for target in TARGETS
    ]


def is_reached(targets: list[dict[str, Any]]) -> bool:
    """Whether all targets that were measured are."""
    return all(target["ratio"] <= target["most"] for target in targets if target["ratio"] is not None)


def main() -> None:
    made = parser(__doc__, "docs/results/optimizer.json")
    made.add_argument("--parameters", type=int, default=2**26, help="parameters of the one tensor (default: 2^26)")
    made.add_argument("--shapes", choices=["one", "gpt"], default="one", help="one tensor, or those of GPT-125M")
    made.add_argument("--rounds", type=int, default=11, help="rounds measured, after one that is not")
    made.add_argument("--threads", type=int, default=2, help="of torch and of the native kernels")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, targets = measure(shapes_of(arguments.shapes, arguments.parameters), arguments.rounds)
    for name, found in rows.items():
        shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}
        print(f"{name:32}", "  ".join(f"{key} {value}" for key, value in shown.items()))
    for target in targets:
        print(target)
    figures = {**vars(arguments), "out": str(arguments.out), "load_average": os.getloadavg()[0]}
    found = {"native": cpu.status().simd, "rows": rows, "targets": targets, "reached": is_reached(targets)}
    write(arguments.out, {**figures, **found})


if __name__ == "__main__":
    main()
