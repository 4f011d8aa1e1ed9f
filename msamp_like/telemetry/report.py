"""Proof that FP8 is on: every linear layer, in FP8 or not, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from msamp_like.nn.conversion import Plan
from msamp_like.nn.grouped import GroupedLinear
from msamp_like.policy import Policy, Role
from msamp_like.tensor import ScalingTensor


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer: ``product`` is "fp8", "bf16", "lookup" or "plain"; ``flops`` of a forward pass per token."""

    name: str
    kind: str
    product: str
    reason: str
    flops: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """Rows and the share of the linear layers' FLOPs and of the matrices' bytes that are in FP8 products.

    FLOPs are those of the linear layers, 2 * in_features * out_features a token, of grouped ones a row that reaches
    them; attention scores, convolutions and norms are outside of the count.
    """

    level: str
    rows: tuple[Row, ...]
    saved_activations: str = "as torch keeps them"

    @property
    def flops_share(self) -> float:
        """FP8 share of the linear layers' FLOPs, 0 to 1."""
        return _share(self.rows, "flops")

    @property
    def bytes_share(self) -> float:
        """FP8-product share of the bytes that the listed weights occupy, 0 to 1."""
        return _share(self.rows, "bytes")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        shares = {"flops_share": self.flops_share, "bytes_share": self.bytes_share}
        kept = {"saved_activations": self.saved_activations}
        return {"level": self.level, **shares, **kept, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=4)
        total = sum(row.flops for row in self.rows) or 1
        head = f"{'layer':<{width}}  {'product':<7}  {'FLOPs':>6}  {'bytes':>12}  why not FP8"
        lines = [
            f"{row.name:<{width}}  {row.product:<7}  {row.flops / total:>6.1%}  {row.bytes:>12,}  {row.reason}"
            for row in self.rows
        ]
        tail = (
            f"{self.level}: {self.flops_share:.1%} of the linear FLOPs and {self.bytes_share:.1%} of the bytes in FP8"
        )
        return "\n".join([head, *lines, tail, f"saved activations: {self.saved_activations}"])


def _share(rows: Sequence[Row], field: str) -> float:
    total = sum(getattr(row, field) for row in rows)
    return sum(getattr(row, field) for row in rows if row.product == "fp8") / total if total else 0.0


def make_report(policy: Policy, plans: Sequence[Plan]) -> Report:
    """The report of a conversion that followed ``plans``, or of one that would."""
    report = Report(level=policy.name, rows=tuple(_row(plan) for plan in plans))
    rule = policy[Role.SAVED_ACTIVATION]
    return replace(report, saved_activations=str(rule)) if rule.format.scaled else report


def _row(plan: Plan) -> Row:
    weights = _matrices(plan.module)
    lookup = isinstance(plan.module, (nn.Embedding, nn.EmbeddingBag))
    flops = 0 if lookup else 2 * sum(w.numel() for w in weights)
    if isinstance(plan.module, GroupedLinear):
        flops //= plan.module.num_experts  # a row goes through one of them
    stored = sum(w.stored_bytes if isinstance(w, ScalingTensor) else w.nbytes for w in weights)
    kind = type(plan.module).__name__
    return Row(name=plan.name, kind=kind, product=plan.product, reason=plan.reason, flops=flops, bytes=stored)


def _matrices(module: nn.Module) -> list[Tensor]:
    """What the module multiplies by: its ``weight``, which may be computed, or (attention) the matrices it owns."""
    weight = getattr(module, "weight", None)
    owned = [weight] if isinstance(weight, Tensor) else list(module.parameters(recurse=False))
    return [matrix for matrix in owned if matrix.ndim >= 2]
