"""Peak activation memory of a training step with FP8 saved activations, against BF16.

    python -m benchmarks.activation_memory

GPT of the 125M shape (12 layers of 768, 1,024 tokens, 50,304 tokens of vocabulary), unmodified, under BF16 autocast,
sequences of one micro-batch at a time; with and without activation checkpointing of each block.

    peak        the most bytes alive at once in forward and backward beyond what was there before: weights, compute
                copies and gradients (the step adds to them) are there. Counted from the allocator's record
                (:mod:`benchmarks.live_memory`), so transients of every operation are in it and load is not;
                ``made_in`` and ``largest`` tell what is alive at the peak
    resident    the witness: growth of the process's resident memory in the same step, sampled. It has the pages
                that the C library keeps and the profiler's notes in it
    kept        bytes a token that autograd holds when the loss is there, each storage once, without weights, in one
                micro-batch of one sequence: of a ``layer`` (the difference between depths two and one), of the ``rest``
                (embedding, last norm, head and loss), in ``total``

Each peak is taken in a process of its own. ``gradients_db`` is the SQNR of gradients, all together and of the worst
tensor: of FP8 saved activations alone (at O0), of O2, and of both. ``step_ms`` is the median of forward and backward of
one sequence, taken in turns in one process: what the saved bytes cost in time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.live_memory import mark, peak_of
from benchmarks.result import parser, write
from msamp_like import amp
from msamp_like.models import gpt
from msamp_like.telemetry.activations import KeptBytes
from msamp_like.tensor import real

VARIANTS: dict[str, dict[str, Any]] = {
    "O0": {"level": "O0"},
    "O0, FP8 saved": {"level": "O0", "saved_activations": "fp8"},
    "O2": {"level": "O2"},
    "O2, FP8 saved": {"level": "O2", "saved_activations": "fp8"},
}
PEAKS = (("O0", False), ("O2", False), ("O2, FP8 saved", False), ("O0", True), ("O2, FP8 saved", True))
"""Variants and whether their blocks are checkpointed."""
TARGET = 0.65
HEAD, BACK = "head and loss", "backward of the layers"


def build(variant: str, config: gpt.GPTConfig) -> Any:
    """The model of a variant; every one has the same weights."""
    torch.manual_seed(0)
    return amp.initialize(gpt.GPT(config), None, data_parallel=False, **VARIANTS[variant])[0]


def batch(config: gpt.GPTConfig, size: int) -> Tensor:
    """The same tokens for all."""
    return torch.randint(0, config.vocab_size, (size, config.context + 1), generator=torch.Generator().manual_seed(1))


def loss(model: Any, tokens: Tensor, *, checkpointed: bool) -> Tensor:
    """The mean cross-entropy; checkpointed: only each block's input is kept."""
    with torch.autocast("cpu", torch.bfloat16):
        if not checkpointed:
            return model(tokens[:, :-1], tokens[:, 1:])[1]
        x = model.embed(tokens[:, :-1])
        cos, sin = model.rotation(x.shape[1], x)
        for block in model.blocks:
            x = checkpoint(block, x, cos, sin, use_reentrant=False)
        logits = model.lm_head(model.norm(x))
        return model.loss(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def kept(variant: str, config: gpt.GPTConfig, tokens: Tensor, *, checkpointed: bool) -> int:
    """Bytes that are kept when the loss is there."""
    model = build(variant, config)
    with KeptBytes(model) as counted:
        loss(model, tokens, checkpointed=checkpointed)
    return counted.total


def bytes_a_token(config: gpt.GPTConfig, size: int) -> dict[str, Any]:
    """Of every variant: bytes a token of one layer, of the rest and of the whole model, and the ratios to O0."""
    shallow, deep = replace(config, num_layers=1), replace(config, num_layers=2)
    tokens, rows = batch(config, size), dict[str, Any]()
    for checkpointed in (False, True):
        for variant in VARIANTS:
            one, two = (kept(variant, c, tokens, checkpointed=checkpointed) for c in (shallow, deep))
            layer, count = (two - one) / (size * config.context), size * config.context
            rest = one / count - layer
            name = f"{variant}, checkpointed" if checkpointed else variant
            rows[name] = {"layer": round(layer), "rest": round(rest), "total": round(rest + config.num_layers * layer)}
    for row in rows.values():
        row["ratio"] = {kind: round(row[kind] / rows["O0"][kind], 3) for kind in ("layer", "rest", "total")}
    return rows


# --- the peak -------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def mark_head_and_loss(model: Any) -> None:
    """Marks where a forward pass leaves the last block and where its backward comes back to it."""

    def left(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        mark(HEAD)
        if output.requires_grad:
            output.register_hook(lambda grad: mark(BACK))

    model.blocks[-1].register_forward_hook(left)


def peak(variant: str, config: gpt.GPTConfig, size: int, *, checkpointed: bool) -> dict[str, Any]:
    """What one step has alive at most, counted and as the process grew; a short warm-up makes gradients and copies."""
    model, tokens = build(variant, config), batch(config, size)
    for _ in range(2):  # gradients are there, in the form of a sum, before the step that counts
        loss(model, tokens[:1, :129], checkpointed=checkpointed).backward()
    mark_head_and_loss(model)
    gc.collect()
    before, most, done = resident(), 0, threading.Event()

    def sample() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident())

    sampler = threading.Thread(target=sample)

    def step() -> None:
        sampler.start()
        loss(model, tokens, checkpointed=checkpointed).backward()
        done.set()
        sampler.join()

    found = peak_of(step)
    return {
        "mib": mib(found.bytes),
        "resident_mib": mib(most - before),
        "phase": found.phase,
        "made_in": {name: mib(size) for name, size in found.made_in.items()},
        "largest": [{"operation": name, "tensors": count, "mib": mib(size)} for name, count, size in found.largest],
    }


def mib(size: int) -> float:
    """Bytes in MiB."""
    return round(size / 2**20, 1)


def peaks(arguments: argparse.Namespace) -> dict[str, Any]:
    """:func:`peak` of every variant, each in a process of its own."""
    rows = dict[str, Any]()
    for variant, checkpointed in PEAKS:
        command = [sys.executable, "-m", "benchmarks.activation_memory", "--peak-of", variant]
        command += [f"--{name}={getattr(arguments, name)}" for name in ("layers", "context", "vocabulary", "batch")]
        command += ["--checkpointed"] if checkpointed else []
        # What is freed leaves the process; and the profiler says nothing.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "KINETO_LOG_LEVEL": "99"}
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        name = f"{variant}, checkpointed" if checkpointed else variant
        rows[name] = json.loads(run.stdout.splitlines()[-1])
        print(f"{name:<28} at most {rows[name]['mib']} MiB, {rows[name]['made_in']}", flush=True)
    for row in rows.values():
        row["ratio"] = round(row["mib"] / rows["O0"]["mib"], 3)
        row["resident_ratio"] = round(row["resident_mib"] / rows["O0"]["resident_mib"], 3)
    return rows


# --- gradients and time ---------------------------------------------------------------------------------------------


def sqnr(exact: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """dB of the gradients in all, and of the worst of them."""
    powers = {name: (exact[name].norm().item() ** 2, (exact[name] - found[name]).norm().item() ** 2) for name in exact}
    each = {name: 10 * torch.tensor(s / n).log10().item() for name, (s, n) in powers.items() if n > 0}
    signal, noise = (sum(pair[k] for pair in powers.values()) for k in (0, 1))
    return {"all": round(10 * torch.tensor(signal / noise).log10().item(), 1), "worst": round(min(each.values()), 1)}


def gradients_and_time(config: gpt.GPTConfig, size: int, steps: int) -> dict[str, Any]:
    """SQNR of gradients between variants, and the medians of their forward and backward passes."""
    models, tokens = {variant: build(variant, config) for variant in VARIANTS}, batch(config, size)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(steps):
        for variant, model in models.items():
            model.zero_grad()
            started = time.perf_counter()
            loss(model, tokens, checkpointed=False).backward()
            times[variant].append(time.perf_counter() - started)
    grads = {v: {n: real(p.grad).double() for n, p in m.named_parameters()} for v, m in models.items()}
    medians = {variant: statistics.median(taken[1:]) for variant, taken in times.items()}
    return {
        "gradients_db": {
            "O0, FP8 saved against O0": sqnr(grads["O0"], grads["O0, FP8 saved"]),
            "O2 against O0": sqnr(grads["O0"], grads["O2"]),
            "O2, FP8 saved against O2": sqnr(grads["O2"], grads["O2, FP8 saved"]),
            "O2, FP8 saved against O0": sqnr(grads["O0"], grads["O2, FP8 saved"]),
        },
        "step_ms": {variant: round(median * 1e3, 1) for variant, median in medians.items()},
        "time_ratio_to_O2": round(medians["O2, FP8 saved"] / medians["O2"], 3),
    }


def main() -> None:
    options = parser(__doc__, "docs/results/activation_memory.json")
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--context", type=int, default=1024)
    options.add_argument("--vocabulary", type=int, default=50304)
    options.add_argument("--batch", type=int, default=4, help="sequences of the peak's micro-batch (default: 4)")
    options.add_argument("--steps", type=int, default=4, help="timed passes of each variant, the first left out")
    options.add_argument("--peak-of", choices=VARIANTS, help="print one variant's peak as JSON, and nothing else")
    options.add_argument("--checkpointed", action="store_true", help="of --peak-of")
    arguments = options.parse_args()
    config = replace(
        gpt.PRESETS["125M"],
        num_layers=arguments.layers, context=arguments.context, vocab_size=arguments.vocabulary,
    )  # fmt: skip
    if arguments.peak_of:
        print(json.dumps(peak(arguments.peak_of, config, arguments.batch, checkpointed=arguments.checkpointed)))
        return
    rows = bytes_a_token(config, 1)
    for name, row in rows.items():
        print(f"{name:<30} {row}", flush=True)
    found = peaks(arguments)
    figures = gradients_and_time(config, 1, arguments.steps)
    print(figures)
    sizes = {name: getattr(arguments, name) for name in ("layers", "context", "vocabulary", "batch")}
    write(
        arguments.out,
        {
            **sizes,
            "peak": found,
            "kept": rows,
            **figures,
            "target_ratio": TARGET,
            "reached": found["O2, FP8 saved"]["ratio"] <= TARGET,
        },
    )


if __name__ == "__main__":
    main()
