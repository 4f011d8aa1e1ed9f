"""A gradient accumulated over 4, 16 and 64 micro-batches, in dB of SQNR.

    python -m benchmarks.accumulation

The first micro-batch's gradient is stored in E4M3, from the second on the same ``.grad`` holds the sum in BF16, and it
is rounded to E4M3 once, when it is sent. For one Fp8Linear, 1024 x 1024 on N(0, 1), 64 rows a micro-batch, and for
every matrix of GPT ``tiny`` on text, a sequence of 128 tokens a micro-batch:

    stored      against the exact (FP64) sum of the same micro-batches' gradients, which the layers give in BF16; at
                least 28 dB, all matrices together: E4M3's own rounding leaves 31
    worst       the same for the worst matrix
    training    against the sum of the gradients of the same model trained in FP32; what FP8 products leave
    control     the sum rounded to E4M3 after every micro-batch, against the exact sum; it falls with their number, and
                at 64 fails the same bound
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.products import sqnr_db
from benchmarks.result import parser, write
from msamp_like import amp
from msamp_like.comm.collectives import stored_as
from msamp_like.launchers.corpus import Batches, load_corpus
from msamp_like.models.gpt import GPT, PRESETS
from msamp_like.policy import O2, Policy, Role
from msamp_like.tensor import ScalingTensor, real

LEAST_DB = 28.0
RULE = O2[Role.GRAD_WEIGHT]
Backward = Callable[[nn.Module, int], None]


def linear() -> nn.Module:
    """One layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1024, 1024, bias=False))


def linear_backward(model: nn.Module, micro_batch: int) -> None:
    """N(0, 1) in, N(0, 1) back."""
    generator = torch.Generator().manual_seed(micro_batch)
    x, grad_output = (torch.randn(64, 1024, generator=generator) for _ in range(2))
    model(x).backward(grad_output)


def tiny() -> nn.Module:
    """The preset GPT."""
    torch.manual_seed(0)
    return GPT(PRESETS["tiny"])


def text_backward() -> Backward:
    """One sequence of the default corpus a micro-batch, 128 tokens."""
    corpus = load_corpus(vocab_size=PRESETS["tiny"].vocab_size, context=128)
    batches = Batches(tokens=corpus.train, context=128, batch_size=1, micro_batches=1, world=1, seed=0)

    def backward(model: nn.Module, micro_batch: int) -> None:
        tokens, targets = batches(micro_batch, 0, 0)
        model(tokens, targets)[1].backward()

    return backward


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the matrices, by name, as they are."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.dim() == 2}


class Sums:
    """The same micro-batches into one converted model that accumulates, one that does not, and one in FP32."""

    def __init__(self, build: Callable[[], nn.Module], backward: Backward) -> None:
        self.backward = backward
        self.accumulating = self._converted(build, O2)
        self.single = self._converted(build, O2.with_rule(Role.GRAD_WEIGHT, "bf16"))
        self.plain = build()
        self.exact: dict[str, Tensor] = {}
        self.rounded: dict[str, ScalingTensor] = {}

    def _converted(self, build: Callable[[], nn.Module], policy: Policy) -> nn.Module:
        return amp.initialize(build(), level=policy, data_parallel=False)[0]

    def add(self, micro_batch: int) -> None:
        """One more micro-batch into every sum."""
        self.backward(self.accumulating, micro_batch)
        self.backward(self.plain, micro_batch)
        self.single.zero_grad()
        self.backward(self.single, micro_batch)
        for name, grad in gradients(self.single).items():
            value = real(grad)
            self.exact[name] = self.exact.get(name, 0) + value.double()
            before = real(self.rounded[name]) if name in self.rounded else 0
            self.rounded[name] = stored_as(before + value, RULE)

    def figures(self) -> dict[str, float]:
        """All sums so far against each other."""
        stored = {name: real(stored_as(grad, RULE)) for name, grad in gradients(self.accumulating).items()}
        control = {name: real(grad) for name, grad in self.rounded.items()}
        return {
            "stored_db": _joint_db(self.exact, stored),
            "worst_db": min(round(sqnr_db(self.exact[name], stored[name]), 2) for name in stored),
            "training_db": _joint_db(gradients(self.plain), stored),
            "control_db": _joint_db(self.exact, control),
        }


def _joint_db(exact: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    first, second = (torch.cat([t[name].flatten().double() for name in exact]) for t in (exact, found))
    return round(sqnr_db(first, second), 2)


def measure(build: Callable[[], nn.Module], backward: Backward, counts: list[int]) -> dict[str, dict[str, float]]:
    """Figures after each number of micro-batches."""
    sums, rows = Sums(build, backward), {}
    for micro_batch in range(max(counts)):
        sums.add(micro_batch)
        if micro_batch + 1 in counts:
            rows[str(micro_batch + 1)] = sums.figures()
    return rows


def main() -> None:
    options = parser(__doc__, "docs/results/accumulation.json")
    options.add_argument("--micro-batches", type=int, nargs="+", default=[4, 16, 64])
    arguments = options.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    print("model    micro-batches    stored     worst   training   control   (dB)")
    for name, build, backward in (("linear", linear, linear_backward), ("tiny", tiny, text_backward())):
        results[name] = measure(build, backward, arguments.micro_batches)
        for count, row in results[name].items():
            print(f"{name:<9}{count:>13}" + "".join(f"{value:>10.2f}" for value in row.values()))
    reached = all(row["stored_db"] >= LEAST_DB for rows in results.values() for row in rows.values())
    last = str(max(arguments.micro_batches))
    control_fails = all(rows[last]["control_db"] < LEAST_DB for rows in results.values())
    figures = {"sqnr_db": results, "target_stored_db": LEAST_DB, "reached": reached, "control_fails": control_fails}
    write(arguments.out, figures)


if __name__ == "__main__":
    main()
