"""Bytes that a forward pass keeps for backward, a token and a layer: BF16, O2, and O2 with FP8 saved activations.

    python -m benchmarks.activation_memory

GPT of the 125M shape (12 layers of 768, 1,024 tokens, 50,304 tokens of vocabulary), unmodified, under BF16 autocast,
with and without activation checkpointing of each block. Counted are the storages that autograd holds when the loss is
there, each once, without weights; ``layer`` is the difference between depths two and one, ``rest`` what embedding, last
norm, head and loss keep. The second witness is the process: each variant runs in one of its own, whose resident memory
is sampled; ``peak`` is its maximum over forward and backward less what was there before (transients included, so it is
what a machine needs).

``gradients_db`` is the SQNR of gradients, all together and of the worst tensor: of FP8 saved activations alone (at O0),
of O2, and of both. Against O2 itself the figure says less: what the saved activations change by a little, O2 rounds
anew. ``step_ms`` is the median of forward and backward, taken in turns in one process.
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
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
TARGET = 0.65
PAGE = 4096


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


# --- the second witness ---------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak(variant: str, config: gpt.GPTConfig, size: int, *, checkpointed: bool) -> int:
    """Resident bytes at most, in forward and backward, above what was there before; the second of two steps."""
    model, tokens = build(variant, config), batch(config, size)
    for _ in range(2):  # gradients are there, in the form of a sum, before the step that counts
        loss(model, tokens[:1], checkpointed=checkpointed).backward()
    gc.collect()
    before, most, done = resident(), 0, threading.Event()

    def sample() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident())

    sampler = threading.Thread(target=sample)
    sampler.start()
    loss(model, tokens, checkpointed=checkpointed).backward()
    done.set()
    sampler.join()
    return most - before


def peaks(arguments: argparse.Namespace) -> dict[str, Any]:
    """:func:`peak` of every variant, each in a process of its own."""
    rows = dict[str, Any]()
    for checkpointed in (False, True):
        for variant in VARIANTS:
            command = [sys.executable, "-m", "benchmarks.activation_memory", "--peak-of", variant]
            command += [f"--{name}={getattr(arguments, name)}" for name in ("layers", "context", "vocabulary", "batch")]
            command += ["--checkpointed"] if checkpointed else []
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves the process
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found = json.loads(run.stdout)
            name = f"{variant}, checkpointed" if checkpointed else variant
            rows[name] = {"mib": round(found / 2**20, 1)}
            print(f"{name:<30} at most {rows[name]['mib']} MiB above what was there", flush=True)
    for row in rows.values():
        row["ratio"] = round(row["mib"] / rows["O0"]["mib"], 3)
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
    options.add_argument("--batch", type=int, default=4, help="sequences, of the peak; one is enough for the rest")
    options.add_argument("--steps", type=int, default=5, help="timed passes of each variant, the first left out")
    options.add_argument("--peak-of", choices=VARIANTS, help="print one variant's peak in bytes, and nothing else")
    options.add_argument("--checkpointed", action="store_true", help="of --peak-of")
    arguments = options.parse_args()
    config = replace(
        gpt.PRESETS["125M"],
        num_layers=arguments.layers, context=arguments.context, vocab_size=arguments.vocabulary,
    )  # fmt: skip
    if arguments.peak_of:
        print(peak(arguments.peak_of, config, arguments.batch, checkpointed=arguments.checkpointed))
        return
    rows = bytes_a_token(config, 1)
    for name, row in rows.items():
        print(f"{name:<30} {row}", flush=True)
    resident_peaks = peaks(arguments)
    figures = gradients_and_time(config, 1, arguments.steps)
    print(figures)
    ratios = rows["O2, FP8 saved"]["ratio"]["total"], resident_peaks["O2, FP8 saved"]["ratio"]
    sizes = {name: getattr(arguments, name) for name in ("layers", "context", "vocabulary", "batch")}
    write(
        arguments.out,
        {
            **sizes,
            "bytes_a_token": rows,
            "peak": resident_peaks,
            **figures,
            "target_ratio": TARGET,
            "reached": max(ratios) <= TARGET,
        },
    )


if __name__ == "__main__":
    main()
