"""Real gradients, to ask which moments survive eight bits: rows of some matrices of a ``tiny`` run, every step.

A file of them is scratch: a run of O0 on the default corpus makes it again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msamp_like import amp
from msamp_like.launchers.corpus import Batches, load_corpus
from msamp_like.models import gpt
from msamp_like.policy import O0
from msamp_like.tensor import real

ROWS = 16


def recorded(path: Path, steps: int) -> dict[str, Tensor]:
    """{matrix: (steps, ROWS, columns) BF16} from ``path``, made there first if nothing, or another run, is there."""
    found: dict[str, Tensor] = torch.load(path, weights_only=True) if path.exists() else {}
    if not found or len(next(iter(found.values()))) != steps:
        found = record(steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, path)
    return found


def record(steps: int) -> dict[str, Tensor]:
    """Clipped gradients of every step of the recipe of ``benchmarks.loss_gap``, first and last block and embedding."""
    torch.manual_seed(0)
    config = gpt.PRESETS["tiny"]
    corpus = load_corpus(vocab_size=config.vocab_size, context=256)
    batches = Batches(tokens=corpus.train, context=256, batch_size=8, micro_batches=1, world=1, seed=0)
    model: Any = gpt.GPT(config)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    model, optimizer = amp.initialize(model, optimizer, level=O0, data_parallel=False)
    chosen = {n: p for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith(("blocks.1", "blocks.2"))}
    kept: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        tokens, targets = batches(step, 0, 0)
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens, targets)[1].backward()
        amp.clip_grad_norm_(model.parameters(), 1.0)
        for name, parameter in chosen.items():
            rows = torch.linspace(0, parameter.shape[0] - 1, ROWS).long()
            kept[name].append(real(parameter.grad)[rows].bfloat16())
        optimizer.step()
        optimizer.zero_grad()
    return {name: torch.stack(gradients) for name, gradients in kept.items()}
