"""Split products beside their exchanges: one part of a sequence is multiplied while another travels.

Where sequences are split, what enters a product is gathered from all ranks and what leaves it is a sum over them. Here
the exchange and the product are one function, and the product is taken part by part:

    function         forward                                  backward
    gather_linear    own part first, others as they arrive    grad_weight while the sum of grad_input travels
    linear_scatter   others' parts first, each sent at once   grad_input part by part, as grad_output arrives

Wang et al., "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning Models", 2023,
https://doi.org/10.1145/3567955.3567959, split both in this way. There are no streams of ours: every exchange is issued
before the product it runs beside; NCCL has a stream of its own, which keeps the buffers until the work is waited for,
and gloo has threads.

Each value is that of the exchange and the product one after the other. A tensor is quantized with the scale of the
whole, so where that comes from the tensor at hand (current scaling, or a history that is not full), what is gathered is
multiplied when all of it has arrived. Only the sum inside a product may end in another last bit, if the device takes it
in another order for fewer rows. What is not finite flags the products of its own part.

Left out: products with plain weights, those whose operands have a scale for each direction (recipes rowwise, blockwise
and mxfp8) or a factor a channel, and those whose input a module around them has gathered for several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from msamp_like.comm import activations
from msamp_like.comm.collectives import finish
from msamp_like.comm.sequence_parallel import SEQUENCE_DIM, Route, check_divides
from msamp_like.kernels import Operand
from msamp_like.nn.functional import LinearGemm, check_features, product_dtype
from msamp_like.scaling import Scaler
from msamp_like.tensor import ScalingTensor, unscaled


class Overlap:
    """The two functions outside of compiled graphs, for the reason that :func:`.sequence_parallel.uncompiled` has."""

    def __init__(self) -> None:
        self._gather_linear = torch.compiler.disable(_GatherLinear.apply)
        self._linear_scatter = torch.compiler.disable(_LinearScatter.apply)

    def gather_linear(self, x: Tensor, weight: Tensor, gemm: LinearGemm, route: Route) -> Tensor:
        """``gather(x) @ weight^T``: x (..., T / ranks, in_features) to (..., T, out_features)."""
        check_features(x, weight)
        dtype = product_dtype(x)
        record = torch.is_grad_enabled() and gemm.training
        return self._gather_linear(x.to(dtype), weight, gemm, route, record)  # type: ignore[no-any-return]

    def linear_scatter(self, x: Tensor, weight: Tensor, gemm: LinearGemm, route: Route) -> Tensor:
        """``scatter(x @ weight^T)``: x (..., T, in_features) to (..., T / ranks, out_features)."""
        check_features(x, weight)
        check_divides(x, route)
        record = torch.is_grad_enabled() and gemm.training
        return self._linear_scatter(x, weight, gemm, route, product_dtype(x), record)  # type: ignore[no-any-return]


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: ScalingTensor, gemm: LinearGemm, route: Route, record: bool
    ) -> Tensor:
        arriving = activations.gather_parts(x, route.rule, route.group, f"{route.label}/forward")
        stored_weight = gemm.weight_operand(weight)
        stored, output = _multiplied(
            arriving, gemm.input, record, x.shape, route, lambda part: gemm.output(part, stored_weight, x.dtype)
        )
        _save(ctx, stored, stored_weight, weight.dtype)
        ctx.gemm, ctx.route, ctx.record = gemm, route, record
        ctx.dtype = x.dtype
        return output

    @staticmethod
    @once_differentiable  # as of the product alone
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gemm, route = ctx.gemm, ctx.route
        stored_input, stored_weight = _saved(ctx)
        with record_function(f"{gemm.name}/quantize grad_output"):
            stored = gemm.grad_output.quantize(_rows(grad_output), ctx.record)
        grad_input = grad_weight = travelling = None
        if stored_weight is not None:
            whole = gemm.grad_input(stored, stored_weight, ctx.dtype).view(*grad_output.shape[:-1], -1)
            travelling = activations.reduce_scatter_steps(
                whole, SEQUENCE_DIM, route.rule, route.group, f"{route.label}/backward"
            )
            next(travelling)
        if stored_input is not None:
            grad_weight = unscaled(gemm.grad_weight(stored, stored_input), ctx.weight_dtype)
        if travelling is not None:
            grad_input = finish(travelling)
        return grad_input, grad_weight, None, None, None


class _LinearScatter(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: ScalingTensor,
        gemm: LinearGemm,
        route: Route,
        dtype: torch.dtype,
        record: bool,
    ) -> Tensor:
        with record_function(f"{gemm.name}/quantize input and weight"):
            stored = gemm.input.quantize(_rows(x), record)
            stored_weight = gemm.weight_operand(weight)
        _save(ctx, stored, stored_weight, weight.dtype)
        ctx.gemm, ctx.route, ctx.record = gemm, route, record
        ctx.dtypes = dtype, x.dtype
        world, label = route.group.world, f"{route.label}/forward"
        if stored.scale_inv.numel() == 1:

            def make(rank: int) -> Tensor:
                return gemm.output(_part(stored, x.shape, rank, world), stored_weight, dtype)

        else:  # a block of several rows may belong to two ranks
            whole = gemm.output(stored, stored_weight, dtype)

            def make(rank: int) -> Tensor:
                return _rows_of(whole, x.shape, rank, world)

        total = activations.reduce_scatter_parts(make, route.rule, route.group, label)
        return total.view(*x.shape[:-2], -1, weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gemm, route = ctx.gemm, ctx.route
        dtype, input_dtype = ctx.dtypes
        stored_input, stored_weight = _saved(ctx)
        product = grad_weight = None
        if stored_weight is not None:

            def product(part: Operand) -> Tensor:
                return gemm.grad_input(part, stored_weight, dtype).to(input_dtype)

        arriving = activations.gather_parts(grad_output, route.rule, route.group, f"{route.label}/backward")
        stored, grad_input = _multiplied(arriving, gemm.grad_output, ctx.record, grad_output.shape, route, product)
        if stored_input is not None:
            grad_weight = unscaled(gemm.grad_weight(stored, stored_input), ctx.weight_dtype)
        return grad_input, grad_weight, None, None, None, None


# --- parts ----------------------------------------------------------------------------------------------------------


def _multiplied(
    arriving: Iterator[tuple[int, Tensor]],
    scaler: Scaler,
    record: bool,
    shape: torch.Size,
    route: Route,
    product: Callable[[Operand], Tensor] | None,
) -> tuple[Operand, Any]:
    """Parts of ``shape`` that arrive, side by side as ``scaler`` stores them, and their product if one is asked for.

    Part by part where that is the same, else of all when all are there.
    """
    world, stored, products = route.group.world, {}, {}
    if not scaler.by_rows:
        parts = dict(arriving)
        with record_function(f"{route.label}/quantize"):
            whole = scaler.quantize(_side_by_side([parts[rank] for rank in range(world)], shape), record)
        return whole, None if product is None else _unflattened(product(whole), shape)
    for rank, part in arriving:
        with record_function(f"{route.label}/quantize"):
            stored[rank] = scaler.quantize(_rows(part), record)
        if product is not None:
            products[rank] = product(stored[rank])
    whole = _joined([stored[rank] for rank in range(world)], shape)
    if product is None:
        return whole, None
    return whole, _unflattened(_side_by_side([products[rank] for rank in range(world)], shape), shape)


def _joined(parts: Sequence[Operand], shape: torch.Size) -> Operand:
    """Parts that were quantized apart under one scale; +inf if that of one is."""
    payload = _side_by_side([part.payload.view(torch.uint8) for part in parts], shape).view(parts[0].payload.dtype)
    return Operand(payload, torch.stack([part.scale_inv for part in parts]).amax(0), parts[0].block)


def _part(stored: Operand, shape: torch.Size, rank: int, world: int) -> Operand:
    """A rank's part of the sequences of a stored tensor that is (..., T, C), under one scale."""
    payload = _rows_of(stored.payload.view(torch.uint8), shape, rank, world).view(stored.payload.dtype)
    return Operand(payload, stored.scale_inv, stored.block)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _rows_of(rows: Tensor, shape: torch.Size, rank: int, world: int) -> Tensor:
    """The rows of a rank's part of the sequences, of all rows of (..., T, any)."""
    return _rows(rows.view(math.prod(shape[:-2]), shape[-2], -1).chunk(world, 1)[rank])


def _side_by_side(parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """The rows of parts of ``shape`` (..., T / ranks, any), as rows of (..., T, any)."""
    return _rows(torch.cat([part.view(math.prod(shape[:-2]), shape[-2], -1) for part in parts], 1))


def _unflattened(rows: Tensor, shape: torch.Size) -> Tensor:
    """All rows as (..., T, columns), where a part is ``shape``."""
    return rows.view(*shape[:-2], -1, rows.shape[-1])


# --- what backward reads --------------------------------------------------------------------------------------------


def _save(ctx: Any, input: Operand, weight: Operand, weight_dtype: torch.dtype) -> None:
    """Keep what each gradient that is asked for is a product of: one byte an element."""
    needs_grad_input, needs_grad_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        *(input[:2] if needs_grad_weight else (None, None)), *(weight[:2] if needs_grad_input else (None, None))
    )
    ctx.blocks, ctx.weight_dtype = (input.block, weight.block), weight_dtype


def _saved(ctx: Any) -> tuple[Operand | None, Operand | None]:
    """The input for grad_weight, the weight for grad_input."""
    tensors = ctx.saved_tensors
    input, weight = (
        None if payload is None else Operand(payload, scale_inv, block)
        for payload, scale_inv, block in zip(tensors[::2], tensors[1::2], ctx.blocks, strict=True)
    )
    return input, weight
