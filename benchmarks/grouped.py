"""Grouped linear layers in FP8 beside BF16: dB of SQNR against FP32, and time of forward and backward.

    python -m benchmarks.grouped

Tokens go to experts as a router that prefers a few sends them: one expert has none. ``sqnr_db``: O2, and blocks of
(1, 128) for all operands; they have to reach what a single linear layer reaches. ``control``: one expert's weights
2^-17 times the others', under a scale for each expert as here and under one for all. ``time``: medians in turns in one
process, amax histories full and weights cast in each, as in a step of one micro-batch; on a CPU FP8 products are
emulated.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.products import TARGETS, sqnr_db
from benchmarks.result import parser, write
from msamp_like import amp, kernels
from msamp_like.formats import E4M3, WHOLE
from msamp_like.kernels import Operand
from msamp_like.nn import GroupedLinear
from msamp_like.policy import GEMM_ROLES, O2, Policy, Role
from msamp_like.tensor import ScalingTensor, real

HISTORY = 17
"""Steps after which delayed scaling has its history full."""


def ends(tokens: int, experts: int) -> Tensor:
    """Ragged groups: shares fall as 1 / rank, the third expert has none."""
    shares = 1.0 / torch.arange(1, experts + 1)
    shares[2] = 0
    made = (tokens * shares.cumsum(0) / shares.sum()).round().to(torch.int32)
    made[-1] = tokens
    return made


def layers(policy: Policy | str, sizes: tuple[int, int, int]) -> tuple[GroupedLinear, nn.ModuleDict]:
    torch.manual_seed(0)
    plain = nn.ModuleDict({"experts": GroupedLinear(*sizes)})
    model, _ = amp.initialize(copy.deepcopy(plain), None, level=policy, data_parallel=False)
    return plain["experts"], model  # type: ignore[return-value]


def accuracy(policy: Policy | str, sizes: tuple[int, int, int], tokens: int) -> dict[str, float]:
    plain, model = layers(policy, sizes)
    low: Any = model["experts"]
    x, y = (torch.randn(tokens, sizes[1], generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x.requires_grad_(), y.requires_grad_()
    grad, offsets = torch.randn(tokens, sizes[2]), ends(tokens, sizes[0])
    outputs = plain(x, offsets), low(y, offsets)
    for output in outputs:
        output.backward(grad)
    pairs: dict[str, tuple[Any, Any]] = {"output": outputs, "grad_input": (x.grad, y.grad)}
    pairs["grad_weight"] = plain.weight.grad, real(low.weight.grad)
    return {name: round(sqnr_db(a.detach(), b.detach()), 2) for name, (a, b) in pairs.items()}


def control(sizes: tuple[int, int, int], tokens: int) -> dict[str, float]:
    """SQNR of the outputs of an expert with small weights."""
    plain, _ = layers("O2", sizes)
    offsets = ends(tokens, sizes[0])
    weight = plain.weight.detach().clone()
    weight[1] *= 2.0**-17
    x = torch.randn(tokens, sizes[1])
    start, stop = offsets[:2].tolist()
    exact, found = x[start:stop] @ weight[1].t(), {}
    inputs = Operand(*kernels.quantize_current(x, E4M3, WHOLE)[:2], WHOLE)
    for name, block in (("a scale an expert", (sizes[2], -1)), ("one scale", WHOLE)):
        stored = Operand(*kernels.quantize_current(weight, E4M3, block)[:2], block)
        product = kernels.grouped_matmul(inputs, stored, offsets, "nt", torch.float32)
        found[name] = round(sqnr_db(exact, product[start:stop]), 2)
    return found


def warm(sizes: tuple[int, int, int], x: Tensor, grad: Tensor, offsets: Tensor) -> GroupedLinear:
    """The layer at O2, its amax histories full: before that a delayed scale is taken from the tensor at hand."""
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"experts": GroupedLinear(*sizes)})
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer = amp.initialize(model, still, level="O2", data_parallel=False)
    for _ in range(HISTORY):
        model["experts"](x.clone().requires_grad_(), offsets).backward(grad)
        optimizer.step()
        optimizer.zero_grad()
    layer: GroupedLinear = model["experts"]
    return layer


def timed(sizes: tuple[int, int, int], tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of forward and backward: FP8 (O2), BF16 in the same code (O0), and torch's own grouped product."""
    offsets = ends(tokens, sizes[0])
    x, grad = (torch.randn(tokens, width).bfloat16() for width in sizes[1:])
    runs: dict[str, Any] = {"O2": warm(sizes, x, grad, offsets), "O0": layers("O0", sizes)[1]["experts"]}
    runs["torch"] = layers("O0", sizes)[0].bfloat16()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, layer in runs.items():
            layer.zero_grad()
            if isinstance(layer.weight, ScalingTensor):
                layer.weight.drop_casts()
            started = time.perf_counter()
            layer(x.clone().requires_grad_(), offsets).backward(grad)
            times[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: round(statistics.median(t[1:]), 2) for name, t in times.items()}
    ratios = {f"o2_over_{name}": round(medians["O2"] / medians[name], 3) for name in ("O0", "torch")}
    return {"ms": medians, **ratios}


def main() -> None:
    options = parser(__doc__, "docs/results/grouped.json")
    for name, default in (("experts", 8), ("width", 512), ("tokens", 4096), ("repeats", 5)):
        options.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    arguments = options.parse_args()
    sizes = arguments.experts, arguments.width, 2 * arguments.width
    blocks = {role: replace(O2[role], block=(1, 128), history=0) for role in (*GEMM_ROLES, Role.GRAD_WEIGHT)}
    policies: dict[str, Policy | str] = {"O2": O2, "blocks of (1, 128)": replace(O2, rules={**O2.rules, **blocks})}
    figures: dict[str, Any] = {
        "sizes": {"experts": sizes[0], "in": sizes[1], "out": sizes[2], "tokens": arguments.tokens},
        "sqnr_db": {name: accuracy(policy, sizes, arguments.tokens) for name, policy in policies.items()},
        "control_db": control(sizes, arguments.tokens),
        "time": timed(sizes, arguments.tokens, arguments.repeats),
    }
    for name, value in figures.items():
        print(name, value)
    found = [*figures["sqnr_db"].values(), {"output": figures["control_db"]["a scale an expert"]}]
    reached = all(row[name] >= TARGETS[name] for row in found for name in row)
    control_fails = figures["control_db"]["one scale"] < TARGETS["output"]
    write(arguments.out, {**figures, "targets_db": TARGETS, "reached": reached, "control_fails": control_fails})


if __name__ == "__main__":
    main()
