"""Validation loss of the FP8 levels against O0: the same model, seeds and data; and broken policies the gate must fail.

    python -m benchmarks.loss_gap                       # the gate: GATED below, 3 seeds, 600 steps
    python -m benchmarks.loss_gap --variants all        # and what each default costs

``tiny``, 2,048 tokens a step, on the default corpus. The gap of a seed is its validation loss minus O0's of the same
seed; the gate is a mean of at most 0.01 nats. Runs are independent processes of one thread, as many at a time as
``--workers``; finished runs are kept in the result file, and a second call with ``--continue`` adds to them, if they
were made by the same code: all runs of a table have one source, whose digest stands in it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.result import parser, source, write
from msamp_like import amp
from msamp_like.formats import E4M3, FP16
from msamp_like.launchers.corpus import Batches, load_corpus, validation_batches
from msamp_like.models import gpt
from msamp_like.optim import GradientRelease
from msamp_like.policy import LEAN, O0, O1, O2, Policy, Role, Rule

GATE = 0.01
CLIP = 1.0
BLOCK = (1, 128)


def nearest(policy: Policy) -> Policy:
    """The policy with every state rounded to nearest."""
    for role in (Role.MASTER_WEIGHT, Role.FIRST_MOMENT, Role.SECOND_MOMENT):
        policy = policy.with_rule(role, Rule(format=policy[role].format, block=policy[role].block))
    return policy


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a run differs in: its policy, and what else ``amp.initialize`` is told."""

    policy: Callable[[], Policy]
    options: Mapping[str, Any] = field(default_factory=dict)


VARIANTS: dict[str, Variant] = {
    "O0": Variant(policy=lambda: O0),
    "O2": Variant(policy=lambda: O2),
    "lean": Variant(policy=lambda: LEAN),
    "lean + release": Variant(policy=lambda: LEAN, options={"gradient_release": GradientRelease(max_norm=CLIP)}),
    "O2 + release": Variant(policy=lambda: O2, options={"gradient_release": GradientRelease(max_norm=CLIP)}),
    "lean, to nearest": Variant(policy=lambda: nearest(LEAN)),
    "broken: FP8 master weights": Variant(
        policy=lambda: O2.with_rule(Role.MASTER_WEIGHT, Rule(format=E4M3, block=BLOCK))
    ),
    "O2, FP8 master weights, stochastic": Variant(policy=lambda: O2.with_rule(Role.MASTER_WEIGHT, "e4m3")),
    "O1": Variant(policy=lambda: O1),
    "O2, current scaling": Variant(policy=lambda: O2.with_recipe("current")),
    "O2, rowwise": Variant(policy=lambda: O2.with_recipe("rowwise")),
    "O2, blockwise": Variant(policy=lambda: O2.with_recipe("blockwise")),
    "O2, mxfp8": Variant(policy=lambda: O2.with_recipe("mxfp8")),
    "O2, FP8 saved activations": Variant(policy=lambda: O2.with_saved_activations("fp8")),
    "O2, head in FP8 too": Variant(policy=lambda: O2.override({"lm_head": "fp8"})),
    "O2, first and last block in BF16": Variant(
        policy=lambda: O2.override({"blocks.0.*": "bf16", "blocks.3.*": "bf16"})
    ),
    "O2, no FP8 products": Variant(policy=lambda: O2.override({"*": "bf16"})),
    "O2, embedding and head with FP32 states": Variant(
        policy=lambda: O2.override({"embed": "skip", "lm_head": "skip"})
    ),
    "O2, FP8 second moment, stochastic": Variant(policy=lambda: O2.with_rule(Role.SECOND_MOMENT, "e4m3")),
    "O2, FP8 second moment, nearest": Variant(
        policy=lambda: O2.with_rule(Role.SECOND_MOMENT, Rule(format=E4M3, block=BLOCK))
    ),
    "O2, everything to nearest": Variant(policy=lambda: nearest(O2)),
    "O2, per-tensor states": Variant(
        policy=lambda: (
            O2.with_rule(Role.MASTER_WEIGHT, Rule(format=FP16))
            .with_rule(Role.FIRST_MOMENT, Rule(format=E4M3))
            .with_rule(Role.SECOND_MOMENT, Rule(format=FP16))
        )
    ),
}
GATED = (
    "O0",
    "O2",
    "lean",
    "lean + release",
    "O2, current scaling",
    "O2, rowwise",
    "O2, blockwise",
    "O2, mxfp8",
    "O2, FP8 saved activations",
    "broken: FP8 master weights",
)


def train(variant: str, seed: int, steps: int, batch_size: int = 8, context: int = 256) -> dict[str, Any]:
    """One run; its final validation loss and how long it took."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = gpt.PRESETS["tiny"]
    corpus = load_corpus(vocab_size=config.vocab_size, context=context)
    batches = Batches(tokens=corpus.train, context=context, batch_size=batch_size, micro_batches=1, world=1, seed=seed)
    model: gpt.GPT = gpt.GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    chosen = VARIANTS[variant]
    model, stepper = amp.initialize(
        model, optimizer, level=chosen.policy(), data_parallel=False, seed=seed, **chosen.options
    )
    started = time.perf_counter()
    for step in range(steps):
        for group in stepper.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        tokens, targets = batches(step, 0, 0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, targets)[1]
        loss.backward()
        if "gradient_release" not in chosen.options:
            amp.clip_grad_norm_(model, CLIP)
        stepper.step()
        stepper.zero_grad()
    validation = validate(model, validation_batches(corpus.validation, context=context, count=16, batch_size=16))
    seconds = time.perf_counter() - started
    return {"validation_loss": validation, "skipped_steps": stepper.skipped_steps, "seconds": round(seconds, 1)}


@torch.no_grad()
def validate(model: torch.nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean loss in nats a token over the held-out sequences."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [float(model(tokens, targets)[1]) for tokens, targets in batches]
    return sum(losses) / len(losses)


def run(job: tuple[str, int, int]) -> tuple[str, int, dict[str, Any]]:
    """One job of the pool."""
    variant, seed, steps = job
    return variant, seed, train(variant, seed, steps)


def summarize(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Gap to O0 of each seed, mean and whether it passes the gate, for every variant that has runs."""
    found: dict[str, Any] = {}
    for variant, by_seed in runs.items():
        shared = [seed for seed in by_seed if seed in runs.get("O0", {})]
        gaps = [by_seed[seed]["validation_loss"] - runs["O0"][seed]["validation_loss"] for seed in shared]
        losses = [by_seed[seed]["validation_loss"] for seed in shared]
        if gaps:
            mean = sum(gaps) / len(gaps)
            found[variant] = {
                "mean_gap_nats": round(mean, 5),
                "gaps_nats": [round(gap, 5) for gap in gaps],
                "mean_validation_loss": round(sum(losses) / len(losses), 5),
                "passes": mean <= GATE,
            }
    return found


def figures(runs: dict[str, dict[str, Any]], steps: int) -> dict[str, Any]:
    """What the result file holds."""
    summary = summarize(runs)
    reached = {name: summary[name]["passes"] == (not name.startswith("broken")) for name in GATED if name in summary}
    return {
        "model": "tiny",
        "tokens_a_step": 2048,
        "steps": steps,
        "gate_nats": GATE,
        "summary": summary,
        "reached": all(reached.values()) and len(reached) == len(GATED),
        "source": source(),
        "runs": runs,
    }


def main() -> None:
    options = parser(__doc__, "docs/results/loss_gap.json")
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--variants", nargs="+", default=list(GATED), help="names, or 'all': " + "; ".join(VARIANTS))
    options.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    options.add_argument(
        "--continue", dest="keep", action="store_true", help="keep the finished runs of the result file"
    )
    arguments = options.parse_args()
    variants = list(VARIANTS) if arguments.variants == ["all"] else arguments.variants
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        options.error(f"a variant must be one of {list(VARIANTS)}, got {unknown}")
    runs: dict[str, dict[str, Any]] = _finished(arguments.out, arguments.steps) if arguments.keep else {}
    jobs = [(v, s, arguments.steps) for s in range(arguments.seeds) for v in variants if str(s) not in runs.get(v, {})]
    with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
        for variant, seed, result in tqdm(pool.imap_unordered(run, jobs), total=len(jobs), unit="run"):
            runs.setdefault(variant, {})[str(seed)] = result
            tqdm.write(f"{variant}, seed {seed}: {result}")
            write(arguments.out, figures(runs, arguments.steps))
    for name, row in summarize(runs).items():
        print(f"{name:<42} gap {row['mean_gap_nats']:+.4f}  {row['gaps_nats']}  {'pass' if row['passes'] else 'FAIL'}")
    write(arguments.out, figures(runs, arguments.steps))


def _finished(out: Path, steps: int) -> dict[str, dict[str, Any]]:
    saved = json.loads(out.read_text()) if out.exists() else {}
    if saved and (saved.get("steps"), saved.get("source")) != (steps, source()):
        print(f"starting anew: {out} is of {saved.get('steps')} steps or of other code")
        return {}
    return saved["runs"] if saved else {}


if __name__ == "__main__":
    main()
