"""Train a GPT from scratch on text, in FP8 or in BF16, on one process or several.

    torchrun --nproc-per-node 2 -m msamp_like.launchers.pretrain --level O2 --steps 300 --out runs/demo
    torchrun --nproc-per-node 4 -m msamp_like.launchers.pretrain --level O3 --tensor-parallel 2 --sequence-parallel \
        --steps 300 --out runs/o3
    python -m msamp_like.launchers.pretrain --level O0 --steps 300 --out runs/bf16

Every step is a pure function of the settings and of the state before it: the batch comes from the step's number, so
does the learning rate, and a checkpoint holds the rest. ``--resume latest`` therefore continues bit for bit.

What may be set, and the recipe, are in :mod:`msamp_like.launchers.pretrain_settings`.
"""

from __future__ import annotations

import contextlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msamp_like import amp, checkpoint
from msamp_like.comm.tensor_parallel import parallelize, plan_gpt
from msamp_like.launchers import compare
from msamp_like.launchers.corpus import Batches, Corpus, load_corpus, validation_batches
from msamp_like.launchers.pretrain_settings import (
    Settings,
    check,
    learning_rate,
    model_config,
    parse_overrides,
    precision,
)
from msamp_like.launchers.ranks import Ranks
from msamp_like.launchers.run import FIGURE, Progress, Run, environment, peak_memory_bytes, wire_table, wire_text
from msamp_like.launchers.settings import as_dict, dump, parse
from msamp_like.models.gpt import GPT, GPTConfig
from msamp_like.optim import GradientRelease, Muon, muon_groups

LAST = 20
"""Steps over which the summary's training loss is the mean."""


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, or Muon with AdamW, that decays matrices and leaves norms and biases alone."""
    if settings.optimizer == "muon":
        groups = muon_groups(model, weight_decay=settings.weight_decay)
        return Muon(groups, lr=learning_rate(settings, 0), betas=settings.betas)
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
    model: Any  # GPT, with what amp.initialize adds; this rank's part of it where it is split
    optimizer: Any
    parameters: int  # of the whole model
    flops_per_token: int  # of the whole model
    identity: dict[str, Any]
    first_step: int

    @property
    def precision(self) -> torch.autocast:
        """Autocast of what is not in FP8."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bf16")


def prepare(settings: Settings, ranks: Ranks) -> Job:
    """Text, model, optimizer and, in a resume, their state; nothing is written. Raises ValueError or OSError."""
    device = ranks.device(settings.device)
    ranks = ranks.split(settings.tensor_parallel, device)
    config = model_config(settings)
    corpus = load_corpus(settings.data, settings.tokenizer, vocab_size=config.vocab_size, context=config.context)
    run = Run(settings.out)
    source = find_checkpoint(settings)
    run.check(resumes_from=source, overwrite=settings.overwrite)

    torch.manual_seed(settings.seed)
    model = GPT(config).to(device)
    whole = {"parameters": model.num_parameters(), "flops_per_token": model.flops_per_token()}
    identity = {
        "level": settings.level,
        "model": checkpoint.fingerprint(model.named_parameters()),
        "corpus": corpus.record["sha256"],
    }
    model, optimizer = convert(model, config, settings, ranks)
    first_step = 0
    if source is not None:
        part, parts = ranks.tensor_rank, ranks.tensor_world
        saved = checkpoint.load(source, expect=identity, device=device, part=part, parts=parts)
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
            world=ranks.data_world,
            seed=settings.seed,
        ),
        held_out=validation_batches(
            corpus.validation, context=config.context, count=settings.eval_batches, batch_size=settings.eval_batch_size
        ),
        model=model,
        optimizer=optimizer,
        **whole,
        identity=identity,
        first_step=first_step,
    )


def convert(model: GPT, config: GPTConfig, settings: Settings, ranks: Ranks) -> tuple[Any, Any]:
    """(model, optimizer) in the level's precision, over all ranks; from here on ``model`` is this rank's part of it."""
    if ranks.mesh is not None:
        split = {"sequence": settings.sequence_parallel, "overlap": settings.tensor_parallel_overlap}
        parallelize(model, ranks.mesh["tp"], plan_gpt(config), **split)
    return amp.initialize(
        model,
        make_optimizer(model, settings),
        level=settings.level,
        recipe=settings.recipe or None,
        overrides=parse_overrides(settings),
        mesh=ranks.mesh,
        zero_stage=settings.zero_stage if settings.zero_stage >= 0 else None,
        gradient_release=GradientRelease(max_norm=settings.clip) if settings.gradient_release else False,
        offload=settings.offload or None,
        seed=settings.seed,
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
    amp.set_precision(model, precision(job.settings, step))
    optimizer.zero_grad()
    loss = torch.zeros((), device=job.device)
    for micro_batch in range(micro_batches):
        tokens, targets = (t.to(job.device) for t in job.batches(step, micro_batch, ranks.data_rank))
        last = micro_batch == micro_batches - 1
        with contextlib.nullcontext() if last else model.no_sync():
            with job.precision:
                _, micro_loss = forward(tokens, targets)
            (micro_loss / micro_batches).backward()
        loss += micro_loss.detach() / micro_batches
    norm = None if job.settings.gradient_release else amp.clip_grad_norm_(model, job.settings.clip)
    optimizer.step()
    norm = (optimizer.released.norm if norm is None else norm).to(loss.device)
    mean_loss, grad_norm = torch.stack((ranks.sum_(loss) / ranks.data_world, norm)).tolist()  # the step's one wait
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
    """Mean loss of the held-out batches, which the data-parallel ranks share; each batch has its own place, so any
    number of them adds the same."""
    losses = torch.zeros(len(job.held_out), dtype=torch.float64, device=job.device)
    sizes = torch.tensor([len(tokens) for tokens, _ in job.held_out], dtype=torch.float64, device=job.device)
    job.model.eval()
    for i in range(job.ranks.data_rank, len(job.held_out), job.ranks.data_world):
        tokens, targets = (t.to(job.device) for t in job.held_out[i])
        with job.precision:
            losses[i] = job.model(tokens, targets)[1]
    job.model.train()
    return float((job.ranks.sum_(losses) * sizes).sum() / sizes.sum())


def save(job: Job, step: int) -> None:
    """A checkpoint after ``step`` steps: gathered by all ranks, written by one; where the model is split, by one a
    part."""
    ranks, directory = job.ranks, checkpoint.step_directory(job.run.directory, step)
    state = {"amp": amp.state_dict(job.model, job.optimizer), "step": step, "settings": as_dict(job.settings)}
    identity = {**job.identity, "step": step, "world_size": ranks.world, "tensor_parallel": ranks.tensor_world}
    if ranks.mesh is None:
        if ranks.is_first:
            checkpoint.save(directory, state, identity=identity)
    else:
        if ranks.data_rank == 0:
            checkpoint.save(checkpoint.part_directory(directory, ranks.tensor_rank), state, identity=identity)
        ranks.barrier()  # all parts are there
        if ranks.is_first:
            checkpoint.join(directory, parts=ranks.tensor_world, identity=identity)
    ranks.barrier()


def measure(job: Job) -> dict[str, Any]:
    """What a step leaves on this rank, right after it: bytes held, with gradients and before compute copies are made,
    and bytes sent, before anything else is."""
    return {
        "state_bytes": amp.state_bytes(job.model, job.optimizer),
        "wire_bytes": amp.wire_bytes(job.model),
        "wire_ledger": wire_table(amp.wire_ledger(job.model)),
    }


def train(settings: Settings, ranks: Ranks, *, command: str = "") -> dict[str, Any]:
    """One run, from the settings to its summary. Whatever can be refused is refused before anything is written."""
    with ranks.one_error():
        job = prepare(settings, ranks)
        ranks.barrier()  # every rank is ready
        if ranks.is_first:
            job.run.start(dump(settings), first_step=job.first_step)
    ranks.say(
        f"{settings.preset} at {settings.level}: {job.parameters:,} parameters, {job.ranks} on "
        f"{job.device.type}, {torch.get_num_threads()} thread(s) each, {tokens_per_step(job):,} tokens a step; "
        f"text: {job.corpus.record['source']}"
    )
    forward = torch.compile(job.model) if settings.compile else job.model
    progress = Progress(first_step=job.first_step, steps=settings.steps, shown=ranks.is_first)
    measured: dict[str, Any] = {}
    with contextlib.closing(job.run), contextlib.closing(progress):
        for step in range(job.first_step, settings.steps):
            line = train_step(job, forward, step)
            done, last = step + 1, step + 1 == settings.steps
            if last:
                measured = measure(job)
            if last or done % settings.eval_every == 0:
                line["validation_loss"] = evaluate(job)
            job.run.log(line)
            progress.update(line)
            if settings.save_every and (last or done % settings.save_every == 0):
                save(job, done)
    summary = summarize(job, measured, command)
    if ranks.is_first:
        job.run.finish(summary)
        ranks.say(compare.draw_if_possible([job.run.directory], job.run.directory / FIGURE))
        for row in summary["wire_ledger"]:
            ranks.say(wire_text(row))
        ranks.say(f"validation loss {summary['validation_loss']:.4f}, {summary['median_step_ms']:.0f} ms a step")
    return summary


def summarize(job: Job, measured: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The results of a complete run, as JSON; rates are of the steps that this process has taken, ``measured`` is of
    the last one on this rank."""
    settings, ranks = job.settings, job.ranks
    lines = job.run.lines
    step_ms = statistics.median(line["step_ms"] for line in lines)
    counts = ("matrix_parameters", "plain_parameters")
    return {
        "level": settings.level,
        "preset": settings.preset,
        "world_size": ranks.world,
        "steps": settings.steps,
        "seed": settings.seed,
        "tokens_per_step": tokens_per_step(job),
        "flops_per_token": job.flops_per_token,
        "train_loss": statistics.fmean(line["loss"] for line in lines[-LAST:]),
        "train_loss_steps": min(LAST, len(lines)),
        "validation_loss": lines[-1]["validation_loss"],
        "median_step_ms": step_ms,
        "tokens_per_s": tokens_per_step(job) / step_ms * 1e3,
        "peak_memory_bytes": lines[-1]["memory_bytes"],
        "parameters": job.parameters,
        "bytes_per_parameter": sum(v for k, v in measured["state_bytes"].items() if k not in counts) / job.parameters,
        **measured,
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
