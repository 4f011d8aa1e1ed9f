"""Grouped linear layers: the experts of a mixture, each with its own matrix, in one call.

    output      = input       @ weight[expert]^T        E4M3 x E4M3
    grad_input  = grad_output @ weight[expert]          E5M2 x E4M3
    grad_weight[expert] = grad_output^T @ input         E5M2 x E4M3, over the expert's rows

Rows (tokens) are sorted by expert; ``offsets``, int32 of shape (experts,), says where each expert's end. The router,
the sort and the weighting of what comes back are the model's, and so is a drop of tokens: none is dropped here.

:class:`GroupedLinear` is plain torch until ``amp`` converts its weight; a mixture in plain torch is this one class away
from FP8. Each expert has a scale of its own where the policy has one a weight, for experts that see few tokens move at
another pace. Inputs have the scales that the policy gives them: one for all rows, or each row its own.

Left out: biases, and experts on several ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from msamp_like import kernels
from msamp_like.formats import BF16, Block
from msamp_like.kernels import Operand
from msamp_like.nn.functional import LinearGemm
from msamp_like.nn.linear import ReadsAsBase
from msamp_like.policy import Policy, Role
from msamp_like.tensor import ScalingTensor, unscaled

_ALIGNED = 8
"""torch's grouped product takes rows of whole 16 bytes."""


class GroupedLinear(ReadsAsBase, nn.Module):
    """``num_experts`` linear layers of one shape; plain until ``amp.initialize`` converts it."""

    gemm: GroupedGemm

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(in_features), as ``nn.Linear`` has it."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, input: Tensor, offsets: Tensor) -> Tensor:
        """input (tokens, in_features), offsets (num_experts,) int32, to (tokens, out_features)."""
        return grouped_linear(input, self.weight, offsets)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, in_features={self.in_features}, out_features={self.out_features}"


class GroupedGemm(LinearGemm):
    """The rules and scalers of the products of one weight of shape (experts, out, in)."""

    def __init__(self, policy: Policy, name: str = "experts") -> None:
        super().__init__(policy, name)
        for role in (Role.INPUT, Role.GRAD_OUTPUT):
            if policy[role].block[0] not in (1, -1):
                raise ValueError(
                    f"rows sorted by expert have a scale each or one for all, got block {policy[role].block} of "
                    f"{role.value}; a block of several rows would span experts: give (1, {policy[role].block[1]})"
                )

        if self.smooth:
            raise ValueError(
                f"a smooth product has one factor a channel for all rows, got the override 'smooth' for the experts "
                f"{name!r}; use 'fp8' or 'bf16' there"
            )

    def weight_operand(self, weight: ScalingTensor, channels: Tensor | None = None) -> Operand:
        """The compute copy, no scale of which spans experts; a weight that is stored as products read it is its own."""
        rule = self.weight_rule
        if weight.format == rule.format and (weight.block[0] == -1 or weight.shape[1] % weight.block[0] == 0):
            return weight.operand
        return weight.cast(rule.format, _within_experts(rule.block, weight.shape[1]), rule.margin, rule.power_of_two)


def _within_experts(block: Block, out_features: int) -> Block:
    """``block``, or one of all rows of an expert where it would span several."""
    rows, columns = block
    return (out_features, columns) if rows == -1 or out_features % rows else block


def grouped_linear(input: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``input @ weight[e]^T`` for the rows of each expert e; rows past the last offset become 0.

    Returns the autocast dtype where autocast is on, else the input's. A plain weight takes torch's BF16 grouped product
    where that is the dtype, and else a product an expert, which on a GPU waits for ``offsets``.
    """
    if input.ndim != 2 or input.shape[1] != weight.shape[2] or offsets.shape != weight.shape[:1]:
        raise ValueError(
            f"a grouped product of {tuple(weight.shape)} takes rows of {weight.shape[2]} and {weight.shape[0]} "
            f"offsets, got {tuple(input.shape)} and {tuple(offsets.shape)}; flatten the tokens, and sort them by expert"
        )
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    offsets = offsets.to(torch.int32)
    if not isinstance(weight, ScalingTensor):
        return _plain(input.to(dtype), weight.to(dtype), offsets)
    gemm = weight.gemm
    if not isinstance(gemm, GroupedGemm):
        raise ValueError(
            "a stored weight of experts belongs to a GroupedLinear that amp.initialize converted, got one that does "
            "not; call .dequantize() where plain values are meant"
        )
    record = torch.is_grad_enabled() and gemm.training
    return _Grouped.apply(input, weight, offsets, gemm, dtype, record)  # type: ignore[no-any-return]


def _plain(input: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    _, rows, columns = weight.shape
    if input.dtype == torch.bfloat16 and rows % _ALIGNED == columns % _ALIGNED == 0 and input.shape[0] > 0:
        # torch leaves what nobody owns undefined, in the product and in both gradients
        kept = (torch.arange(input.shape[0], device=input.device) < offsets[-1]).unsqueeze(1)
        zero = torch.zeros((), dtype=input.dtype, device=input.device)
        made = F.grouped_mm(torch.where(kept, input, zero), weight.transpose(-2, -1), offs=offsets)
        return torch.where(kept, made, zero)
    ends = offsets.tolist()
    parts = [input[start:stop] @ weight[e].t() for e, (start, stop) in enumerate(zip([0, *ends], ends, strict=False))]
    return torch.cat([*parts, input.new_zeros(input.shape[0] - ends[-1], rows)])


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        input: Tensor,
        weight: ScalingTensor,
        offsets: Tensor,
        gemm: GroupedGemm,
        dtype: torch.dtype,
        record: bool,
    ) -> Tensor:
        with record_function(f"{gemm.name}/quantize input and weight"):
            stored_input = gemm.input.quantize(input, record)
            stored_weight = gemm.weight_operand(weight)
        needs_grad_input, needs_grad_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            offsets,
            *(stored_input[:2] if needs_grad_weight else (None, None)),
            *(stored_weight[:2] if needs_grad_input else (None, None)),
        )
        ctx.gemm, ctx.record = gemm, record
        ctx.blocks = stored_input.block, stored_weight.block
        ctx.dtypes = dtype, input.dtype, weight.dtype
        with record_function(f"{gemm.name}/output"):
            return kernels.grouped_matmul(stored_input, stored_weight, offsets, "nt", dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        offsets, input_payload, input_scale_inv, weight_payload, weight_scale_inv = ctx.saved_tensors
        input_block, weight_block = ctx.blocks
        dtype, input_dtype, weight_dtype = ctx.dtypes
        with record_function(f"{ctx.gemm.name}/quantize grad_output"):
            stored_grad = ctx.gemm.grad_output.quantize(grad_output, ctx.record)
        grad_input = grad_weight = None
        if weight_payload is not None:
            operand = Operand(weight_payload, weight_scale_inv, weight_block)
            with record_function(f"{ctx.gemm.name}/grad_input"):
                grad_input = kernels.grouped_matmul(stored_grad, operand, offsets, "nn", dtype).to(input_dtype)
        if input_payload is not None:
            operand = Operand(input_payload, input_scale_inv, input_block)
            with record_function(f"{ctx.gemm.name}/grad_weight"):
                product = kernels.grouped_matmul(stored_grad, operand, offsets, "tn", BF16.dtype)
            grad_weight = unscaled(product, weight_dtype)
        return grad_input, grad_weight, None, None, None, None
