"""What FP8-LM's models send in a step: parameters by kind from the presets, and bytes an element by scheme.

Models, batches and published figures: Peng et al., "FP8-LM: Training FP8 Large Language Models", 2023,
https://arxiv.org/abs/2310.18313, tables 1, 5 and 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from msamp_like.models.gpt import GPT, PRESETS

GIB = 2**30
SCALE_BYTES = 4
BLOCK = 128
"""Elements that share a scale in what sequence parallelism exchanges (the rule of PARTIAL_OUTPUT at O3)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is cut (table 5), and the sequences of one micro-batch."""

    preset: str
    tensor: int
    pipeline: int
    micro_batch: int

    @property
    def layers(self) -> int:
        """Of one pipeline stage."""
        return PRESETS[self.preset].num_layers // self.pipeline


PLANS = {
    "7B": Plan(preset="7B", tensor=1, pipeline=1, micro_batch=2),
    "13B": Plan(preset="13B", tensor=2, pipeline=1, micro_batch=2),
    "175B": Plan(preset="175B", tensor=8, pipeline=4, micro_batch=1),
}


@cache
def parameters(preset: str) -> Mapping[str, int]:
    """Parameters: ``matrices`` of the layers, the embedding ``tables`` (a tied head is one with it), ``vectors``; and
    ``tensors``, how many matrices."""
    with torch.device("meta"):
        model = GPT(PRESETS[preset])
    kinds = {"matrices": 0, "tables": 0, "vectors": 0, "tensors": 0}
    for name, parameter in model.named_parameters():
        kind = "vectors" if parameter.dim() == 1 else "matrices" if name.startswith("blocks.") else "tables"
        kinds[kind] += parameter.numel()
        kinds["tensors"] += kind == "matrices"
    return kinds


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Bytes an element of weights gathered and gradients scattered, by kind of parameter, and the way they take.

    ``way`` is of the scatter: ring, flat, forwarded or summed; weights are gathered in a ring. ``partial`` is the bytes
    of an element between nodes, for summed. ``scales`` says whether a reduction over ranks settles them.
    """

    gather: Mapping[str, float]
    scatter: Mapping[str, float]
    way: str = "ring"
    partial: float = 0.0
    scales: bool = True


def _kinds(matrices: float, tables: float, vectors: float) -> dict[str, float]:
    return {"matrices": matrices, "tables": tables, "vectors": vectors}


_OURS = {"gather": _kinds(1, 2, 4), "scatter": _kinds(1, 1, 4)}
SCHEMES = {
    "bf16_fp32": Scheme(gather=_kinds(2, 2, 2), scatter=_kinds(4, 4, 4), scales=False),
    "bf16": Scheme(gather=_kinds(2, 2, 2), scatter=_kinds(2, 2, 2), scales=False),
    # table 5 fits only if what is no Linear inside a layer keeps 2 + 4 bytes: see the cross-check
    "fp8_lm": Scheme(gather=_kinds(1, 2, 2), scatter=_kinds(1, 4, 4)),
    "flat": Scheme(**_OURS, way="flat"),
    "forwarded": Scheme(**_OURS, way="forwarded"),
    "summed_bf16": Scheme(**_OURS, way="summed", partial=2.0),
    "summed_e4m3": Scheme(**_OURS, way="summed", partial=1 + SCALE_BYTES / BLOCK),
}


def volume(plan: Plan, bytes_of: Mapping[str, float]) -> float:
    """Bytes of one rank's whole buffer: the mean pipeline stage, cut by tensor parallelism."""
    counts = parameters(plan.preset)
    return sum(counts[kind] * size for kind, size in bytes_of.items()) / (plan.tensor * plan.pipeline)


# --- sequence parallelism -------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "bf16": (2.0, 2.0),
    "fp8_lm": (1.0, 2.0),
    "ours": (1 + SCALE_BYTES / BLOCK, 1 + SCALE_BYTES / BLOCK),
}
"""Bytes an element of what is gathered and of what is reduced and scattered."""

GATHERS, SCATTERS = 4, 4
"""A layer's, forward and backward: attention and MLP gather once and scatter once each, and backward mirrors both."""
PUBLISHED_GATHERS, PUBLISHED_SCATTERS = 4, 2
"""The counts under which table 7's bytes come out; the paper does not say what it counted."""


def activation_bytes(plan: Plan, scheme: str, gathers: int = GATHERS, scatters: int = SCATTERS) -> float:
    """Bytes that one rank sends in one micro-batch for tensor and sequence parallelism."""
    config, (gather, scatter) = PRESETS[plan.preset], ACTIVATIONS[scheme]
    elements = plan.micro_batch * config.context * config.dim * (plan.tensor - 1) / plan.tensor
    return plan.layers * elements * (gathers * gather + scatters * scatter)


# --- the paper's own figures ----------------------------------------------------------------------------------------

PUBLISHED: dict[str, dict[str, Any]] = {
    "7B": {"ranks": 32, "bf16": 37.2, "fp8": 13.9, "samples": (159.2, 219.8), "rate": (0.101, 0.079), "batch": 2048},
    "13B": {"ranks": 16, "bf16": 34.3, "fp8": 12.4, "samples": (79.3, 109.5), "rate": (0.111, 0.039), "batch": 2048},
    "175B": {"ranks": 4, "bf16": 23.4, "fp8": 8.2, "samples": (22.4, 27.1), "rate": (0.088, 0.025), "batch": 512},
}
"""Table 5: data-parallel ranks, GB of weight communication, samples/s and share of the step, BF16 and FP8 at one
micro-batch; and sequences a batch, from the tokens of table 1."""

PUBLISHED_ACTIVATIONS = {"13B": {"bf16": 4.7, "fp8_lm": 3.1}, "175B": {"bf16": 5.9, "fp8_lm": 3.9}}
"""Table 7, GB."""


def cross_check() -> dict[str, Any]:
    """Our bytes beside the paper's, in GiB, of the pipeline stage that holds the table; the head is a table of its own
    there. ``error`` is ours over theirs, less 1."""
    rows: dict[str, Any] = {"weights": {}, "activations": {}}
    for name, published in PUBLISHED.items():
        plan, counts, ranks = PLANS[name], parameters(name), published["ranks"]
        tables = counts["tables"] if plan.pipeline > 1 else 2 * counts["tables"]
        inside = (counts["matrices"] + counts["vectors"]) / plan.pipeline
        share = (ranks - 1) / ranks / plan.tensor / GIB
        ours = {
            "bf16": 6 * (inside + tables) * share,
            "fp8": (2 * inside + 6 * tables) * share,
            "fp8_tables_too": 2 * (inside + tables) * share,
        }
        rows["weights"][name] = {
            kind: _beside(ours[kind], published[kind.removesuffix("_tables_too")]) for kind in ours
        }
    for name, kinds in PUBLISHED_ACTIVATIONS.items():
        for kind, gib in kinds.items():
            ours_gib = activation_bytes(PLANS[name], kind, PUBLISHED_GATHERS, PUBLISHED_SCATTERS) / GIB
            rows["activations"][f"{name} {kind}"] = _beside(ours_gib, gib)
    return rows


def _beside(ours: float, published: float) -> dict[str, float]:
    return {"ours": round(ours, 2), "published": published, "error": round(ours / published - 1, 4)}
