"""A stack of decoder blocks of Llama 8B's shape: tokens a second and peak memory, ours beside BF16 and torchao.

    python -m benchmarks.blocks                       # on a CUDA device: full shape, as many layers as fit
    python -m benchmarks.blocks --device cpu          # a stack a thousand times smaller, to see that all of it runs;
                                                      # nothing is written

The blocks are plain torch (RMSNorm, grouped-query attention, SwiGLU), compiled one by one. ``BF16`` is mixed precision:
FP32 parameters, BF16 autocast, torch's fused AdamW. ``torchao`` is the same with its float8 training, one scale a
tensor. Ours are levels and recipes of ``amp.initialize``. Each variant is a process of its own, so that peaks are its
own, and one that cannot run is listed with its error. A step is forward, backward, clipping and the optimizer.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.result import parser, write
from msamp_like import amp

TARGETS = {"tokens/s over BF16": 1.35, "tokens/s over torchao": 1.05, "peak memory over BF16": 0.58}
VARIANTS = ("BF16", "torchao", "O2 delayed", "O2 current", "O2 blockwise", "lean delayed")
WARMUP = 24  # more than the 16 steps in which delayed scaling fills its history, and a compilation after them
TIMEOUT_S = 900


@dataclass(frozen=True)
class Shape:
    """Sizes of a stack and of what it reads in a step."""

    hidden: int = 4096
    ffn: int = 14_336
    heads: int = 32
    kv_heads: int = 8
    layers: int = 8
    batch: int = 2
    context: int = 4096

    @property
    def flops_per_token(self) -> int:
        """Of forward and backward: 6 a matrix element, and attention's two products over a causal half."""
        head = self.hidden // self.heads
        matrices = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * head + 3 * self.hidden * self.ffn
        return self.layers * (6 * matrices + 6 * self.context * self.hidden)


SMALL = Shape(hidden=128, ffn=448, heads=4, kv_heads=2, layers=2, batch=1, context=64)


class Block(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)); rotary positions are left out, they cost no product."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.head = shape.hidden // shape.heads
        self.norm1, self.norm2 = nn.RMSNorm(shape.hidden), nn.RMSNorm(shape.hidden)
        self.q = nn.Linear(shape.hidden, shape.heads * self.head, bias=False)
        self.k = nn.Linear(shape.hidden, shape.kv_heads * self.head, bias=False)
        self.v = nn.Linear(shape.hidden, shape.kv_heads * self.head, bias=False)
        self.o = nn.Linear(shape.heads * self.head, shape.hidden, bias=False)
        self.gate, self.up = (nn.Linear(shape.hidden, shape.ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, hidden) to the same."""
        batch, context, _ = x.shape
        normed = self.norm1(x)
        q = self.q(normed).view(batch, context, self.heads, self.head).transpose(1, 2)
        k, v = (f(normed).view(batch, context, self.kv_heads, self.head).transpose(1, 2) for f in (self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, context, -1))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def prepared(variant: str, shape: Shape, device: str) -> tuple[nn.Sequential, Any]:
    """The compiled stack and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(shape) for _ in range(shape.layers))).to(device)
    if variant == "torchao":
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(model)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    if variant not in ("BF16", "torchao"):
        level, recipe = variant.split()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
        model, optimizer = amp.initialize(model, optimizer, level=level, recipe=recipe)
    for block in model:
        block.compile(fullgraph=True)
    return model, optimizer


def measure(variant: str, shape: Shape, device: str, steps: int) -> dict[str, Any]:
    """Median tokens a second, and the peak of memory where the device counts it."""
    model, optimizer = prepared(variant, shape, device)
    x = torch.randn(shape.batch, shape.context, shape.hidden, device=device, dtype=torch.bfloat16)
    clip: Any = nn.utils.clip_grad_norm_ if variant in ("BF16", "torchao") else amp.clip_grad_norm_
    times: list[float] = []
    cuda = device != "cpu"
    for step in range(WARMUP + steps):
        if cuda and step == WARMUP:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()
        clip(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    second = statistics.median(times[WARMUP:])
    tokens = shape.batch * shape.context / second
    return {
        "ms per step": round(second * 1e3, 2),
        "tokens/s": round(tokens, 1),
        "TFLOP/s": round(tokens * shape.flops_per_token / 1e12, 2),
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
    }


def in_its_own_process(variant: str, given: list[str]) -> dict[str, Any]:
    """The figures of a variant, or what it died of."""
    command = [sys.executable, "-m", "benchmarks.blocks", *given, "--inner", variant]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {TIMEOUT_S} s"}
    if run.returncode != 0:
        return {"failed": (run.stderr.strip().splitlines() or ["no word"])[-1][-500:]}
    figures: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return figures


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each of ours over each yardstick that ran."""
    found: dict[str, dict[str, float]] = {}
    for variant, row in rows.items():
        if variant in ("BF16", "torchao") or "failed" in row:
            continue
        found[variant] = {
            f"tokens/s over {peer}": round(row["tokens/s"] / rows[peer]["tokens/s"], 3)
            for peer in ("BF16", "torchao")
            if "failed" not in rows[peer]
        }
        if row["peak GiB"] and "failed" not in rows["BF16"]:
            found[variant]["peak memory over BF16"] = round(row["peak GiB"] / rows["BF16"]["peak GiB"], 3)
    return found


def main() -> None:
    options = parser(__doc__, "docs/results/blocks-<device>.json")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--layers", type=int, default=0, help="default: as many as fit beside BF16's 16 bytes")
    options.add_argument("--steps", type=int, default=20, help="timed steps, after the warm-up")
    options.add_argument("--inner", choices=VARIANTS, help="run one variant here and print its figures as JSON")
    arguments = options.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device: nothing was measured or written; --device cpu runs a small stack")
        return
    shape = SMALL if arguments.device == "cpu" else Shape(layers=arguments.layers or _layers_that_fit())
    if arguments.inner:
        print(json.dumps(measure(arguments.inner, shape, arguments.device, arguments.steps)))
        return
    given = ["--device", arguments.device, "--layers", str(shape.layers), "--steps", str(arguments.steps)]
    rows = {}
    for variant in VARIANTS:
        rows[variant] = in_its_own_process(variant, given)
        print(f"{variant:<14} {rows[variant]}", flush=True)
    if arguments.device == "cpu":
        return  # a small stack: nothing to publish
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    figures = {"shape": shape.__dict__, "variants": rows, "ratios": ratios(rows), "targets": TARGETS}
    write(Path(str(arguments.out).replace("<device>", name)), figures)


def _layers_that_fit() -> int:
    """Layers whose BF16 training state takes half of the device; the rest is for activations."""
    one = sum(p.numel() for p in Block(Shape()).parameters())
    total: int = torch.cuda.get_device_properties(0).total_memory
    return max(1, total // 2 // (16 * one))


if __name__ == "__main__":
    main()
