"""Validation loss of O3 on four ranks (data parallel 2 x tensor parallel 2, sequence parallel, ZeRO) against O0 on one.

    python -m benchmarks.loss_gap_sharded

``tiny``, 600 steps, 2,048 tokens a step, the same seeds and data: what loss_gap measures for O2. The gate is a mean gap
of at most 0.01 nats; that it can fail is shown there. The validation loss of O3 is taken on the ranks themselves.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from benchmarks.loss_gap import GATE, summarize, train, validate
from benchmarks.result import parser, write
from msamp_like import amp
from msamp_like.comm.tensor_parallel import parallelize, plan_gpt
from msamp_like.launchers.corpus import Batches, load_corpus, validation_batches
from msamp_like.models import gpt

DATA, TENSOR = 2, 2
LEVEL = "O3, dp 2 x tp 2, sequence parallel, ZeRO-1"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def train_rank(rank: int, port: int, seed: int, steps: int, answers: Any) -> None:
    """One of the four ranks: the steps of :func:`benchmarks.loss_gap.train` on its share of each batch."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=DATA * TENSOR)
    mesh = init_device_mesh("cpu", (DATA, TENSOR), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(seed)
    config = gpt.PRESETS["tiny"]
    corpus = load_corpus(vocab_size=config.vocab_size, context=256)
    batches = Batches(tokens=corpus.train, context=256, batch_size=8, micro_batches=1, world=DATA, seed=seed)
    model: gpt.GPT = parallelize(gpt.GPT(config), mesh["tp"], plan_gpt(config), sequence=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    model, stepper = amp.initialize(model, optimizer, level="O3", mesh=mesh, seed=seed)
    started = time.perf_counter()
    for step in range(steps):
        for group in stepper.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        tokens, targets = batches(step, 0, mesh.get_local_rank("dp"))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, targets)[1]
        loss.backward()
        amp.clip_grad_norm_(model, 1.0)
        stepper.step()
        stepper.zero_grad()
    held_out = validation_batches(corpus.validation, context=256, count=16, batch_size=16)
    result = {
        "validation_loss": validate(model, held_out),
        "skipped_steps": stepper.skipped_steps,
        "seconds": round(time.perf_counter() - started, 1),
    }
    dist.destroy_process_group()
    if rank == 0:
        answers.put(result)


def train_sharded(seed: int, steps: int) -> dict[str, Any]:
    """One run of the four ranks."""
    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=train_rank, args=(rank, port, seed, steps, answers)) for rank in range(DATA * TENSOR)
    ]
    for process in ranks:
        process.start()
    result: dict[str, Any] = answers.get()
    for process in ranks:
        process.join()
    return result


def train_alone(job: tuple[int, int]) -> dict[str, Any]:
    """One run of O0 in a process of one thread."""
    return train("O0", *job)


def main() -> None:
    options = parser(__doc__, "docs/results/loss_gap_sharded.json")
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--seeds", type=int, default=3)
    arguments = options.parse_args()
    seeds, steps = range(arguments.seeds), arguments.steps
    runs: dict[str, dict[str, Any]] = {"O0": {}, LEVEL: {}}
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        alone = pool.imap(train_alone, [(seed, steps) for seed in seeds])
        for seed, result in zip(seeds, tqdm(alone, total=len(seeds), unit="run"), strict=True):
            runs["O0"][str(seed)] = result
            tqdm.write(f"O0, seed {seed}: {result}")
    for seed in tqdm(seeds, unit="run"):
        runs[LEVEL][str(seed)] = result = train_sharded(seed, steps)
        tqdm.write(f"{LEVEL}, seed {seed}: {result}")
    summary = summarize(runs)
    figures = {"model": "tiny", "tokens_a_step": 2048, "steps": steps, "gate_nats": GATE, "level": LEVEL}
    write(arguments.out, {**figures, "summary": summary, "reached": summary[LEVEL]["passes"], "runs": runs})


if __name__ == "__main__":
    main()
