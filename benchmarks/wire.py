"""Bytes on the wire of one gradient reduction: GPT ``tiny`` at O2 on 2, 4 and 8 gloo ranks of one machine.

    python -m benchmarks.wire

Each rank trains on text of its own. Reported at each world size:

    bytes       what this rank sent for the FP8 gradients, counted where it is sent, over what a ring all-reduce of the
                same elements in BF16 sends at that world size; at most 0.52
    sqnr_db     the reduced gradient against the exact mean of the ranks' BF16 gradients, over all FP8 elements and for
                the worst matrix; at least 27.5: two E4M3 roundings of 31 dB each
    identical   whether all ranks ended with the same bits
    control     the same sum with a rounding to E4M3 after every hop, as a ring that sums in FP8 does; it falls with the
                world size and fails the same bound
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.products import sqnr_db
from benchmarks.result import parser, write
from msamp_like import amp
from msamp_like.formats import E4M3
from msamp_like.launchers.corpus import Batches, load_corpus
from msamp_like.models.gpt import GPT, PRESETS
from msamp_like.policy import O2, Policy, Role
from msamp_like.scaling import quantize
from msamp_like.tensor import ScalingTensor, real
from tests.distributed.ranks import RankPool

MOST_BYTES = 0.52
LEAST_DB = 27.5


def trained_once(policy: Policy, rank: int, world: int, data_parallel: bool) -> GPT:
    """The preset ``tiny`` after one backward on this rank's share of a step."""
    torch.manual_seed(0)
    config = PRESETS["tiny"]
    corpus = load_corpus(vocab_size=config.vocab_size, context=128)
    batches = Batches(tokens=corpus.train, context=128, batch_size=2 * world, micro_batches=1, world=world, seed=0)
    model = amp.initialize(GPT(config), level=policy, data_parallel=data_parallel)[0]
    tokens, targets = batches(0, 0, rank)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, targets)[1].backward()
    return model


def gradients(model: GPT) -> dict[str, Tensor]:
    """The gradients of the matrices, by name."""
    return {name: p.grad for name, p in model.named_parameters() if isinstance(p.grad, ScalingTensor)}


def summed_in_e4m3(grads: list[Tensor]) -> Tensor:
    """The mean of FP32 tensors by a sum in E4M3 under one scale, rounded after every hop."""
    stored = quantize(torch.stack(grads).sum(0), O2[Role.GRAD_WEIGHT])
    scale_inv = stored.scale_inv * 2  # room for partial sums larger than the whole
    total = torch.zeros_like(grads[0])
    for grad in grads:
        total = (total + grad / scale_inv).clamp(-E4M3.largest, E4M3.largest).to(E4M3.dtype).float()
    return total * scale_inv / len(grads)


def reduction(rank: int, world: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """One rank's part: bytes, digest of all gradient bytes, and (on the first rank) errors against the exact mean."""
    local = gradients(trained_once(O2.with_rule(Role.GRAD_WEIGHT, "bf16"), rank, world, data_parallel=False))
    model = trained_once(O2, rank, world, data_parallel=True)
    reduced = gradients(model)
    digest = hashlib.sha256()
    for grad in reduced.values():
        digest.update(grad.payload.view(torch.uint8).numpy().tobytes() + grad.scale_inv.numpy().tobytes())
    exact, found, control = {}, {}, {}
    for name, grad in local.items():
        everyone = [torch.empty(grad.shape) for _ in range(world)]
        dist.all_gather(everyone, real(grad), group=group)
        exact[name], found[name] = torch.stack(everyone).double().mean(0), real(reduced[name])
        control[name] = summed_in_e4m3(everyone)
    return {
        "wire": amp.wire_bytes(model),
        "digest": digest.hexdigest(),
        "sqnr_db": sqnr_db(_flat(exact), _flat(found)),
        "worst_matrix_db": min(sqnr_db(exact[name], found[name]) for name in exact),
        "control_db": sqnr_db(_flat(exact), _flat(control)),
    }


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten().double() for t in tensors.values()])


def summarize(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks of one world say together."""
    first, wire = answers[0], answers[0]["wire"]
    return {
        **wire,
        "fp8_share_of_bf16": round(max(a["wire"]["fp8_sent"] / a["wire"]["fp8_bf16"] for a in answers), 4),
        "all_share_of_bf16": round(max(a["wire"]["sent"] / a["wire"]["bf16"] for a in answers), 4),
        "identical": len({a["digest"] for a in answers}) == 1,
        **{name: round(first[name], 2) for name in ("sqnr_db", "worst_matrix_db", "control_db")},
    }


def main() -> None:
    options = parser(__doc__, "docs/results/wire.json")
    options.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8])
    arguments = options.parse_args()
    rows = {}
    print("world   FP8 bytes of BF16   all bytes of BF16   identical   mean of grads   worst matrix   control")
    pool = RankPool(size=max(arguments.worlds), timeout_s=600)
    try:
        for world in arguments.worlds:
            row = rows[str(world)] = summarize(pool.run(world, reduction))
            print(
                f"{world:>5}{row['fp8_share_of_bf16']:>20}{row['all_share_of_bf16']:>20}{row['identical']!s:>12}"
                f"{row['sqnr_db']:>13} dB{row['worst_matrix_db']:>12} dB{row['control_db']:>7} dB"
            )
    finally:
        pool.close()
    reached = all(
        row["fp8_share_of_bf16"] <= MOST_BYTES and row["identical"] and row["sqnr_db"] >= LEAST_DB
        for row in rows.values()
    )
    targets = {"fp8_share_of_bf16": MOST_BYTES, "sqnr_db": LEAST_DB}
    control_fails = min(row["control_db"] for row in rows.values()) < LEAST_DB
    write(arguments.out, {"worlds": rows, "targets": targets, "reached": reached, "control_fails": control_fails})


if __name__ == "__main__":
    main()
