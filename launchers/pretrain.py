"""Train a GPT from scratch on text, in FP8 or in BF16, on one process or several.

    torchrun --nproc-per-node 2 -m msamp_like.launchers.pretrain --level O2 --steps 300 --out runs/demo
    python -m msamp_like.launchers.pretrain --level O0 --steps 300 --out runs/bf16

Every step is a pure function of the settings and of the state before it: the batch comes from the step's number, so
does the learning rate, and a checkpoint holds the rest. ``--resume latest`` therefore continues bit for bit.

The recipe is that of Peng et al., "FP8-LM: Training FP8 Large Language Models", 2023, https://arxiv.org/abs/2310.18313:
AdamW, a linear warm-up, a cosine to a tenth.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from msamp_like import amp, checkpoint
from msamp_like import policy as policies
from msamp_like.launchers import compare
from msamp_like.launchers.corpus import Batches, Corpus, load_corpus, validation_batches
from msamp_like.launchers.ranks import Ranks
from msamp_like.launchers.run import FIGURE, Progress, Run, environment, peak_memory_bytes
from msamp_like.launchers.settings import Configurable, as_dict, dump, parse
from msamp_like.models.gpt import GPT, PRESETS, GPTConfig

LEARNING_RATES = {"tiny": 2e-3, "small": 1e-3, "125M": 6e-4, "7B": 3e-4, "13B": 3e-4, "175B": 3e-5}
"""Peak learning rate of each preset: Table 1 of the paper from 125M up."""

LAST = 20
"""Steps over which the summary's training loss is the mean."""


@dataclass(frozen=True, kw_only=True)
class Settings(Configurable):
    """Train a GPT on text in FP8 (O1, O2, O3) or BF16 (O0)."""

    level: str = "O2"  # Level of precision: O0 (BF16), O1, O2 or O3 (FP8).
    preset: Literal["tiny", "small", "125M", "7B", "13B", "175B"] = "tiny"  # Sizes of the model.
    steps: int = 300  # Optimizer steps of the whole run.
    out: str = "runs/pretrain"  # Directory of the run; it must not hold another.
    overwrite: bool = False  # Delete the run that --out holds.
    resume: str = ""  # Continue from a checkpoint's directory, or from the `latest` in --out.

    data: str = ""  # Text file, folder or glob; default: the source of Python's own library.
    tokenizer: str = ""  # Hugging Face tokenizer.json; default: bytes are tokens.
    vocab_size: int = 0  # Vocabulary of the model (0: the preset's).
    context: int = 0  # Tokens of a sequence (0: the preset's).
    dim: int = 0  # Dim of the residual stream (0: the preset's).
    num_layers: int = 0  # Blocks (0: the preset's).
    num_heads: int = 0  # Attention heads (0: the preset's).

    batch_size: int = 8  # Sequences of a step, over all ranks and micro-batches.
    micro_batches: int = 1  # Backward passes of a step on each rank; gradients accumulate.
    lr: float = 0.0  # Peak learning rate (0: the preset's).
    warmup_steps: int = -1  # Steps of linear warm-up (-1: a tenth of the steps, at most 1,000).
    final_lr: float = 0.1  # Learning rate at the end of the cosine, as a share of the peak.
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's averaging factors.
    weight_decay: float = 0.1  # AdamW's decay, of matrices alone.
    clip: float = 1.0  # Largest norm of the gradient.
    seed: int = 0  # Of the initial weights, the order of the data and stochastic rounding.

    recipe: Literal["", "delayed", "current"] = ""  # Scaling of activations (empty: the level's own).
    overrides: tuple[str, ...] = ()  # Modules kept out: pattern=product, product one of fp8, bf16, skip.
    dtype: Literal["bf16", "fp32"] = "bf16"  # Autocast of what is not in FP8.
    compile: bool = False  # Compile the model with torch.compile.

    eval_every: int = 50  # Steps between validations; the last step always validates.
    eval_batches: int = 32  # Batches of held-out text; the same at every level and world size.
    eval_batch_size: int = 4  # Sequences of one of them.
    save_every: int = 500  # Steps between checkpoints; the last step saves too (0: never).

    device: Literal["auto", "cpu", "cuda"] = "auto"  # Where to train; auto takes CUDA where there is any.
    threads: int = 0  # CPU threads of each rank (0: an equal share of the cores).


def check(settings: Settings, world: int) -> None:
    """Raises ValueError for settings that no run can have, before anything is loaded."""
    s = settings
    policies.resolve(s.level)
    parse_overrides(s)
    for name in ("steps", "batch_size", "micro_batches", "clip", "eval_every", "eval_batches", "eval_batch_size"):
        if getattr(s, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(s, name)}; raise it")
    sizes = ("vocab_size", "context", "dim", "num_layers", "num_heads")
    for name in (*sizes, "lr", "final_lr", "weight_decay", "seed", "save_every", "threads"):
        if getattr(s, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(s, name)}; raise it")
    if s.batch_size % (s.micro_batches * world):
        raise ValueError(
            f"--batch-size must divide by micro-batches times ranks, got {s.batch_size} for {s.micro_batches} times "
            f"{world}; give a multiple of {s.micro_batches * world}, or start fewer ranks (--nproc-per-node)"
        )


def parse_overrides(settings: Settings) -> dict[str, str]:
    """{pattern: product} of ``--overrides pattern=product ...``."""
    pairs = [text.partition("=") for text in settings.overrides]
    for pattern, equals, product in pairs:
        if not (pattern and product):
            raise ValueError(
                f"--overrides takes pattern=product, got {pattern + equals + product!r}; write lm_head=fp8, for example"
            )
    return {pattern: product for pattern, _, product in pairs}


def model_config(settings: Settings) -> GPTConfig:
    """The preset with the settings' own sizes."""
    own = {name: getattr(settings, name) for name in ("vocab_size", "context", "dim", "num_layers", "num_heads")}
    return replace(PRESETS[settings.preset], **{name: size for name, size in own.items() if size})


def learning_rate(settings: Settings, step: int) -> float:
    """Of step number ``step``, from 0: a linear warm-up, then a cosine from the peak to ``final_lr`` of it."""
    peak = settings.lr or LEARNING_RATES[settings.preset]
    warmup = settings.warmup_steps if settings.warmup_steps >= 0 else min(1000, settings.steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - 1 - warmup)
    return peak * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms and biases alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate(settings, 0), betas=settings.betas)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one run works with, once nothing can be refused any more."""

    settings: Settings
    ranks: Ranks
    device: torch.device
    run: Run
    corpus: Corpus
    batches: Batches
    held_out: Sequence[tuple[Tensor, Tensor]]
    model: Any  # GPT, with what amp.initialize adds
    optimizer: Any
    identity: dict[str, Any]
    first_step: int

    @property
    def precision(self) -> torch.autocast:
        """Autocast of what is not in FP8."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bf16")


def prepare(settings: Settings, ranks: Ranks) -> Job:
    """Text, model, optimizer and, in a resume, their state; nothing is written. Raises ValueError or OSError."""
    device = ranks.device(settings.device)
    config = model_config(settings)
    corpus = load_corpus(settings.data, settings.tokenizer, vocab_size=config.vocab_size, context=config.context)
    run = Run(settings.out)
    source = find_checkpoint(settings)
    run.check(resumes_from=source, overwrite=settings.overwrite)

    torch.manual_seed(settings.seed)
    model = GPT(config).to(device)
    fingerprint = checkpoint.fingerprint(model.named_parameters())
    model, optimizer = amp.initialize(
        model,
        make_optimizer(model, settings),
        level=settings.level,
        recipe=settings.recipe or None,
        overrides=parse_overrides(settings),
        seed=settings.seed,
    )
    identity = {"level": settings.level, "model": fingerprint, "corpus": corpus.record["sha256"]}
    first_step = 0
    if source is not None:
        saved = checkpoint.load(source, expect=identity, device=device)
        amp.load_state_dict(model, optimizer, saved["amp"])
        first_step = saved["step"]
        if first_step >= settings.steps:
            raise ValueError(f"--steps must exceed the {first_step} of {source}, got {settings.steps}; raise it")
        ranks.say(f"resumes {source}{changes(saved['settings'], as_dict(settings))}")
    return Job(
        settings=settings,
        ranks=ranks,
        device=device,
        run=run,
        corpus=corpus,
        batches=Batches(
            tokens=corpus.train,
            context=config.context,
            batch_size=settings.batch_size,
            micro_batches=settings.micro_batches,
            world=ranks.world,
            seed=settings.seed,
        ),
        held_out=validation_batches(
            corpus.validation, context=config.context, count=settings.eval_batches, batch_size=settings.eval_batch_size
        ),
        model=model,
        optimizer=optimizer,
        identity=identity,
        first_step=first_step,
    )


def find_checkpoint(settings: Settings) -> Path | None:
    """The checkpoint that ``--resume`` means, if any."""
    if settings.resume == "latest":
        return checkpoint.latest(settings.out)
    return Path(settings.resume) if settings.resume else None


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a resume does otherwise than the run it continues, in words."""
    silent = {"resume", "out", "overwrite", "threads"}
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if k not in silent and before.get(k) != v]
    return f", with other settings: {', '.join(changed)}" if changed else ""


def train_step(job: Job, forward: Callable[..., Any], step: int) -> dict[str, Any]:
    """Step number ``step``, from 0, and its line of figures; the gradients stay until the next."""
    model, optimizer, ranks, micro_batches = job.model, job.optimizer, job.ranks, job.settings.micro_batches
    started = time.perf_counter()
    rate = learning_rate(job.settings, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss = torch.zeros((), device=job.device)
    for micro_batch in range(micro_batches):
        tokens, targets = (t.to(job.device) for t in job.batches(step, micro_batch, ranks.rank))
        last = micro_batch == micro_batches - 1
        with contextlib.nullcontext() if last else model.no_sync():
            with job.precision:
                _, micro_loss = forward(tokens, targets)
            (micro_loss / micro_batches).backward()
        loss += micro_loss.detach() / micro_batches
    norm = amp.clip_grad_norm_(model, job.settings.clip)
    optimizer.step()
    mean_loss, grad_norm = torch.stack((ranks.sum_(loss) / ranks.world, norm)).tolist()  # the step's one wait
    elapsed_s = time.perf_counter() - started
    return {
        "step": step + 1,
        "loss": mean_loss,
        "lr": rate,
        "grad_norm": grad_norm,
        "tokens_per_s": tokens_per_step(job) / elapsed_s,
        "step_ms": elapsed_s * 1e3,
        "memory_bytes": peak_memory_bytes(job.device),
        "wire_bytes": (amp.wire_bytes(model) or {}).get("sent", 0),
        "skipped_steps": optimizer.skipped_steps,
    }


def tokens_per_step(job: Job) -> int:
    """Tokens of a step over all ranks."""
    return job.batches.batch_size * job.batches.context


@torch.no_grad()
def evaluate(job: Job) -> float:
    """Mean loss of the held-out batches, which the ranks share; each has its own place, so any world adds the same."""
    losses = torch.zeros(len(job.held_out), dtype=torch.float64, device=job.device)
    sizes = torch.tensor([len(tokens) for tokens, _ in job.held_out], dtype=torch.float64, device=job.device)
    job.model.eval()
    for i in range(job.ranks.rank, len(job.held_out), job.ranks.world):
        tokens, targets = (t.to(job.device) for t in job.held_out[i])
        with job.precision:
            losses[i] = job.model(tokens, targets)[1]
    job.model.train()
    return float((job.ranks.sum_(losses) * sizes).sum() / sizes.sum())


def save(job: Job, step: int) -> None:
    """A checkpoint after ``step`` steps: gathered by all ranks, written by one."""
    state = {"amp": amp.state_dict(job.model, job.optimizer), "step": step, "settings": as_dict(job.settings)}
    if job.ranks.is_first:
        identity = {**job.identity, "step": step, "world_size": job.ranks.world}
        checkpoint.save(checkpoint.step_directory(job.run.directory, step), state, identity=identity)
    job.ranks.barrier()


def train(settings: Settings, ranks: Ranks, *, command: str = "") -> dict[str, Any]:
    """One run, from the settings to its summary. Whatever can be refused is refused before anything is written."""
    with ranks.one_error():
        job = prepare(settings, ranks)
        ranks.barrier()  # every rank is ready
        if ranks.is_first:
            job.run.start(dump(settings), first_step=job.first_step)
    ranks.say(
        f"{settings.preset} at {settings.level}: {job.model.num_parameters():,} parameters, {ranks.world} rank(s) on "
        f"{job.device.type}, {torch.get_num_threads()} thread(s) each, {tokens_per_step(job):,} tokens a step; "
        f"text: {job.corpus.record['source']}"
    )
    forward = torch.compile(job.model) if settings.compile else job.model
    progress = Progress(first_step=job.first_step, steps=settings.steps, shown=ranks.is_first)
    state_bytes: dict[str, int] = {}
    with contextlib.closing(job.run), contextlib.closing(progress):
        for step in range(job.first_step, settings.steps):
            line = train_step(job, forward, step)
            done, last = step + 1, step + 1 == settings.steps
            if last:
                state_bytes = amp.state_bytes(job.model, job.optimizer)  # with gradients, before compute copies
            if last or done % settings.eval_every == 0:
                line["validation_loss"] = evaluate(job)
            job.run.log(line)
            progress.update(line)
            if settings.save_every and (last or done % settings.save_every == 0):
                save(job, done)
    summary = summarize(job, state_bytes, command)
    if ranks.is_first:
        job.run.finish(summary)
        ranks.say(compare.draw_if_possible([job.run.directory], job.run.directory / FIGURE))
        ranks.say(f"validation loss {summary['validation_loss']:.4f}, {summary['median_step_ms']:.0f} ms a step")
    return summary


def summarize(job: Job, state_bytes: Mapping[str, int], command: str) -> dict[str, Any]:
    """The results of a complete run, as JSON; rates are of the steps that this process has taken."""
    settings, ranks = job.settings, job.ranks
    lines = job.run.lines
    parameters = job.model.num_parameters()
    step_ms = statistics.median(line["step_ms"] for line in lines)
    counts = ("matrix_parameters", "plain_parameters")
    return {
        "level": settings.level,
        "preset": settings.preset,
        "world_size": ranks.world,
        "steps": settings.steps,
        "seed": settings.seed,
        "tokens_per_step": tokens_per_step(job),
        "flops_per_token": job.model.flops_per_token(),
        "train_loss": statistics.fmean(line["loss"] for line in lines[-LAST:]),
        "train_loss_steps": min(LAST, len(lines)),
        "validation_loss": lines[-1]["validation_loss"],
        "median_step_ms": step_ms,
        "tokens_per_s": tokens_per_step(job) / step_ms * 1e3,
        "peak_memory_bytes": lines[-1]["memory_bytes"],
        "parameters": parameters,
        "state_bytes": dict(state_bytes),
        "bytes_per_parameter": sum(v for k, v in state_bytes.items() if k not in counts) / parameters,
        "wire_bytes": amp.wire_bytes(job.model),
        "skipped_steps": job.optimizer.skipped_steps,
        "fp8_report": amp.fp8_report(job.model).as_dict(),
        "corpus": dict(job.corpus.record),
        "first_step": job.first_step,
        "settings": as_dict(settings),
        "command": command,
        **environment(job.device),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; the process ends with code 2 for a user's mistake, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    ranks = Ranks.from_environment()
    with ranks.one_error():
        with ranks.first_prints():
            settings = parse(Settings, arguments, program="python -m msamp_like.launchers.pretrain")
        check(settings, ranks.world)
        torch.set_num_threads(ranks.threads(settings.threads))
        device = ranks.device(settings.device)
    start = ["python", "-m"] if ranks.world == 1 else ["torchrun", "--nproc-per-node", str(ranks.local_world), "-m"]
    command = shlex.join([*start, "msamp_like.launchers.pretrain", *arguments])
    try:
        with ranks.process_group(device):
            train(settings, ranks, command=command)
    except KeyboardInterrupt:
        ranks.say(f"interrupted; the steps so far are in {settings.out}")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
