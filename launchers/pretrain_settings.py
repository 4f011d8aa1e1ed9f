"""What a pretraining run is told, and what follows from that alone: nothing here loads, builds or writes.

The recipe is that of Peng et al., "FP8-LM: Training FP8 Large Language Models", 2023, https://arxiv.org/abs/2310.18313:
AdamW, a linear warm-up, a cosine to a tenth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from msamp_like import policy as policies
from msamp_like.launchers.settings import Configurable
from msamp_like.models.gpt import PRESETS, GPTConfig

LEARNING_RATES = {"tiny": 2e-3, "small": 1e-3, "125M": 6e-4, "7B": 3e-4, "13B": 3e-4, "175B": 3e-5}
"""Peak learning rate of each preset: Table 1 of the paper from 125M up."""


@dataclass(frozen=True, kw_only=True)
class Settings(Configurable):
    """Train a GPT on text in FP8 (O1, O2, O3, lean) or BF16 (O0)."""

    level: str = "O2"  # Level of precision: O0 (BF16), O1, O2, O3 or lean (FP8).
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

    tensor_parallel: int = 1  # Ranks that one model is split over; the others see other samples.
    sequence_parallel: bool = False  # Split activations between the split products along the sequence too.
    tensor_parallel_overlap: bool = False  # Multiply one part of a sequence while another travels.
    zero_stage: int = -1  # What data-parallel ranks share out: 0 nothing, 1 states, 2 gradients too (-1: the level's).

    batch_size: int = 8  # Sequences of a step, over all ranks and micro-batches.
    micro_batches: int = 1  # Backward passes of a step on each rank; gradients accumulate.
    lr: float = 0.0  # Peak learning rate (0: the preset's).
    warmup_steps: int = -1  # Steps of linear warm-up (-1: a tenth of the steps, at most 1,000).
    final_lr: float = 0.1  # Learning rate at the end of the cosine, as a share of the peak.
    optimizer: Literal["adamw", "muon"] = "adamw"  # Muon steps the matrices of hidden layers, AdamW the rest.
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's averaging factors.
    weight_decay: float = 0.1  # Decoupled decay, of matrices alone.
    clip: float = 1.0  # Largest norm of the gradient.
    gradient_release: bool = False  # Step each parameter in backward, free its gradient; clip by expected norms.
    offload: Literal["", "cpu"] = ""  # Keep the states and the update of matrices on the host, in "cpu" memory.
    seed: int = 0  # Of the initial weights, the order of the data and stochastic rounding.

    recipe: Literal["", "delayed", "current", "rowwise", "blockwise", "mxfp8"] = ""  # Scales (empty: the level's own).
    overrides: tuple[str, ...] = ()  # Products by module: pattern=product, product one of fp8, smooth, bf16, skip.
    bf16_last: float = 0.0  # Share of the steps, at the end, that take their products in BF16.
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
    counts = ("batch_size", "micro_batches", "eval_every", "eval_batches", "eval_batch_size")
    for name in ("steps", "tensor_parallel", "clip", *counts):
        if getattr(s, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(s, name)}; raise it")
    sizes = ("vocab_size", "context", "dim", "num_layers", "num_heads")
    for name in (*sizes, "lr", "final_lr", "weight_decay", "seed", "save_every", "threads"):
        if getattr(s, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(s, name)}; raise it")
    if not 0 <= s.bf16_last <= 1:
        raise ValueError(f"--bf16-last is a share of the steps, 0 to 1, got {s.bf16_last}; give 0.1 for the last tenth")
    if s.zero_stage not in (-1, 0, 1, 2):
        raise ValueError(
            f"--zero-stage must be 0, 1 or 2, or -1 for the level's own, got {s.zero_stage}; sharded parameters (3) "
            "are not built: give 2"
        )
    if s.gradient_release and s.micro_batches > 1:
        raise ValueError(
            f"--gradient-release frees a gradient in the backward that made it, got --micro-batches {s.micro_batches}; "
            "take one micro-batch a step, or leave it out"
        )
    if s.offload and s.gradient_release:
        raise ValueError(
            "--offload steps once all gradients are known, got it with --gradient-release; leave one of them out"
        )
    check_split(s, world)
    models = world // s.tensor_parallel
    if s.batch_size % (s.micro_batches * models):
        raise ValueError(
            f"--batch-size must divide by micro-batches times data-parallel ranks, got {s.batch_size} for "
            f"{s.micro_batches} times {models}; give a multiple of {s.micro_batches * models}, or start fewer ranks "
            "(--nproc-per-node)"
        )


def check_split(settings: Settings, world: int) -> None:
    """Raises ValueError unless the model can be split over ``tensor_parallel`` of ``world`` ranks."""
    split, config = settings.tensor_parallel, model_config(settings)
    if world % split:
        raise ValueError(
            f"--tensor-parallel must divide the number of ranks, got {split} for {world}; give a divisor of it, or "
            f"start a multiple of {split} (--nproc-per-node)"
        )
    for name in ("num_heads", "vocab_size"):
        if getattr(config, name) % split:
            raise ValueError(
                f"--tensor-parallel must divide the model's {name}, got {split} for {getattr(config, name)}; give a "
                f"divisor of it, or another --{name.replace('_', '-')}"
            )
    if settings.sequence_parallel and split == 1:
        raise ValueError(
            "--sequence-parallel needs a model split over several ranks, got --tensor-parallel 1; give "
            "--tensor-parallel 2 or more, or leave it out"
        )
    if settings.tensor_parallel_overlap and not settings.sequence_parallel:
        raise ValueError(
            "--tensor-parallel-overlap is of split sequences, got it without --sequence-parallel; give both, or leave "
            "it out"
        )
    if settings.sequence_parallel and config.context % split:
        raise ValueError(
            f"--sequence-parallel needs a context that divides by the ranks of a model, got {config.context} tokens "
            f"for --tensor-parallel {split}; give another --context"
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


def precision(settings: Settings, step: int) -> str:
    """Of the products of step number ``step``, from 0: "fp8", as the level has it, and "bf16" in the last part."""
    return "bf16" if step >= settings.steps - round(settings.steps * settings.bf16_last) else "fp8"


def learning_rate(settings: Settings, step: int) -> float:
    """Of step number ``step``, from 0: a linear warm-up, then a cosine from the peak to ``final_lr`` of it."""
    peak = settings.lr or LEARNING_RATES[settings.preset]
    warmup = settings.warmup_steps if settings.warmup_steps >= 0 else min(1000, settings.steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - 1 - warmup)
    return peak * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
