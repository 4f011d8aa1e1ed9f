"""Layers whose weight is split over ranks, and the context that the layers of one model share.

Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019,
https://arxiv.org/abs/1909.08053:

    column-parallel   a rank has some output features:  Y_r = X W_r^T          X whole, Y split
    row-parallel      a rank has some input features:   Y = sum_r X_r W_r^T    X split, Y a partial sum on each rank

Each is its torch base with another forward, made of a plain layer by :func:`.tensor_parallel.parallelize`. Products
read the weight through ``F.linear`` alone, so the conversion of amp takes the weight and leaves the layer.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msamp_like.comm import sequence_parallel
from msamp_like.comm.group import CountedGroup
from msamp_like.comm.overlap import Overlap
from msamp_like.comm.sequence_parallel import Route
from msamp_like.nn import LinearGemm, ReadsAsBase
from msamp_like.policy import Rule
from msamp_like.tensor import ScalingTensor


class Shard(NamedTuple):
    """How a tensor is split over ranks: each of ``parts`` equal pieces of ``dim`` separately."""

    dim: int
    parts: int

    def of(self, whole: Tensor, rank: int, world: int) -> Tensor:
        """One rank's share, a tensor of its own."""
        pieces = [piece.chunk(world, self.dim)[rank] for piece in whole.chunk(self.parts, self.dim)]
        return torch.cat(pieces, self.dim)

    def whole(self, shards: Tensor) -> Tensor:
        """What all ranks' shares, (world, ...), make together."""
        pieces = shards.unflatten(self.dim + 1, (self.parts, -1)).movedim(0, self.dim + 1)
        return pieces.flatten(self.dim, self.dim + 2)


class Context:
    """The ranks that share a model's products, what its activations travel as, and who sees only a part.

    ``rule`` None means: as they are. With ``overlap`` exchanges run beside products. ``partial`` are replicated modules
    whose gradients are a rank's share of a sum. A deep copy of a model has a context of its own, over the same group.
    """

    def __init__(self, group: CountedGroup, *, sequence: bool, overlap: bool = False) -> None:
        self.group = group
        self.sequence = sequence
        self.overlap = Overlap() if overlap else None
        self.rule: Rule | None = None
        self.partial: list[nn.Module] = []
        self._travel = sequence_parallel.uncompiled()

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        made = memo[id(self)] = Context(self.group, sequence=self.sequence, overlap=self.overlap is not None)
        made.rule = self.rule
        made.partial = copy.deepcopy(self.partial, memo)
        return made

    def route(self, label: str) -> Route:
        return Route(group=self.group, rule=self.rule, label=label, travel=self._travel)

    def enter(self, x: Tensor, label: str) -> Tensor:
        """``x`` as every rank's split products read it: whole sequences."""
        device = x.device.type
        if torch.is_autocast_enabled(device):  # what the product would do with it, before it is gathered and kept
            x = x.to(torch.get_autocast_dtype(device))
        route = self.route(label)
        return sequence_parallel.gather(x, route) if self.sequence else sequence_parallel.copy(x, route)

    def leave(self, x: Tensor, label: str) -> Tensor:
        """The sum of every rank's ``x``; under sequence parallelism this rank's part of the sequence."""
        route = self.route(label)
        return sequence_parallel.scatter(x, route) if self.sequence else sequence_parallel.reduce(x, route)

    def enter_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, label: str) -> Tensor:
        """``F.linear(enter(x), weight, bias)``, beside each other where overlap is on and the products allow."""
        gemm = self._by_parts(weight)
        if gemm is None or self.overlap is None:
            return F.linear(self.enter(x, label), weight, bias)
        output = self.overlap.gather_linear(x, weight, gemm, self.route(label))
        return output if bias is None else output + bias.to(output.dtype)

    def linear_leave(self, x: Tensor, weight: Tensor, label: str) -> Tensor:
        """``leave(F.linear(x, weight))``, likewise."""
        gemm = self._by_parts(weight)
        if gemm is None or self.overlap is None:
            return self.leave(F.linear(x, weight), label)
        return self.overlap.linear_scatter(x, weight, gemm, self.route(label))

    def _by_parts(self, weight: Tensor) -> LinearGemm | None:
        """What takes the products of a weight part by part, beside their exchanges."""
        gemm = weight.gemm if self.overlap is not None and isinstance(weight, ScalingTensor) else None
        return gemm if isinstance(gemm, LinearGemm) and gemm.by_parts else None


class Parallel:
    """Mixed into every layer that takes part in its context's exchanges under ``label``, its name in the model."""

    context: Context
    label: str

    def shards(self) -> dict[str, Shard]:
        """How each of its own parameters is split; one that is not named is the same on all ranks."""
        return {}


class ColumnLinear(Parallel, ReadsAsBase, nn.Linear):
    """``nn.Linear`` with some of the output features; ``parts`` projections lie in one weight, each split evenly."""

    parts: int
    enters: bool  # False where the parent module has gathered the input for several of them
    gather_output: bool

    def forward(self, input: Tensor) -> Tensor:
        """input (..., T or T / ranks, in_features) to (..., T, out_features of this rank, or of all)."""
        if self.enters:
            output = self.context.enter_linear(input, self.weight, self.bias, self.label)
        else:
            output = F.linear(input, self.weight, self.bias)
        if not self.gather_output:
            return output
        route = replace(self.context.route(f"{self.label}/output"), rule=None, dim=-1)
        return sequence_parallel.join(output, route)  # as it is: no sum, and a rounding would reach the loss

    def shards(self) -> dict[str, Shard]:
        return {"weight": Shard(0, self.parts), "bias": Shard(0, self.parts)}


class RowLinear(Parallel, ReadsAsBase, nn.Linear):
    """``nn.Linear`` with some of the input features; the bias, the same on all ranks, is added to the sum."""

    def forward(self, input: Tensor) -> Tensor:
        """input (..., T, in_features of this rank) to (..., T or T / ranks, out_features)."""
        output = self.context.linear_leave(input, self.weight, self.label)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def shards(self) -> dict[str, Shard]:
        return {"weight": Shard(1, 1)}


class EntersInput:
    """A forward pre-hook that gathers a module's input once, for the column-parallel layers inside of it."""

    def __init__(self, context: Context, label: str, argument: str) -> None:
        self.context = context
        self.label = label
        self.argument = argument

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _with_first(args, kwargs, self.argument, lambda x: self.context.enter(x, self.label))


class SplitsInput(EntersInput):
    """A forward pre-hook: what all ranks hold becomes this rank's part of the sequence."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        route = self.context.route(self.label)
        return _with_first(args, kwargs, self.argument, lambda x: sequence_parallel.split(x, route))


class JoinsOutput:
    """A forward hook: the parts of the sequence become the whole on all ranks, who go on alike."""

    def __init__(self, context: Context, label: str) -> None:
        self.context = context
        self.label = label

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return sequence_parallel.join(output, self.context.route(self.label))


def _with_first(args: tuple[Any, ...], kwargs: dict[str, Any], argument: str, change: Any) -> Any:
    """The arguments of a call with the first of them, or the named one, changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    if argument not in kwargs:
        raise ValueError(
            f"a module's input is its first argument or the one named {argument!r}, got {', '.join(kwargs) or 'none'}"
            "; name it in the plan: Enter(argument=...)"
        )
    return args, {**kwargs, argument: change(kwargs[argument])}
