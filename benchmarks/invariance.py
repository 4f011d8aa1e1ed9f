"""What another token, padding or another sequence of the batch may change in a forward pass, by recipe.

    python -m benchmarks.invariance

A scale that several tokens share lets one of them change how the others are rounded. A GPT is run twice, and what
should be equal is compared: "exact", to the bit, or the dB of SQNR that is left.

    causality     all tokens from the middle on are others, and what they send into every linear layer is 1e3 times
                  larger: the outputs before the middle
    padding       likewise behind sequences of different lengths: the outputs of what is no padding
    batch split   N sequences at once and one at a time, 1 x N and N x 1: the outputs; and the weights' gradients,
                  which are sums over all tokens, so that even O0 is not exact there

``current`` is the control that fails. ``delayed`` is exact within a step once its history is full, since its scale was
known before; until then it is ``current``. A product of other sizes may sum in another order: where O0, which has no
scale, is not exact either, its dB are the bound for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.result import parser, write
from msamp_like import amp
from msamp_like.models.gpt import GPT, PRESETS, GPTConfig
from msamp_like.policy import RECIPES
from msamp_like.tensor import real

OUTLIER = 1e3
BUILDS: Mapping[str, dict[str, Any]] = {
    "O0": {"level": "O0"},
    "delayed, history full": {"recipe": "delayed"},
    "delayed, history empty": {"recipe": "delayed"},
    **{name: {"recipe": name} for name in RECIPES if name != "delayed"},
}
SHARED = ("current", "delayed, history empty")
"""One scale for all tokens, from the tokens at hand: the controls, which have to fail."""


def build(name: str, config: GPTConfig) -> nn.Module:
    """A model of one of :data:`BUILDS`, the same weights for all."""
    torch.manual_seed(0)
    model = GPT(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    converted, optimizer = amp.initialize(model, optimizer, **BUILDS[name])
    for step in range(17 if name.endswith("full") else 0):
        converted(*[tokens(config, 4, step)] * 2)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return converted


def tokens(config: GPTConfig, sequences: int, seed: int) -> Tensor:
    """Random tokens (sequences, context)."""
    return torch.randint(
        0, config.vocab_size, (sequences, config.context), generator=torch.Generator().manual_seed(seed)
    )


@torch.no_grad()
def outputs(model: nn.Module, tokens_BT: Tensor, grown_BT: Tensor | None = None) -> Tensor:
    """Logits; what the tokens of ``grown_BT`` send into a linear layer is multiplied by :data:`OUTLIER`."""
    factor = None if grown_BT is None else torch.where(grown_BT, OUTLIER, 1.0).unsqueeze(-1)

    def grow(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * factor,)

    layers = [m for m in model.modules() if isinstance(m, nn.Linear)] if factor is not None else []
    hooks = [layer.register_forward_pre_hook(grow) for layer in layers]
    result = model(tokens_BT)
    for hook in hooks:
        hook.remove()
    return result


def causality(model: nn.Module, config: GPTConfig) -> float:
    """dB between the outputs of the first half under two second halves; inf where they are equal."""
    one, other = tokens(config, 4, 100), tokens(config, 4, 101)
    middle = config.context // 2
    other[:, :middle] = one[:, :middle]
    late = torch.arange(config.context).expand_as(one) >= middle
    return decibels(outputs(model, one)[:, :middle], outputs(model, other, late)[:, :middle])


def padding(model: nn.Module, config: GPTConfig) -> float:
    """dB between the outputs of what is no padding, behind which zeros or large values stand."""
    one, other = tokens(config, 4, 102), tokens(config, 4, 103)
    lengths = torch.tensor([config.context // 4 * n for n in (1, 2, 3, 4)]).unsqueeze(1)
    pad = torch.arange(config.context).expand_as(one) >= lengths
    first, second = torch.where(pad, 0, one), torch.where(pad, other, one)
    return decibels(outputs(model, first)[~pad], outputs(model, second, pad)[~pad])


def batch_split(model: nn.Module, config: GPTConfig) -> float:
    """dB of three sequences, between a batch in which a fourth has large values, and each alone."""
    batch = tokens(config, 4, 104)
    grown = torch.tensor([False, False, False, True]).unsqueeze(1).expand_as(batch)
    apart = [outputs(model, batch[i : i + 1]) for i in range(3)]
    return decibels(torch.cat(apart), outputs(model, batch, grown)[:3])


def gradient_split(model: nn.Module, config: GPTConfig) -> float:
    """dB between the matrices' gradients of a batch of four, and the sum of those of four micro-batches."""
    batch = tokens(config, 4, 105)

    def gradients(parts: list[Tensor]) -> Tensor:
        model.zero_grad()
        total: dict[str, Tensor] = {}
        for part in parts:
            (model(part[:, :-1], part[:, 1:])[1] / len(parts)).backward()
            for name, p in model.named_parameters():
                if p.dim() == 2:
                    total[name] = total.get(name, torch.zeros(())) + real(p.grad)
                p.grad = None
        return torch.cat([t.flatten() for t in total.values()])

    return decibels(gradients(list(batch.split(1))), gradients([batch]))


FORWARD: Mapping[str, Callable[[nn.Module, GPTConfig], float]] = {
    "causality": causality,
    "padding": padding,
    "batch split": batch_split,
}
MEASURES = {**FORWARD, "gradients, batch split": gradient_split}


def decibels(expected: Tensor, got: Tensor) -> float:
    """SQNR; inf where all bits are equal."""
    if torch.equal(expected, got):
        return math.inf
    return 20 * math.log10(float(expected.double().norm() / (got.double() - expected.double()).norm()))


def measure(config: GPTConfig) -> list[dict[str, Any]]:
    """A row a recipe: "exact", or dB."""
    rows = []
    for name in BUILDS:
        model = build(name, config).eval()
        found = {measure: function(model, config) for measure, function in MEASURES.items()}
        rows.append({"recipe": name, **{k: "exact" if math.isinf(v) else round(v, 1) for k, v in found.items()}})
        print("  ".join(f"{key}: {value}" for key, value in rows[-1].items()))
    return rows


def main() -> None:
    """Measure and write."""
    options = parser(__doc__, "docs/results/invariance.json")
    options.add_argument("--layers", type=int, default=4, help="of the preset tiny (default: %(default)s)")
    options.add_argument("--context", type=int, default=256, help="tokens of a sequence (default: %(default)s)")
    arguments = options.parse_args()
    config = replace(PRESETS["tiny"], num_layers=arguments.layers, context=arguments.context)
    rows = measure(config)
    exact = {row["recipe"]: all(row[name] == "exact" for name in FORWARD) for row in rows}
    figures = {
        "outlier": OUTLIER,
        "tokens": 4 * config.context,
        "rows": rows,
        "shared": list(SHARED),
        "reached": all(is_exact for name, is_exact in exact.items() if name not in SHARED),
        "control_fails": not any(exact[name] for name in SHARED),
    }
    write(arguments.out, figures)


if __name__ == "__main__":
    main()
