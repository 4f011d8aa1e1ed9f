"""A linear layer in low precision: three GEMMs in one autograd function.

    output      = input       @ weight^T      E4M3 x E4M3
    grad_input  = grad_output @ weight        E5M2 x E4M3
    grad_weight = grad_output^T @ input       E5M2 x E4M3

What backward keeps is what the GEMM read: the quantized input and the weight's compute copy, one byte an element.
grad_weight leaves as BF16; the first micro-batch's is rounded to the gradient's format by the hook that ``amp`` puts on
the parameter, the sum of several once, when it is sent or stepped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from msamp_like import kernels
from msamp_like.formats import BF16
from msamp_like.kernels import Operand
from msamp_like.policy import Policy, Role
from msamp_like.scaling import Scaler
from msamp_like.tensor import ScalingTensor, unscaled


class LinearGemm(torch.nn.Module):
    """The rules and scalers of one weight's three products.

    The layer holds it as a submodule, so that ``model.to(device)`` and ``model.eval()`` reach it; the weight holds it
    too, so that ``F.linear`` with that weight, from wherever it is called, is the same computation.
    """

    def __init__(self, policy: Policy, name: str = "linear") -> None:
        super().__init__()
        self.name = name
        self.weight_rule = policy[Role.WEIGHT]
        self.input = Scaler(policy[Role.INPUT])
        self.grad_output = Scaler(policy[Role.GRAD_OUTPUT])

    def weight_operand(self, weight: ScalingTensor) -> Operand:
        """The compute copy of the weight, made once an optimizer step."""
        rule = self.weight_rule
        return weight.cast(rule.format, rule.block, rule.margin, rule.power_of_two)

    def linear(self, input: Tensor, weight: ScalingTensor, bias: Tensor | None) -> Tensor:
        """What ``F.linear(input, weight, bias)`` does with this weight."""
        return linear(input, weight, bias, self)

    def output(self, input: Operand, weight: Operand, dtype: torch.dtype) -> Tensor:
        """``input @ weight^T`` as stored, or the rows of it that ``input`` has."""
        with record_function(f"{self.name}/output"):
            return kernels.scaled_matmul(input, weight, "nt", dtype)

    def grad_input(self, grad_output: Operand, weight: Operand, dtype: torch.dtype) -> Tensor:
        """``grad_output @ weight`` as stored, or the rows of it that ``grad_output`` has."""
        with record_function(f"{self.name}/grad_input"):
            return kernels.scaled_matmul(grad_output, weight, "nn", dtype)

    def grad_weight(self, grad_output: Operand, input: Operand, outer_dtype: torch.dtype) -> ScalingTensor:
        """``grad_output^T @ input`` as stored, a BF16 payload."""
        with record_function(f"{self.name}/grad_weight"):
            product = kernels.scaled_matmul(grad_output, input, "tn", BF16.dtype)
        return unscaled(product, outer_dtype)

    def extra_repr(self) -> str:
        return f"weight: {self.weight_rule}"


def linear(input: Tensor, weight: ScalingTensor, bias: Tensor | None, gemm: LinearGemm) -> Tensor:
    """``input @ weight^T + bias``; input (..., in_features), weight (out_features, in_features).

    Returns the autocast dtype where autocast is on, else the input's.
    """
    check_features(input, weight)
    dtype = product_dtype(input)
    record = torch.is_grad_enabled() and gemm.training
    output = _Linear.apply(input.reshape(-1, weight.shape[1]), weight, gemm, dtype, record)
    if bias is not None:
        output = output + bias.to(dtype)
    return output.view(*input.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def check_features(input: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless ``input`` has the features that ``weight`` reads."""
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"the input's last dim must be in_features {weight.shape[1]}, got shape {tuple(input.shape)}; "
            "transpose or project it first"
        )


def product_dtype(input: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on, else the input's."""
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: Tensor, weight: ScalingTensor, gemm: LinearGemm, dtype: torch.dtype, record: bool
    ) -> Tensor:
        with record_function(f"{gemm.name}/quantize input and weight"):
            stored_input = gemm.input.quantize(input, record)
            stored_weight = gemm.weight_operand(weight)
        needs_grad_input, needs_grad_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            *(stored_input[:2] if needs_grad_weight else (None, None)),
            *(stored_weight[:2] if needs_grad_input else (None, None)),
        )
        ctx.gemm, ctx.record = gemm, record
        ctx.blocks = stored_input.block, stored_weight.block
        ctx.dtypes = dtype, input.dtype, weight.dtype
        return gemm.output(stored_input, stored_weight, dtype)

    @staticmethod
    @once_differentiable  # the casts have no second derivative, and silence would make it zero
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input_payload, input_scale_inv, weight_payload, weight_scale_inv = ctx.saved_tensors
        input_block, weight_block = ctx.blocks
        dtype, input_dtype, weight_dtype = ctx.dtypes
        gemm: LinearGemm = ctx.gemm
        with record_function(f"{gemm.name}/quantize grad_output"):
            stored_grad = gemm.grad_output.quantize(grad_output, ctx.record)
        grad_input = grad_weight = None
        if weight_payload is not None:
            operand = Operand(weight_payload, weight_scale_inv, weight_block)
            # in the autocast dtype first, as autocast's own products are
            grad_input = gemm.grad_input(stored_grad, operand, dtype).to(input_dtype)
        if input_payload is not None:
            operand = Operand(input_payload, input_scale_inv, input_block)
            grad_weight = gemm.grad_weight(stored_grad, operand, weight_dtype)
        return grad_input, grad_weight, None, None, None
