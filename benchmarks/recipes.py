"""What each recipe gains and costs: one linear layer, forward and backward.

    python -m benchmarks.recipes

1024 x 1024, 1024 tokens, BF16. For each recipe, for level O0 and for torch's own BF16 layer:

    ms            forward and backward, the median of repeats in which all take turns, and its ratio to torch's BF16;
                  the weight is cast in each, as in a step of one micro-batch
    kept          bytes an element of the input that backward keeps, scales included
    SQNR          dB of output, grad_input and grad_weight, of tokens of N(0, 1), and of the smallest eighth of tokens
                  whose sizes spread over 2^-12 to 2^12

The limit is the three products alone, in BF16. On a CPU an FP8 product is that product after decoding, so no recipe can
be faster than O0 there; what finer scales and the second quantization add is what shows. Delayed scales have a full
history, of other data of the same distribution.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.products import TARGETS, sqnr_db
from benchmarks.result import parser, write
from msamp_like import amp
from msamp_like.formats import BF16
from msamp_like.policy import O2, RECIPES, Role, Rule
from msamp_like.tensor import ScalingTensor, real

HISTORY = 17
"""Steps after which delayed scaling has its history full."""
MOST_KEPT = {"mxfp8": 1 + 4 / 32}
"""Bytes an element that backward may keep of the input: FP8 and a scale for each 32; each 128 where it is not here."""


def layer(recipe: str, size: int, sizes: Tensor) -> nn.Module:
    """torch's layer, that of O0, or one of O2 with a recipe, its amax history full of tokens of these sizes;
    the same weights."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(size, size, bias=False, dtype=torch.bfloat16))
    if recipe == "torch":
        return model
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    if recipe == "O0":
        return amp.initialize(model, still, level="O0")[0]
    level = O2.with_rule(Role.GRAD_WEIGHT, Rule(format=BF16))  # the product, before it is rounded to be stored
    model, optimizer = amp.initialize(model, still, level=level, recipe=recipe)
    for _ in range(HISTORY if recipe == "delayed" else 0):
        once(model, drawn(sizes, size), drawn(sizes, size))
        optimizer.step()
    return model


def drawn(sizes: Tensor, size: int) -> Tensor:
    """Tokens of N(0, 1) times their sizes."""
    return (torch.randn(len(sizes), size) * sizes.unsqueeze(1)).bfloat16()


def once(model: Any, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    """Output and both gradients."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    if isinstance(model[0].weight, ScalingTensor):
        model[0].weight.drop_casts()
    output = model(x)
    output.backward(grad_output)
    return [output.detach(), x.grad, real(model[0].weight.grad)]  # type: ignore[list-item]


def kept_bytes(model: nn.Module, x: Tensor) -> float:
    """Bytes an element of the input; the weight's own are not in it."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        model(x[: len(x) // 2].detach().requires_grad_())
        half = sum(t.nbytes for t in found)
        found.clear()
        model(x.detach().requires_grad_())
        whole = sum(t.nbytes for t in found)
    return 2 * (whole - half) / x.numel()


def quality(recipe: str, size: int, tokens: int) -> dict[str, list[float]]:
    """dB of the three products, on even tokens and on the smallest of uneven ones."""
    rows = {}
    for name, sizes in (("even", torch.ones(tokens)), ("uneven", torch.exp2(torch.linspace(-12, 12, tokens)))):
        model = layer(recipe, size, sizes)
        stored: Any = model[0].weight
        weight = real(stored.detach(), torch.float64)
        x, grad_output = drawn(sizes, size), drawn(sizes, size)
        exact = [x.double() @ weight.t(), grad_output.double() @ weight, grad_output.double().t() @ x.double()]
        part = slice(None) if name == "even" else slice(tokens // 8)
        got = once(model, x, grad_output)
        pairs = [(exact[0][part], got[0][part]), (exact[1][part], got[1][part]), (exact[2], got[2])]
        rows[name] = [round(sqnr_db(a, b), 1) for a, b in pairs]
    return rows


def times(names: list[str], size: int, tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds of each, and of the products alone as ``limit``; all take turns."""
    x, grad_output = torch.randn(tokens, size).bfloat16(), torch.randn(tokens, size).bfloat16()
    weight = torch.randn(size, size).bfloat16()
    models = {name: layer(name, size, torch.ones(tokens)) for name in names}

    def limit() -> None:
        x @ weight.t(), grad_output @ weight, grad_output.t() @ x

    jobs: dict[str, Callable[[], Any]] = {n: (lambda m=m: once(m, x, grad_output)) for n, m in models.items()}  # type: ignore[misc]
    jobs["limit"] = limit
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if repeat:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    """Measure and write."""
    made = parser(__doc__, "docs/results/recipes.json")
    made.add_argument("--size", type=int, default=1024, help="features in and out (default: %(default)s)")
    made.add_argument("--tokens", type=int, default=1024, help="rows of the input (default: %(default)s)")
    made.add_argument("--repeats", type=int, default=15, help="turns of each (default: %(default)s)")
    arguments = made.parse_args()
    size, tokens = arguments.size, arguments.tokens
    names = ["torch", "O0", *RECIPES]
    seconds = times(names, size, tokens, arguments.repeats)
    rows = []
    for name in names:
        x = torch.randn(tokens, size).bfloat16()
        row = {
            "recipe": name,
            "ms": round(1e3 * seconds[name], 2),
            "of torch": round(seconds[name] / seconds["torch"], 2),
        }
        row |= {"kept": round(kept_bytes(layer(name, size, torch.ones(tokens)), x), 3), **quality(name, size, tokens)}
        rows.append(row)
        print("  ".join(f"{key}: {value}" for key, value in row.items()))
    ours = [row for row in rows if row["recipe"] in RECIPES]
    close = all(db >= least for row in ours for db, least in zip(row["even"], TARGETS.values(), strict=True))
    small = all(row["kept"] <= MOST_KEPT.get(row["recipe"], 1 + 4 / 128) for row in ours)
    figures = {"size": size, "tokens": tokens, "limit ms": round(1e3 * seconds["limit"], 2), "rows": rows}
    write(arguments.out, {**figures, "targets_db": TARGETS, "reached": close and small})


if __name__ == "__main__":
    main()
