"""Attention in FP8 beside BF16: dB of SQNR against FP32, what a later token changes, bytes kept, time, and a loss.

    python -m benchmarks.attention

``sqnr_db``: causal attention of N(0, 1) queries, keys, values and gradients, and the same with every 16th token larger
(queries and keys 4 times, values and gradients 1000), with dO and dS in E5M2 and E4M3, and with one scale for each
whole tensor. ``causal_to_the_bit``: with that scale as the control, which has to fail. ``time``: medians of forward and
backward, in turns in one process; on a CPU FP8 is emulated tile by tile in plain torch, so the ratio says what the
definition costs, nothing of a GPU. ``loss``: the preset ``tiny`` at O2, one seed: too few to judge by, enough to see a
wrong gradient.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss_gap import validate
from benchmarks.products import sqnr_db
from benchmarks.result import parser, write
from msamp_like import amp, kernels
from msamp_like.formats import E4M3, E5M2, ROW, WHOLE, Block, Format
from msamp_like.kernels import Operand
from msamp_like.launchers.corpus import Batches, load_corpus, validation_batches
from msamp_like.models import gpt
from msamp_like.nn.attention import Fp8Attention, scaled_dot_product_attention

NAMES = ("output", "grad_query", "grad_key", "grad_value")
TARGETS = dict(zip(NAMES, (22.5, 21.0, 21.0, 21.0), strict=True))
"""dB that FP8 has to keep on N(0, 1). A product of two E4M3 casts keeps 28; the output has the noise of Q K^T, damped
by the softmax, and of P V, a gradient one cast more."""
OURS = "fp8, E4M3 gradients"


def draw(length: int, outliers: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 4, length, 64, generator=generator) for _ in range(4)]
    if outliers:
        for x, factor in zip(tensors, (4, 4, 1000, 1000), strict=True):
            x[:, :, ::16] *= factor
    return tensors


def with_autograd(function: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    output = function(*leaves, is_causal=True, **options)
    output.backward(tensors[3].to(output.dtype))
    return [output.detach(), *(x.grad for x in leaves if x.grad is not None)]


def directly(tensors: list[Tensor], block: Block, format: Format) -> list[Tensor]:
    """The kernels with another block than the function has."""
    stored = [
        Operand(*kernels.quantize_current(x, f, block)[:2], block)
        for x, f in zip(tensors, (E4M3, E4M3, E4M3, format), strict=True)
    ]
    scale = tensors[0].shape[-1] ** -0.5
    output, log_sum = kernels.attention_forward(*stored[:3], scale, True, torch.float32)
    delta = (kernels.dequantize(*stored[3][:3], torch.float32) * output).sum(-1)
    return [output, *kernels.attention_backward(*stored, log_sum, delta, scale, True, format, torch.float32)]


def accuracy(length: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for outliers in (False, True):
        tensors = draw(length, outliers)
        exact = with_autograd(F.scaled_dot_product_attention, tensors)
        low = [x.bfloat16() for x in tensors]
        kinds = {
            "bf16": with_autograd(F.scaled_dot_product_attention, low),
            "fp8, E5M2 gradients": with_autograd(scaled_dot_product_attention, tensors, grad_format=E5M2),
            OURS: with_autograd(scaled_dot_product_attention, tensors, grad_format=E4M3),
            "fp8, one scale a tensor, E5M2 gradients": directly(tensors, WHOLE, E5M2),
        }
        name = "every 16th token larger" if outliers else "N(0, 1)"
        rows[name] = {}
        for kind, found in kinds.items():
            figures = {n: round(sqnr_db(e, f.float()), 2) for n, e, f in zip(NAMES, exact, found, strict=True)}
            rows[name][kind] = figures
            print(f"{name:<26}{kind:<30}{figures}")
    return rows


def causality(length: int) -> dict[str, bool]:
    """Whether a last token 1e5 times as large leaves every bit of the outputs before it."""
    tensors = draw(length, outliers=False)
    changed = [x.clone() for x in tensors]
    for x in changed[:3]:
        x[:, :, -1] *= 1e5
    found = {}
    for name, block in (("a scale a row", ROW), ("one scale a tensor", WHOLE)):
        before, after = (directly(t, block, E5M2)[0][:, :, :-1] for t in (tensors, changed))
        found[name] = torch.equal(before, after)
    print(f"a later token changes nothing: {found}")
    return found


def kept_bytes(tensors: list[Tensor], function: Any) -> float:
    """Bytes an element of the queries that autograd keeps."""
    leaves = [x.bfloat16().requires_grad_() for x in tensors[:3]]
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = function(*leaves, is_causal=True)
    return round(sum(kept.values()) / output.numel(), 3)


def timed(length: int, repeats: int) -> dict[str, Any]:
    tensors = [x.bfloat16() for x in draw(length, outliers=False)]
    functions = {"fp8": scaled_dot_product_attention, "bf16": F.scaled_dot_product_attention}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            with_autograd(function, tensors)
            times[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: round(statistics.median(t[1:]), 2) for name, t in times.items()}
    found = {"length": length, "ms": medians, "fp8_over_bf16": round(medians["fp8"] / medians["bf16"], 2)}
    print(found)
    return found


def train(steps: int, *, fp8: bool) -> float:
    """Validation loss of ``tiny``; validated in FP8 too where it was trained so."""
    torch.manual_seed(0)
    config = gpt.PRESETS["tiny"]
    corpus = load_corpus(vocab_size=config.vocab_size, context=128)
    batches = Batches(tokens=corpus.train, context=128, batch_size=8, micro_batches=1, world=1, seed=0)
    model: Any = gpt.GPT(config)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    model, optimizer = amp.initialize(model, optimizer, level="O2", data_parallel=False)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        tokens, targets = batches(step, 0, 0)
        with torch.autocast("cpu", torch.bfloat16), Fp8Attention() if fp8 else contextlib.nullcontext():
            loss = model(tokens, targets)[1]
        loss.backward()
        amp.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with Fp8Attention() if fp8 else contextlib.nullcontext():
        found = validate(model, validation_batches(corpus.validation, context=128, count=8, batch_size=16))
    print(f"{'FP8' if fp8 else 'BF16'} attention: validation loss {found:.4f}")
    return found


def main() -> None:
    options = parser(__doc__, "docs/results/attention.json")
    options.add_argument("--steps", type=int, default=200, help="steps of each run (default: %(default)s)")
    options.add_argument("--length", type=int, default=512, help="tokens of the sequence that is measured")
    options.add_argument("--repeats", type=int, default=5, help="timed repetitions")
    arguments = options.parse_args()
    figures: dict[str, Any] = {"sqnr_db": accuracy(arguments.length), "causal_to_the_bit": causality(arguments.length)}
    tensors = draw(arguments.length, outliers=False)
    figures["kept_bytes_per_element"] = {
        "fp8": kept_bytes(tensors, scaled_dot_product_attention),
        "bf16": kept_bytes(tensors, F.scaled_dot_product_attention),
    }
    print(figures["kept_bytes_per_element"])
    figures["time"] = timed(arguments.length, arguments.repeats)
    losses = {"bf16": train(arguments.steps, fp8=False), "fp8": train(arguments.steps, fp8=True)}
    rounded = {name: round(loss, 4) for name, loss in losses.items()}
    figures |= {"steps": arguments.steps, "loss": rounded, "gap_nats": round(losses["fp8"] - losses["bf16"], 4)}
    close = all(figures["sqnr_db"]["N(0, 1)"][OURS][name] >= least for name, least in TARGETS.items())
    causal = figures["causal_to_the_bit"]
    judged = {"reached": close and causal["a scale a row"], "control_fails": not causal["one scale a tensor"]}
    write(arguments.out, {**figures, "length": arguments.length, "targets_db": TARGETS, **judged})


if __name__ == "__main__":
    main()
