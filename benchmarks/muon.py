"""Muon in FP8: what its iteration keeps of the update, what a step costs, and the loss beside AdamW's and BF16's.

    python -m benchmarks.muon

``iteration``: dB of SQNR against FP32 products and the range of singular values, for BF16 and E4M3 products, and for
E4M3 products of the polynomial as it is usually written (the control). Five passes of the polynomial stop short of the
polar factor, in FP32 too: ``polar_db`` says by how much, and FP8 has to lose less than that. ``step``: medians of one
step of a (size, size) matrix at O2 and O0 and of torch's own Muon, interleaved in one process; on a CPU, where FP8
products are emulated, the ratio says what the casts cost and not what FP8 units gain. ``loss``: the preset ``tiny``,
one seed: too few to judge by, enough to see a wrong update.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss_gap import validate
from benchmarks.products import sqnr_db
from benchmarks.result import parser, write
from msamp_like import amp, kernels
from msamp_like.formats import BF16, E4M3, FP32, WHOLE
from msamp_like.kernels import Operand
from msamp_like.launchers.corpus import Batches, load_corpus, validation_batches
from msamp_like.models import gpt
from msamp_like.optim import Muon, muon_groups
from msamp_like.optim.muon import COEFFICIENTS, orthogonalize
from msamp_like.policy import Rule


def as_written(x: Tensor) -> Tensor:
    """a X + (b A + c A A) X term by term, products in E4M3."""
    a, b, c = COEFFICIENTS

    def stored(t: Tensor) -> Operand:
        return Operand(*kernels.quantize_current(t, E4M3, WHOLE)[:2], WHOLE)

    x = (x / x.norm()).bfloat16()
    for _ in range(5):
        gram = kernels.scaled_matmul(stored(x), stored(x), "nt", BF16.dtype)
        update = b * gram + c * kernels.scaled_matmul(stored(gram), stored(gram), "nt", BF16.dtype)
        x = a * x + kernels.scaled_matmul(stored(update), stored(x), "nn", BF16.dtype)
    return x.float()


def matrices() -> dict[str, Tensor]:
    """Gaussian, and with singular values that fall to 1e-1 and 1e-3 of the largest."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(512, 512, generator=generator))[0] for _ in range(2))
    found = {"gaussian 24x40": torch.randn(24, 40, generator=generator)}
    found["gaussian 256x1024"] = torch.randn(256, 1024, generator=generator)
    for digits in (1, 3):
        found[f"spectrum to 1e-{digits}"] = left @ torch.diag(torch.logspace(0, -digits, 512)) @ right
    return found


def iteration() -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, x in matrices().items():
        exact = orthogonalize(x, Rule(format=FP32))
        found = {format.name: orthogonalize(x, Rule(format=format)) for format in (FP32, BF16, E4M3)}
        left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
        rows[name] = {"polar_db": round(sqnr_db(left @ right, exact), 2)}
        print(f"{name:<20}FP32's distance to the polar factor: {rows[name]['polar_db']} dB")
        for kind, update in {**found, "e4m3 as written": as_written(x)}.items():
            values = torch.linalg.svdvals(update)
            decibels = None if update.equal(exact) else round(sqnr_db(exact, update), 2)
            extremes = [round(float(values.min()), 3), round(float(values.max()), 3)]
            rows[name][kind] = {"sqnr_db": decibels, "singular_values": extremes}
            print(f"{name:<20}{kind:<18}{decibels} dB, singular values {extremes}")
    return rows


def step_times(size: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a step of each, in turn; the ratio is of O2's median over the other's."""
    steppers: dict[str, tuple[torch.nn.Module, Any]] = {}
    for name in ("O2", "O0", "torch"):
        model: Any = torch.nn.Sequential(torch.nn.Linear(size, size, bias=False))
        optimizer: Any = (torch.optim.Muon if name == "torch" else Muon)(model.parameters(), lr=1e-3)
        if name != "torch":
            model, optimizer = amp.initialize(model, optimizer, level=name, data_parallel=False)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(torch.randn(size, size))
        output.backward(torch.randn_like(output))
        steppers[name] = model, optimizer
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(repeats + 1):
        for name, (_, optimizer) in steppers.items():
            started = time.perf_counter()
            optimizer.step()
            times[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: round(statistics.median(t[1:]), 2) for name, t in times.items()}
    found = {"size": size, "ms": medians, "o2_over_o0": round(medians["O2"] / medians["O0"], 3)}
    print(found)
    return found


def train(kind: str, level: str, steps: int) -> dict[str, Any]:
    """Validation loss of ``tiny`` after some steps, and bytes of the optimizer's moments an element of a matrix."""
    torch.manual_seed(0)
    config = gpt.PRESETS["tiny"]
    corpus = load_corpus(vocab_size=config.vocab_size, context=128)
    batches = Batches(tokens=corpus.train, context=128, batch_size=8, micro_batches=1, world=1, seed=0)
    model: Any = gpt.GPT(config)
    if kind == "muon":
        source: torch.optim.Optimizer = Muon(muon_groups(model), lr=1e-3)
    else:
        source = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    model, optimizer = amp.initialize(model, source, level=level, data_parallel=False)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        tokens, targets = batches(step, 0, 0)
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens, targets)[1].backward()
        amp.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    loss = validate(model, validation_batches(corpus.validation, context=128, count=8, batch_size=16))
    held = amp.state_bytes(model, optimizer)
    moments = round((held["first_moment"] + held["second_moment"]) / held["matrix_parameters"], 3)
    found = {"validation_loss": round(loss, 4), "moment_bytes_per_parameter": moments}
    print(f"{kind} {level}: {found}")
    return found


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__, "docs/results/muon.json")
    options.add_argument("--steps", type=int, default=200, help="steps of each run (default: %(default)s)")
    options.add_argument("--size", type=int, default=1024, help="rows and columns of the matrix of the timed step")
    options.add_argument("--repeats", type=int, default=9, help="timed steps of each")
    arguments = options.parse_args()
    figures: dict[str, Any] = {
        "iteration": iteration(),
        "step": step_times(arguments.size, arguments.repeats),
        "steps": arguments.steps,
    }
    runs = [("muon", "O2"), ("muon", "O0"), ("adamw", "O2"), ("adamw", "O0")]
    loss = {f"{kind} {level}": train(kind, level, arguments.steps) for kind, level in runs}
    gaps = {
        kind: round(loss[f"{kind} O2"]["validation_loss"] - loss[f"{kind} O0"]["validation_loss"], 4)
        for kind in ("muon", "adamw")
    }
    rows = figures["iteration"].values()
    judged = {
        "reached": all(row["e4m3"]["sqnr_db"] >= row["polar_db"] for row in rows),
        "control_fails": any(row["e4m3 as written"]["sqnr_db"] < row["polar_db"] for row in rows),
    }
    write(arguments.out, {**figures, "loss": loss, "gap_nats": gaps, **judged})


if __name__ == "__main__":
    main()
