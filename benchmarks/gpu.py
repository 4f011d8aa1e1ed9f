"""Every GPU figure in one run: casts, optimizer steps, a linear layer, GPT-125M; beside what plain torch does there.

    python -m benchmarks.gpu                  # all parts, into docs/results/gpu-<device>.json
    python -m benchmarks.gpu --parts casts    # some

Bandwidths stand beside the device's copy bandwidth, product rates beside its BF16 product, of the same run; the targets
are those of :mod:`benchmarks.row_device`. The first calls of each compile and are left out. Each part
is a process of its own: where one fails or hangs, the result says so and the rest runs. The file is written after each
part. Without a CUDA or ROCm device it says so, writes nothing and exits with 0.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.result import parser, write
from msamp_like import amp, kernels
from msamp_like.formats import BF16, E4M3, E5M2, FP16, FP32, UE5M3, WHOLE, Block, Format
from msamp_like.kernels import AdamScalars, LionScalars, Noise, Operand, Residual, Row, SgdScalars, fused
from msamp_like.kernels.fused import Grouped, Target
from msamp_like.models import gpt
from msamp_like.policy import RECIPES

DEVICE = "cuda"
TOKENS, HIDDEN, FFN = 16_384, 4_096, 16_384
CAST = (122_112, 4_096)
"""1 GB of BF16."""
BATCH, CONTEXT, STEPS = 8, 2_048, 20
MATRICES = 64  # of HIDDEN x HIDDEN: about 1e9 parameters
ADAM = AdamScalars(1e-4, 0.9, 0.999, 1e-8, 0.1, decoupled=True)
WARMUP_STEPS = 20  # more than the 16 steps in which delayed scaling fills its history
TIMEOUT_S = 600


def seconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call on the device, compilation and first calls left out."""
    for _ in range(3):
        function()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def copy_rate() -> float:
    """Bytes read plus written a second by torch's own copy of a large tensor."""
    source = torch.randn(CAST, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def rate(moved_bytes: float, time_s: float, copy: float) -> dict[str, float]:
    """One row of a table of bandwidths."""
    return {
        "ms": round(time_s * 1e3, 4),
        "GB/s": round(moved_bytes / time_s / 1e9, 1),
        "of copy": round(moved_bytes / time_s / copy, 3),
    }


# --- parts ------------------------------------------------------------------------------------------------------------


def casts() -> dict[str, Any]:
    """BF16 to E4M3 and back. Bytes are the least that must move: a second reading of the tensor counts against us."""
    x = torch.randn(CAST, device=DEVICE, dtype=torch.bfloat16)
    copy, numel = copy_rate(), x.numel()
    rows: dict[str, Any] = {"copy GB/s": round(copy / 1e9, 1), "elements": numel}
    rows["amax, tensor"] = rate(2 * numel, seconds(lambda: kernels.amax(x, WHOLE)), copy)
    scale_inv = kernels.quantize_current(x, E4M3, WHOLE)[1]
    delayed = seconds(lambda: kernels.quantize_amax(x, scale_inv, E4M3, WHOLE))
    rows["quantize and amax, delayed scale, tensor"] = rate(3 * numel, delayed, copy)
    blocks: dict[str, Block] = {"tensor": WHOLE, "1x128": (1, 128), "128x128": (128, 128), "1x32": (1, 32)}
    for name, block in blocks.items():
        payload, scales, _ = kernels.quantize_current(x, E4M3, block)
        current = seconds(partial(kernels.quantize_current, x, E4M3, block))
        rows[f"quantize, current scale, {name}"] = rate(3 * numel, current, copy)
        if block in ((1, 128), (1, 32)):
            both = seconds(partial(kernels.quantize_both, x, E4M3, block))
            rows[f"quantize, current scale, {name}, and transposed"] = rate(4 * numel, both, copy)
        back = seconds(partial(kernels.dequantize, payload, scales, block, torch.bfloat16))
        rows[f"dequantize, {name}"] = rate(3 * numel, back, copy)
    rows["torch: x.to(float8_e4m3fn), no scale"] = rate(3 * numel, seconds(lambda: x.to(torch.float8_e4m3fn)), copy)
    weight = torch.ones(CAST[1], device=DEVICE, dtype=torch.bfloat16)
    out, kept = Target(E4M3.dtype, WHOLE, scale_inv), Grouped(E4M3, (1, 128))
    normed = seconds(partial(fused.norm_quantize, x, weight, None, 1e-5, True, out, kept))
    rows["LayerNorm and quantize, fused"] = rate(4 * numel, normed, copy)  # its input is kept in FP8 too
    return rows


STATE: Block = (1, 128)
LEVELS: dict[str, tuple[tuple[Format, Block], ...]] = {  # parameter, gradient, first and second moment
    "O2": ((FP16, STATE), (E4M3, WHOLE), (E4M3, STATE), (FP16, STATE)),
    "lean": ((E4M3, WHOLE), (E4M3, WHOLE), (E4M3, STATE), (UE5M3, STATE)),
    "O1": ((FP16, STATE), (E4M3, WHOLE), (FP32, WHOLE), (FP32, WHOLE)),
    "O0": ((FP32, WHOLE), (BF16, WHOLE), (FP32, WHOLE), (FP32, WHOLE)),
}
COPIES = {"O2": E4M3, "O1": E4M3, "O0": BF16}


def level_row(level: str, tensor: int, copied: bool, size: int = HIDDEN, device: str = DEVICE) -> Row:
    """A square parameter as a level stores it, its states rounded as in training."""
    stored: list[Operand] = []
    for role, (scale, (format, block)) in enumerate(zip((1, 1e-3, 1e-3, 1e-6), LEVELS[level])):
        value = torch.rand(size, size, device=device) * scale
        noise = Noise(0, tensor, 1, (4, 0, 5, 6)[role]) if role in (0, 3) and format is not FP32 else None
        if level == "lean" and role == 0:
            payload, scale_inv, rest, largest = kernels.quantize_with_residual(value, kernels.amax(value, WHOLE), E4M3)
            residual = Residual(rest, largest)
        else:
            payload, scale_inv, _ = kernels.quantize_current(value, format, block)
        stored.append(Operand(payload, scale_inv, block, noise))
    param, grad, *states = stored
    copy = None
    if copied:
        real = kernels.dequantize(*param[:3], torch.float32)
        copy = Operand(*kernels.quantize_current(real, COPIES[level], WHOLE)[:2], WHOLE)
    return Row(param, grad, tuple(states), 10, copy, residual if level == "lean" else None)


def moved_bytes(rows: list[Row]) -> float:
    """The least that a step moves: the gradient read, the copy written, all else read and written."""
    both = [t for row in rows for operand in (row.param, *row.states) for t in operand[:2]]
    both += [row.residual.payload for row in rows if row.residual is not None]
    once = [row.grad.payload for row in rows] + [row.copy.payload for row in rows if row.copy is not None]
    return 2 * sum(t.nbytes for t in both) + sum(t.nbytes for t in once)


def level_rows(level: str, copied: bool, optimizer: str = "adam") -> list[Row]:
    rows = [level_row(level, i, copied) for i in range(MATRICES)]
    return rows if optimizer == "adam" else [row._replace(states=row.states[:1]) for row in rows]


def steps() -> dict[str, Any]:
    """Fused steps of a table of about 1e9 parameters, beside torch's fused AdamW in FP32."""
    copy = copy_rate()
    rows: dict[str, Any] = {"copy GB/s": round(copy / 1e9, 1), "parameters": MATRICES * HIDDEN**2}
    good = torch.zeros(1, device=DEVICE)
    for level in LEVELS:
        for copied in {False, level in COPIES}:
            table = level_rows(level, copied)
            time_s = seconds(partial(kernels.adam_steps_, table, ADAM, good))
            name = f"AdamW, {level}{', copy written too' if copied else ''}"
            rows[name] = rate(moved_bytes(table), time_s, copy)
            rows[name]["ms per 1e9 parameters"] = round(time_s * 1e12 / rows["parameters"], 3)
            if not copied:
                bad = seconds(partial(kernels.adam_steps_, table, ADAM, torch.ones(1, device=DEVICE)))
                rows[name]["ms of a step that is skipped"] = round(bad * 1e3, 4)
            del table
    for optimizer, step, scalars in (
        ("lion", kernels.lion_steps_, LionScalars(1e-4, 0.9, 0.99, 0.1)),
        ("sgd", kernels.sgd_steps_, SgdScalars(1e-3, 0.9, 0.0, 0.1, nesterov=False)),
    ):
        for level in ("O2", "lean"):
            table = level_rows(level, False, optimizer)
            time_s = seconds(partial(step, table, scalars, good))
            rows[f"{optimizer}, {level}"] = rate(moved_bytes(table), time_s, copy)
            del table
    weights = [nn.Parameter(torch.randn(HIDDEN, HIDDEN, device=DEVICE)) for _ in range(MATRICES)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer_of_torch = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    rows["torch fused AdamW, FP32"] = rate(28 * rows["parameters"], seconds(optimizer_of_torch.step), copy)
    return rows


def step_choices() -> dict[str, Any]:
    """The same step cut in other ways: what to write into ``triton_table.Choice``."""
    from msamp_like.kernels import triton_optimizers

    copy = copy_rate()
    rows: dict[str, Any] = {"copy GB/s": round(copy / 1e9, 1), "parameters": MATRICES * HIDDEN**2}
    good = torch.zeros(1, device=DEVICE)
    for level, copied in (("O2", True), ("lean", False)):
        table = level_rows(level, copied)
        for elements, warps, tiles, converts in itertools.product(
            (1024, 2048, 4096), (4, 8), (2, 8, 32), (False, True)
        ):
            choice = triton_optimizers.CHOICE._replace(elements=elements, warps=warps, tiles=tiles, converts=converts)
            time_s = seconds(partial(triton_optimizers.adam_steps_, table, ADAM, good, choice))
            name = f"{level}: {elements} elements, {warps} warps, {tiles} tiles{', converts' if converts else ''}"
            rows[name] = rate(moved_bytes(table), time_s, copy)
        del table
    return rows


def products() -> dict[str, Any]:
    """Forward and backward of one linear layer; and its product alone, operands at hand."""
    x = torch.randn(TOKENS, HIDDEN, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn(TOKENS, FFN, device=DEVICE, dtype=torch.bfloat16)
    flops = 2 * TOKENS * HIDDEN * FFN
    rows: dict[str, Any] = {"tokens, hidden, ffn": [TOKENS, HIDDEN, FFN]}

    def row(name: str, time_s: float, products: int) -> None:
        rows[name] = {"ms": round(time_s * 1e3, 4), "TFLOP/s": round(products * flops / time_s / 1e12, 1)}

    weight = torch.randn(FFN, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    row("BF16 product", seconds(lambda: x.detach() @ weight.t()), 1)
    for format in (E4M3, E5M2):
        a = Operand(*kernels.quantize_current(grad_output, format, WHOLE)[:2], WHOLE)
        b = Operand(*kernels.quantize_current(weight, E4M3, WHOLE)[:2], WHOLE)
        c = Operand(*kernels.quantize_current(x.detach(), format, WHOLE)[:2], WHOLE)
        row(f"{format} x e4m3 product, nt", seconds(partial(kernels.scaled_matmul, c, b, "nt", BF16.dtype)), 1)
        row(f"{format} x e4m3 product, nn", seconds(partial(kernels.scaled_matmul, a, b, "nn", BF16.dtype)), 1)

    def step(layer: nn.Module, before: Callable[[], None]) -> Callable[[], None]:
        def forward_backward() -> None:
            before()
            layer.zero_grad(set_to_none=True)
            x.grad = None
            layer(x).backward(grad_output)

        return forward_backward

    plain = nn.Linear(HIDDEN, FFN, bias=False, device=DEVICE, dtype=torch.bfloat16)
    plain_s, speedups = seconds(step(plain, lambda: None)), dict[str, float]()
    row("BF16 layer, forward and backward", plain_s, 3)
    for recipe in RECIPES:
        model = nn.Sequential(nn.Linear(HIDDEN, FFN, bias=False, device=DEVICE))
        model, optimizer = amp.initialize(model, torch.optim.SGD(model.parameters(), lr=0.0), "O2", recipe=recipe)
        for _ in range(WARMUP_STEPS):
            step(model, lambda: None)()
            optimizer.step()
        stored: Any = model[0].weight
        once = seconds(step(model, stored.drop_casts))  # as in a step of one micro-batch: the weight is cast each time
        row(f"FP8 layer, {recipe} scaling, forward and backward", once, 3)
        kept = seconds(step(model, lambda: None))
        row(f"FP8 layer, {recipe} scaling, forward and backward, weight copy kept", kept, 3)
        speedups[recipe] = round(plain_s / once, 3)
    return {**rows, "over BF16": speedups}


def gpt_125m(level: str, compiled: bool) -> dict[str, Any]:
    """Training steps of GPT-125M under BF16 autocast; "torch" is plain autocast with fused AdamW."""
    torch.manual_seed(0)
    config = gpt.PRESETS["125M"]
    model: nn.Module = gpt.GPT(config).to(DEVICE)
    fused = {"fused": True} if level == "torch" else {}
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, **fused)
    if level != "torch":
        model, optimizer = amp.initialize(model, optimizer, level=level)
    run = torch.compile(model) if compiled else model
    tokens = torch.randint(0, config.vocab_size, (BATCH, CONTEXT + 1), device=DEVICE)

    def step() -> Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss: Tensor = run(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for _ in range(WARMUP_STEPS):
        loss = step()
    torch.cuda.reset_peak_memory_stats()
    time_s = seconds(step, STEPS)
    rows = {
        "ms per step": round(time_s * 1e3, 2),
        "tokens/s": round(BATCH * CONTEXT / time_s),
        "TFLOP/s": round(BATCH * CONTEXT / time_s * gpt.GPT(config).flops_per_token(CONTEXT) / 1e12, 1),
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "batch, context": [BATCH, CONTEXT],
        "loss after warm-up": round(float(loss.detach()), 4),
    }
    if level != "torch":
        rows["state bytes"] = amp.state_bytes(model, optimizer)
    return rows


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "casts": casts,
    "steps": steps,
    "step choices": step_choices,
    "products": products,
    **{
        f"gpt-125M {level} {'compiled' if compiled else 'eager'}": partial(gpt_125m, level, compiled)
        for compiled in (False, True)
        for level in ("torch", "O0", "O2")
    },
}


# --- the run ----------------------------------------------------------------------------------------------------------


def in_its_own_process(part: str) -> dict[str, Any]:
    """The figures of one part, or what it died of."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--inner", part]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {TIMEOUT_S} s"}
    if run.returncode != 0:
        return {"failed": run.stderr[-2000:]}
    figures: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return figures


def main() -> None:
    arguments = parser(__doc__, "docs/results/gpu-<device>.json")
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    arguments.add_argument("--inner", choices=PARTS, help="run one part here and print its figures as JSON")
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch sees no CUDA or ROCm device: no GPU figure was taken, nothing was written")
        return
    if given.inner:
        print(json.dumps(PARTS[given.inner]()))
        return
    name = torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = Path(str(given.out).replace("<device>", slug))
    figures: dict[str, Any] = {"device": name, "capability": list(torch.cuda.get_device_capability())}
    for part in given.parts:
        print(f"{part} ...", flush=True)
        figures[part] = in_its_own_process(part)
        print(json.dumps(figures[part], indent=1), flush=True)
        write(out, figures)
    failed = [part for part in given.parts if "failed" in figures[part]]
    print(f"failed: {', '.join(failed)}" if failed else "all parts done")


if __name__ == "__main__":
    main()
