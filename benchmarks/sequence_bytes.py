"""Bytes of sequence-parallel activations in one step: GPT ``tiny`` split over 2 and 4 gloo ranks, O3 against O0.

    python -m benchmarks.sequence_bytes

One forward and backward of 2 sequences of 256 bytes on every rank of the tensor-parallel group. Counted where they are
sent, by direction: what is gathered and reduce-scattered around the split products, the embedding and the head, at most
0.52 of the same bytes at O0, in BF16; the loss of the split vocabulary beside it, which is FP32 at any level.

    expected    what the plan says: 4 + 8 exchanges a layer, each (world - 1) messages of this rank's part; equal to the
                byte
    control     O3 with BF16 partial outputs, which fails the bound
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from benchmarks.result import parser, write
from msamp_like import amp
from msamp_like.comm.activations import message_bytes
from msamp_like.comm.tensor_parallel import adopt, context, parallelize, plan_gpt
from msamp_like.models.gpt import GPT, PRESETS
from msamp_like.policy import O0, O3, Role
from tests.distributed.ranks import RankPool

MOST_BYTES = 0.52
BATCH = 2
POLICIES = {"O0": O0, "O3": O3, "control": O3.with_rule(Role.PARTIAL_OUTPUT, "bf16")}


def step(rank: int, world: int, group: dist.ProcessGroup, name: str) -> dict[str, Any]:
    """One rank's part of a step: bytes by direction, and the loss."""
    config, policy = PRESETS["tiny"], POLICIES[name]
    model = parallelize(GPT(config), group, plan_gpt(config), sequence=True)
    amp.initialize(model, level=policy, data_parallel=False)
    adopt(model, policy)
    tokens = torch.randint(config.vocab_size, (2, BATCH, config.context))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*tokens)[1]
    loss.backward()
    entries = context(model).ledger  # type: ignore[union-attr]
    sent = {
        direction: sum(e.sent for e in entries if e.label.endswith(direction) and not e.label.startswith("loss"))
        for direction in ("forward", "backward")
    }
    rows = BATCH * config.context // world
    part = message_bytes(rows, config.dim, policy[Role.PARTIAL_OUTPUT], torch.bfloat16)
    return {
        **sent,
        "activations": sum(sent.values()),
        "expected": (4 + 8 * config.num_layers) * (world - 1) * part,
        "loss": sum(e.sent for e in entries if e.label.startswith("loss")),
        "nats": round(loss.item(), 4),
    }


def summarize(answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the policies of one world say together."""
    bf16 = answers["O0"]
    shares = {
        f"{name}_share": round(answers[name]["activations"] / bf16["activations"], 4) for name in ("O3", "control")
    }
    with_loss = (answers["O3"]["activations"] + answers["O3"]["loss"]) / (bf16["activations"] + bf16["loss"])
    return {**answers, **shares, "O3_share_with_loss": round(with_loss, 4)}


def main() -> None:
    options = parser(__doc__, "docs/results/sequence_bytes.json")
    options.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    arguments = options.parse_args()
    worlds: dict[str, Any] = {}
    pool = RankPool(size=max(arguments.worlds), timeout_s=600)
    print("world         O0         O3   O3 of O0   with the loss   control")
    try:
        for world in arguments.worlds:
            ranks = {name: pool.run(world, step, name) for name in POLICIES}
            if any(answer != answers[0] for answers in ranks.values() for answer in answers):
                raise RuntimeError(f"all ranks send the same bytes and see the same loss, got {ranks}")
            row = worlds[str(world)] = summarize({name: answers[0] for name, answers in ranks.items()})
            print(
                f"{world:>5}{row['O0']['activations']:>11}{row['O3']['activations']:>11}{row['O3_share']:>11}"
                f"{row['O3_share_with_loss']:>16}{row['control_share']:>10}"
            )
    finally:
        pool.close()
    exact = all(row[name]["activations"] == row[name]["expected"] for row in worlds.values() for name in POLICIES)
    reached = exact and all(row["O3_share"] <= MOST_BYTES for row in worlds.values())
    control_fails = all(row["control_share"] > MOST_BYTES for row in worlds.values())
    targets = {"O3_share": MOST_BYTES}
    write(arguments.out, {"worlds": worlds, "targets": targets, "reached": reached, "control_fails": control_fails})


if __name__ == "__main__":
    main()
