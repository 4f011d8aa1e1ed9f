"""A linear layer in low precision: three GEMMs in one autograd function.

    output      = input       @ weight^T      contracts over in_features
    grad_input  = grad_output @ weight        contracts over out_features
    grad_weight = grad_output^T @ input       contracts over tokens

A scale belongs to a block along the dim that a product contracts over. One scale a tensor, and a square block, serve
both products that read an operand; a row or a block of one row ("one-way") does not, and the operand is quantized once
more, transposed, from the values while they are at hand: the input in forward, the gradient in backward. Backward keeps
one byte an element: of the input what grad_weight will read, of the weight its compute copy, or, where that is one-way,
the parameter itself, from which backward makes the other copy (a pass over the weight per backward, and no byte held).

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
from msamp_like.formats import BF16, Block, Format
from msamp_like.kernels import Operand
from msamp_like.policy import Policy, Role, Rule
from msamp_like.scaling import Scaler
from msamp_like.tensor import ScalingTensor, unscaled

_PAUSED = Rule(format=BF16)


class LinearGemm(torch.nn.Module):
    """The rules and scalers of one weight's three products.

    The layer holds it as a submodule, so that ``model.to(device)`` and ``model.eval()`` reach it; the weight holds it
    too, so that ``F.linear`` with that weight, from wherever it is called, is the same computation.
    """

    def __init__(self, policy: Policy, name: str = "linear") -> None:
        super().__init__()
        self.name = name
        self.rule = policy[Role.WEIGHT]
        self.smooth = policy.product(name)[0] == "smooth" and self.rule.format.scaled
        self.input = Scaler(policy[Role.INPUT])
        self.grad_output = Scaler(policy[Role.GRAD_OUTPUT])

    @property
    def weight_rule(self) -> Rule:
        """How the weight's compute copy is stored."""
        return _PAUSED if self.paused else self.rule

    @property
    def paused(self) -> bool:
        """Whether the products are in BF16 for now; histories wait."""
        return self.input.paused

    def pause(self, paused: bool) -> None:
        """Take the products in BF16, or again as the rules say; one guard for torch.compile, so two graphs at most."""
        self.input.paused = self.grad_output.paused = paused

    def weight_operand(self, weight: ScalingTensor, channels: Tensor | None = None) -> Operand:
        """The compute copy of the weight, made once an optimizer step; one whose columns are multiplied by
        ``channels``, which change with the input, is made for each product."""
        rule = self.weight_rule
        if channels is None:
            return weight.cast(rule.format, rule.block, rule.margin, rule.power_of_two)
        return _quantized(weight.dequantize(torch.float32) * channels, rule)

    def linear(self, input: Tensor, weight: ScalingTensor, bias: Tensor | None) -> Tensor:
        """What ``F.linear(input, weight, bias)`` does with this weight."""
        return linear(input, weight, bias, self)

    def output(self, input: Operand, weight: Operand, dtype: torch.dtype) -> Tensor:
        """``input @ weight^T`` as stored, or the rows of it that ``input`` has."""
        with record_function(f"{self.name}/output"):
            return kernels.scaled_matmul(input, weight, "nt", dtype)

    def grad_input(self, grad_output: Operand, weight: Operand, dtype: torch.dtype, layout: str = "nn") -> Tensor:
        """``grad_output @ weight`` as stored, or the rows of it that ``grad_output`` has."""
        with record_function(f"{self.name}/grad_input"):
            return kernels.scaled_matmul(grad_output, weight, layout, dtype)

    def grad_weight(self, grad_output: Operand, input: Operand, layout: str = "tn") -> Tensor:
        """``grad_output^T @ input`` as stored, BF16."""
        with record_function(f"{self.name}/grad_weight"):
            return kernels.scaled_matmul(grad_output, input, layout, BF16.dtype)

    @property
    def by_parts(self) -> bool:
        """Whether each tensor is one operand of both products that read it, whatever its rows are multiplied by: others
        may then take the products part by part. So is it in every phase, for backward may come in another."""
        rules = (self.input.rule, self.grad_output.rule, self.rule)
        return not self.smooth and not any(rule.one_way for rule in rules)

    def extra_repr(self) -> str:
        return f"weight: {self.weight_rule}" + (", smooth" if self.smooth else "")


def linear(input: Tensor, weight: ScalingTensor, bias: Tensor | None, gemm: LinearGemm) -> Tensor:
    """``input @ weight^T + bias``; input (..., in_features), weight (out_features, in_features).

    Returns the autocast dtype where autocast is on, else the input's.
    """
    check_features(input, weight)
    dtype = product_dtype(input)
    record = torch.is_grad_enabled() and gemm.training
    matrix, channels = input.reshape(-1, weight.shape[1]), None
    if gemm.smooth and not gemm.paused:
        matrix, channels = _smoothed(matrix, gemm.input.rule.format)
    output = _Linear.apply(matrix, weight, gemm, dtype, record, channels)
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


def _smoothed(input: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """``input`` with all its columns in one binade, FP32, and what the weight's columns are multiplied by for it.

    Smooth-SwiGLU (Fishman et al., "Scaling FP8 training to trillion-token LLMs", 2024,
    https://arxiv.org/abs/2409.12517): late in training a few channels of a gated product grow by orders of magnitude,
    and one scale for the tensor then serves none. The factors are powers of two, so nothing is rounded here.
    """
    if len(input) == 0:
        return input, input.new_ones(1, input.shape[1], dtype=torch.float32)
    amax = input.detach().abs().amax(dim=0, keepdim=True)  # a NaN stays one; a column at a time is slow in our kernels
    channels = kernels.scale_inv_from_amax(amax.float(), format)
    return input * (1.0 / channels), channels


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        input: Tensor,
        weight: ScalingTensor,
        gemm: LinearGemm,
        dtype: torch.dtype,
        record: bool,
        channels: Tensor | None,
    ) -> Tensor:
        needs_grad_input, needs_grad_weight = ctx.needs_input_grad[:2]
        with record_function(f"{gemm.name}/quantize input and weight"):
            stored_input, kept_input = gemm.input.quantize_both(input, record, along=True, across=needs_grad_weight)
            stored_weight = gemm.weight_operand(weight, channels)
        ctx.rule = gemm.weight_rule  # the phase of this forward, whatever the next is
        kept_weight = weight.operand if ctx.rule.one_way else stored_weight
        kept = (kept_input if needs_grad_weight else None, kept_weight if needs_grad_input else None)
        ctx.save_for_backward(*(t for k in kept for t in (k[:2] if k else (None, None))), channels)
        ctx.gemm, ctx.record, ctx.input_layout = gemm, record, "t" if gemm.input.one_way else "n"
        ctx.blocks = kept_input.block if kept_input else None, kept_weight.block
        ctx.dtypes = dtype, input.dtype, weight.dtype
        return gemm.output(stored_input, stored_weight, dtype)

    @staticmethod
    @once_differentiable  # the casts have no second derivative, and silence would make it zero
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input_payload, input_scale_inv, weight_payload, weight_scale_inv, channels = ctx.saved_tensors
        input_block, weight_block = ctx.blocks
        dtype, input_dtype, weight_dtype = ctx.dtypes
        gemm: LinearGemm = ctx.gemm
        with record_function(f"{gemm.name}/quantize grad_output"):
            along, across = gemm.grad_output.quantize_both(
                grad_output, ctx.record, along=weight_payload is not None, across=input_payload is not None
            )
        grad_input = grad_weight = None
        if weight_payload is not None:
            operand, layout = _across(Operand(weight_payload, weight_scale_inv, weight_block), ctx.rule, channels)
            # in the autocast dtype first, as autocast's own products are
            grad_input = gemm.grad_input(along, operand, dtype, layout).to(input_dtype)
        if input_payload is not None:
            operand = Operand(input_payload, input_scale_inv, input_block)
            layout = ("n" if gemm.grad_output.one_way else "t") + ctx.input_layout
            product = gemm.grad_weight(across, operand, layout)
            grad_weight = unscaled(product if channels is None else (product * channels).to(BF16.dtype), weight_dtype)
        return grad_input, grad_weight, None, None, None, None


def _across(weight: Operand, rule: Rule, channels: Tensor | None) -> tuple[Operand, str]:
    """What grad_input reads of the weight that forward kept, and the product's layout."""
    if not rule.one_way:
        return weight, "nn"
    values = kernels.dequantize(*weight[:3], torch.float32)
    return _quantized((values if channels is None else values * channels).t(), rule), "nt"


def _quantized(values: Tensor, rule: Rule) -> Operand:
    block: Block = rule.block
    payload, scale_inv, _ = kernels.quantize_current(
        values.contiguous(), rule.format, block, rule.margin, rule.power_of_two
    )
    return Operand(payload, scale_inv, block)
