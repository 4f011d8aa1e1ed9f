"""The two ends of a language model with the vocabulary split over ranks: embedding lookup and cross-entropy.

A rank holds a contiguous range of rows. It looks up the tokens in its range, the others give zeros, and the sum over
ranks is the lookup. The loss never sees all logits of a token in one place: each rank tells the others three FP32
numbers a token, its largest logit, the sum of exponentials below it and the target's logit if it has it; one
all-gather, combined in rank order, so every rank gets the same bits.

Shoeybi et al., "Megatron-LM", 2019, https://arxiv.org/abs/1909.08053, section 3. Left out: class weights and label
smoothing, and embeddings whose gradient is sparse or whose rows are renormalised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from msamp_like.comm import sequence_parallel
from msamp_like.comm.group import CountedGroup
from msamp_like.comm.parallel_layers import Parallel, Shard
from msamp_like.nn import ReadsAsBase


class VocabEmbedding(Parallel, ReadsAsBase, nn.Embedding):
    """``nn.Embedding`` with this rank's rows of the table."""

    scatters: bool  # under sequence parallelism: the output is this rank's part of the sequence

    def forward(self, input: Tensor) -> Tensor:
        """input (..., T), token ids, to (..., T or T / ranks, embedding_dim)."""
        rows = self.num_embeddings
        local = input - self.context.group.rank * rows
        absent = (local < 0) | (local >= rows)
        output = F.embedding(local.masked_fill(absent, 0), self.weight, self.padding_idx)
        output = output.masked_fill(absent.unsqueeze(-1), 0)
        if self.context.sequence and not self.scatters:
            return sequence_parallel.reduce(output, self.context.route(self.label))
        return self.context.leave(output, self.label)

    def shards(self) -> dict[str, Shard]:
        return {"weight": Shard(0, 1)}


class VocabCrossEntropy(Parallel, nn.CrossEntropyLoss):
    """``nn.CrossEntropyLoss`` of logits whose last dim is this rank's part of the vocabulary; nats, FP32.

    A target outside of the vocabulary, other than ``ignore_index``, makes the loss infinite.
    """

    losses: Callable[..., Tensor]  # uncompiled_losses(), made once

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input (N, V / ranks), target (N,), the same on every rank, to a scalar, or (N,) with reduction "none"."""
        if input.dim() != 2 or target.dim() != 1:
            raise ValueError(
                "a loss over a split vocabulary takes logits (N, V / ranks) and N token ids, got shapes "
                f"{tuple(input.shape)} and {tuple(target.shape)}; flatten the batch and the sequence first"
            )
        losses = self.losses(input, target, self.ignore_index, self.context.group, f"{self.label}/forward")
        if self.reduction == "none":
            return losses
        return losses.sum() / ((target != self.ignore_index).sum() if self.reduction == "mean" else 1)


class _CrossEntropy(torch.autograd.Function):
    """Losses (N,) of logits (N, V / ranks). Backward needs no other rank: it keeps the logits and log sum exp."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, group: CountedGroup, label: str
    ) -> Tensor:
        width = logits.shape[-1]
        local = target - group.rank * width
        present = (local >= 0) & (local < width) & (target != ignore_index)
        column = local.masked_fill(~present, 0).unsqueeze(-1)
        largest = logits.amax(-1).float().clamp(min=torch.finfo(torch.float32).min)  # a rank's may all be -inf
        below = (logits.float() - largest.unsqueeze(-1)).exp().sum(-1)
        chosen = logits.gather(-1, column).squeeze(-1).float().masked_fill(~present, -torch.inf)
        group.plan("all_gather", label, (group.world - 1) * 3 * target.numel() * torch.float32.itemsize)
        gathered, work = group.all_gather(torch.stack([largest, below, chosen]).unsqueeze(0), label=label)
        work.wait()
        all_largest, all_below, all_chosen = gathered.unbind(1)
        peak = all_largest.amax(0)
        total = torch.zeros_like(peak)
        for rank_below, rank_largest in zip(all_below, all_largest, strict=True):
            total += rank_below * (rank_largest - peak).exp()
        log_sum = peak + total.log()
        ctx.save_for_backward(logits, log_sum, column, present, target != ignore_index)
        return (log_sum - all_chosen.amax(0)).masked_fill(target == ignore_index, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, log_sum, column, present, counts = ctx.saved_tensors
        grad = (logits.float() - log_sum.unsqueeze(-1)).exp()
        grad.scatter_add_(-1, column, -present.unsqueeze(-1).float())
        grad *= (grad_losses * counts).unsqueeze(-1)
        return grad.to(logits.dtype), None, None, None, None


def uncompiled_losses() -> Callable[..., Tensor]:
    """The losses (N,) outside of compiled graphs, as :func:`.sequence_parallel.uncompiled` has its exchanges."""
    return torch.compiler.disable(_CrossEntropy.apply)
