"""The exchanges of tensor and sequence parallelism as differentiable functions, in pairs that undo each other.

Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022,
https://arxiv.org/abs/2205.05198: between the products that are split over ranks, activations are split along the
sequence, so that norms and additions are not done on every rank. What enters a split product is gathered, what leaves
it is a partial sum, reduced and scattered; plain tensor parallelism (Shoeybi et al., "Megatron-LM", 2019,
https://arxiv.org/abs/1909.08053) keeps whole sequences and reduces everywhere.

    function   forward          backward         used
    copy       itself           all-reduce       before a split product, whole sequences
    reduce     all-reduce       itself           after one
    gather     all-gather       reduce-scatter   before a split product, split sequences
    scatter    reduce-scatter   all-gather       after one
    split      own part         all-gather       where a region of split sequences begins: all ranks hold ``x``
    join       all-gather       own part         where it ends and all ranks go on alike

Both directions travel as the route's rule says. :mod:`.overlap` has gather and scatter in one with the products beside
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from msamp_like.comm import activations
from msamp_like.comm.group import CountedGroup
from msamp_like.policy import Rule

SEQUENCE_DIM = -2
"""Activations are (..., T, C)."""


class _Travel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Exchange, back: Exchange, route: Route) -> Tensor:  # type: ignore[override]
        ctx.back, ctx.route = back, route
        return there(x, route, f"{route.label}/forward")

    @staticmethod
    @once_differentiable  # the casts have no second derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.back(grad, ctx.route, f"{ctx.route.label}/backward"), None, None, None


def uncompiled() -> Callable[..., Tensor]:
    """What every exchange below runs in, outside of compiled graphs: a collective and the count of its bytes belong to
    none. Not made at import, for the compiler behind it takes longer to import than the whole of this package."""
    return torch.compiler.disable(_Travel.apply)


@dataclass(frozen=True, kw_only=True)
class Route:
    """How a tensor travels: over which ranks, under which rule (None: as it is), along which dim, by which name.

    ``travel`` is :func:`uncompiled`'s, made once for all routes of a model.
    """

    group: CountedGroup
    rule: Rule | None
    label: str
    dim: int = SEQUENCE_DIM
    travel: Callable[..., Tensor] = field(default_factory=uncompiled)


Exchange = Callable[[Tensor, Route, str], Tensor]


def copy(x: Tensor, route: Route) -> Tensor:
    """``x``, which all ranks hold; its gradient is the sum of theirs."""
    return route.travel(x, _itself, _all_reduce, route)


def reduce(x: Tensor, route: Route) -> Tensor:
    """The sum of all ranks' ``x``; its gradient, which all ranks hold, goes to each."""
    return route.travel(x, _all_reduce, _itself, route)


def gather(x: Tensor, route: Route) -> Tensor:
    """Every rank's part side by side; the gradient is this rank's part of the sum of theirs."""
    return route.travel(x, _all_gather, _reduce_scatter, route)


def scatter(x: Tensor, route: Route) -> Tensor:
    """This rank's part of the sum of all ranks' ``x``; raises ValueError where the dim does not divide by the ranks."""
    check_divides(x, route)
    return route.travel(x, _reduce_scatter, _all_gather, route)


def split(x: Tensor, route: Route) -> Tensor:
    """This rank's part of ``x``, which all ranks hold; raises ValueError where the dim does not divide."""
    check_divides(x, route)
    return route.travel(x, _own_part, _all_gather, route)


def join(x: Tensor, route: Route) -> Tensor:
    """Every rank's part side by side, for ranks that go on alike: the gradient is this rank's part of its own."""
    return route.travel(x, _all_gather, _own_part, route)


def check_divides(x: Tensor, route: Route) -> None:
    """Raises ValueError unless the route's dim of ``x`` divides by its ranks."""
    if x.shape[route.dim] % route.group.world:
        raise ValueError(
            f"a sequence must divide by the {route.group.world} ranks of axis {route.group.axis!r}, got "
            f"{x.shape[route.dim]} positions at {route.label!r}; pad the batch, or use sequence=False"
        )


def _itself(x: Tensor, route: Route, label: str) -> Tensor:
    return x.view_as(x)


def _all_reduce(x: Tensor, route: Route, label: str) -> Tensor:
    return activations.all_reduce(x, route.rule, route.group, label)


def _all_gather(x: Tensor, route: Route, label: str) -> Tensor:
    return activations.all_gather(x, route.dim, route.rule, route.group, label)


def _reduce_scatter(x: Tensor, route: Route, label: str) -> Tensor:
    return activations.reduce_scatter(x, route.dim, route.rule, route.group, label)


def _own_part(x: Tensor, route: Route, label: str) -> Tensor:
    return activations.own_part(x, route.dim, route.group)
