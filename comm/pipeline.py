"""Pipeline parallelism: what one stage hands to the next travels as its rule says, on torch's own schedules.

The schedules of ``torch.distributed.pipelining`` send a stage's output to the next stage and its gradient back, as they
are: tensors of one shape and dtype, which they copy and never compute with. So a stage of ours hands over a *carrier*,
a BF16 tensor whose bits are not numbers but the codes and scales of the activation, and its "gradient" is a carrier of
the same shape that holds the activation's gradient:

    carrier (batch, width):   row b = [mark | scales of sample b | its codes | padding], as 16-bit words
    stage i                   module, then :func:`encode`; backward decodes the gradient's carrier
    stage i + 1               :func:`decode`, then module; backward encodes the gradient into a carrier

With E4M3 and a scale per (1, 128) that is 1.03 bytes an element in either direction, 0.516 of BF16.

The mark is a signalling NaN. Whoever computes with a carrier, if only to multiply it by one, makes it a quiet one; the
row then decodes to NaN, which flags the loss and skips the step, with no read of the device. A row of zeros, which the
schedules send where a stage has no gradient, decodes to zeros. Copies, sends and views keep every bit.

Read in the sources and run, for PyTorch 2.11 and 2.13: the schedules 1F1B and interleaved 1F1B detach, send,
receive and check shape, stride and dtype of what passes between stages, and scale the gradients of parameters alone.
Left out: a stage that hands over several tensors, zero-bubble schedules, and ``detect_anomaly``, which takes the bits
of a carrier for NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from msamp_like import kernels
from msamp_like.formats import ROW, WHOLE, grid_shape
from msamp_like.policy import Rule
from msamp_like.scaling import quantize

WORD = torch.bfloat16
"""The dtype of a carrier: autograd gives gradients to floating-point tensors alone."""

MARK = 0x7F81
"""First word of every row: a signalling NaN of BF16, which no arithmetic returns."""


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """How activations of shape (batch, *shape), and their gradients, cross from one stage to the next.

    ``rule`` is the policy's for PARTIAL_OUTPUT; one without scales (BF16, FP32) leaves the stages as they are, and they
    send what they return. ``dtype`` is what the next stage reads.
    """

    rule: Rule
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        rule = self.rule
        if not self.shape or min(self.shape) < 1:
            raise ValueError(
                f"a boundary needs the shape of one sample's activation, without the batch, got {self.shape}; "
                "for example (context, dim)"
            )
        if rule.history or rule.rounding != "nearest":
            raise ValueError(
                f"a boundary scales from the tensor at hand and rounds to nearest, got history={rule.history} and "
                f"rounding={rule.rounding!r}; use Rule(..., history=0, rounding='nearest') for Role.PARTIAL_OUTPUT"
            )
        if rule.block != WHOLE and rule.block[0] != 1:
            raise ValueError(
                f"a scale belongs to the whole tensor or to elements of one row, got block {rule.block}; use (1, 128)"
            )

    @property
    def scaled(self) -> bool:
        """Whether what crosses is codes and scales."""
        return self.rule.format.scaled

    @property
    def sample_bytes(self) -> int:
        """Bytes that one sample sends across, in either direction."""
        if not self.scaled:
            return math.prod(self.shape) * self.dtype.itemsize
        used = WORD.itemsize + 4 * self._num_scales + self._code_bytes
        return -(-used // WORD.itemsize) * WORD.itemsize

    @property
    def _code_bytes(self) -> int:
        return math.prod(self.shape) * self.rule.format.bytes

    @property
    def _num_scales(self) -> int:
        return math.prod(grid_shape(torch.Size(self.shape), self.rule.block))

    def example(self, batch: int) -> Tensor:
        """What crosses for one micro-batch, on the meta device: PipelineStage's ``input_args`` and ``output_args``.

        With these the schedule need not find shapes by a run of its own, whose made-up values a delayed scale would
        record.
        """
        if self.scaled:
            made = torch.empty(batch, self.sample_bytes // WORD.itemsize, dtype=WORD, device="meta")
        else:
            made = torch.empty(batch, *self.shape, dtype=self.dtype, device="meta")
        return made.requires_grad_()

    def wrap(self, stage: nn.Module, *, first: bool, last: bool) -> nn.Module:
        """``stage`` for a PipelineStage: reads a carrier unless it is the first, returns one unless it is the last.

        Convert and build optimizers on ``stage`` itself, before or after. With a rule without scales it is returned as
        it is.
        """
        return CarrierStage(stage, self, first=first, last=last) if self.scaled else stage


class CarrierStage(nn.Module):
    """One stage between its carriers. Takes one positional tensor and returns one; keywords pass through."""

    def __init__(self, module: nn.Module, boundary: Boundary, *, first: bool, last: bool) -> None:
        super().__init__()
        self.module = module
        self.boundary = boundary
        self.first = first
        self.last = last

    def forward(self, input: Tensor, **kwargs: Any) -> Tensor:
        output = self.module(input if self.first else decode(input, self.boundary), **kwargs)
        return output if self.last else encode(output, self.boundary)

    def extra_repr(self) -> str:
        return f"first={self.first}, last={self.last}, rule={self.boundary.rule}"


def encode(x: Tensor, boundary: Boundary) -> Tensor:
    """The carrier (batch, width) of ``x`` (batch, *shape); its gradient is a carrier too. Raises ValueError for another
    shape."""
    if not isinstance(x, Tensor) or tuple(x.shape[1:]) != boundary.shape:
        found = tuple(x.shape[1:]) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"a stage hands over one tensor of shape (batch, *{boundary.shape}), got {found} behind the batch; "
            "give Boundary the shape that the stage returns"
        )
    return _Encode.apply(x, boundary)  # type: ignore[no-any-return]


def decode(carrier: Tensor, boundary: Boundary) -> Tensor:
    """The activation (batch, *shape) in ``boundary.dtype``; a row that was computed with is NaN. Raises ValueError for
    what cannot be a carrier of this boundary."""
    width = boundary.sample_bytes // WORD.itemsize
    if carrier.dtype != WORD or carrier.dim() != 2 or carrier.shape[1] != width:
        raise ValueError(
            f"a carrier of {boundary.shape} is {WORD} of shape (batch, {width}), got {carrier.dtype} "
            f"{tuple(carrier.shape)}; wrap every stage with one and the same Boundary"
        )
    return _Decode.apply(carrier, boundary)  # type: ignore[no-any-return]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, boundary: Boundary) -> Tensor:  # type: ignore[override]
        ctx.boundary, ctx.dtype = boundary, x.dtype
        return _packed(x, boundary)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _unpacked(grad, ctx.boundary, ctx.dtype), None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, boundary: Boundary) -> Tensor:  # type: ignore[override]
        ctx.boundary = boundary
        return _unpacked(carrier, boundary, boundary.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _packed(grad, ctx.boundary), None


def _packed(x: Tensor, boundary: Boundary) -> Tensor:
    batch = x.shape[0]
    stored = quantize(x, boundary.rule)
    scales = stored.scale_inv.expand(batch, 1) if boundary.rule.block == WHOLE else stored.scale_inv
    parts = [
        torch.full((batch, 1), MARK, dtype=torch.int16, device=x.device).view(torch.uint8),
        scales.reshape(batch, -1).view(torch.uint8),
        stored.payload.view(torch.uint8).reshape(batch, -1),
    ]
    padding = boundary.sample_bytes - sum(part.shape[1] for part in parts)
    return nn.functional.pad(torch.cat(parts, dim=1), (0, padding)).view(WORD)


def _unpacked(carrier: Tensor, boundary: Boundary, dtype: torch.dtype) -> Tensor:
    batch, rule = carrier.shape[0], boundary.rule
    carrier = carrier.contiguous()
    mark = carrier.view(torch.int16)[:, :1]
    sizes = [WORD.itemsize, 4 * boundary._num_scales, boundary._code_bytes]
    _, scale_bytes, code_bytes = carrier.view(torch.uint8)[:, : sum(sizes)].split(sizes, dim=1)
    scale_inv = scale_bytes.clone(memory_format=torch.contiguous_format).view(
        torch.float32
    )  # aligned as FP32 has to be
    spoilt = torch.where(mark == 0, 0.0, torch.nan)
    scale_inv = torch.where(mark == MARK, scale_inv, spoilt)
    payload = code_bytes.contiguous().view(rule.format.dtype)
    block = rule.block
    if block == WHOLE:
        block = ROW  # of one row a sample, which holds the one scale
    else:
        payload = payload.view(batch, *boundary.shape)
    grid = grid_shape(payload.shape, block)
    return kernels.dequantize(payload, scale_inv.view(grid), block, dtype).view(batch, *boundary.shape)
