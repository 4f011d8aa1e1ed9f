"""Definition of attention on FP8 operands, in plain torch, a tile of scores at a time: memory is linear in the length.

    S = Q K^T scale        P = softmax(S), FP32        O = P V
    dV = P^T dO            dS = P (dO V^T - rowsum(dO O))        dQ = dS K scale        dK = dS^T Q scale

Q, K, V and dO come stored, with one scale each or a scale a row (a row is one token of one head). What is computed
between two products is rounded too, so that all seven products read FP8: P and dS, a scale for each row of a tile of
TILE keys, or, where the sum runs over queries, for each column of a tile of TILE queries. A scale of the operand that
the sum runs over goes into P or dS before that is rounded; so a product has scales along what is left alone.

A row's scales come from that row and from what it may see. With a scale a row a token that is masked for a query
changes no bit of its output, not even through a non-finite value.

After Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691 (tiles, the running maximum, the two passes of
backward); FP8 operands with a scale a block: Shah et al., "FlashAttention-3", 2024, https://arxiv.org/abs/2407.08608.

Shapes: query (B, H, T, D), key and value (B, H / G, S, D); ``causal`` lets query i see keys 0 to i.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from msamp_like.formats import E4M3, ROW, Format
from msamp_like.kernels import reference
from msamp_like.kernels.reference import Operand

TILE = 64
"""Keys, and queries, of a tile; part of the definition, for a scale of P spans a tile."""


class _Heads(NamedTuple):
    """A stored tensor by groups of heads: values without their scale, and scales."""

    values: Tensor  # (B, H / G, G, rows, D), FP32
    scales: Tensor  # (B, H / G, G, rows, 1), FP32

    def tile(self, start: int) -> tuple[Tensor, Tensor]:
        return self.values[..., start : start + TILE, :], self.scales[..., start : start + TILE, :]


def _heads(stored: Operand, key_heads: int) -> _Heads:
    batch, heads, rows, dim = stored.payload.shape
    shape = (batch, key_heads, heads // key_heads, rows)
    scales = stored.scale_inv.expand(batch * heads * rows, 1)
    return _Heads(stored.payload.float().view(*shape, dim), scales.reshape(*shape, 1))


def _visible(rows: int, keys: int, start: int, first_key: int, causal: bool, device: torch.device) -> Tensor:
    """(rows, keys): whether query ``start + i`` sees key ``first_key + j``."""
    query = torch.arange(start, start + rows, device=device)[:, None]
    key = torch.arange(first_key, first_key + keys, device=device)[None, :]
    return (query >= key) if causal else torch.ones_like(query >= key)


def _rounded(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Values of the format and the scale of each row."""
    payload, scale_inv, _ = reference.quantize_current(x, format, ROW)
    return payload.float(), scale_inv.view(*x.shape[:-1], 1)


def attention(
    query: Operand, key: Operand, value: Operand, scale: float, causal: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(O in ``dtype``, log of the sum of exponentials of each row, FP32 (B, H, T))."""
    q, k, v = (_heads(t, key.payload.shape[1]) for t in (query, key, value))
    rows, keys = q.values.shape[-2], k.values.shape[-2]
    largest = torch.full_like(q.scales, -torch.inf)
    total = torch.zeros_like(q.scales)
    output = torch.zeros_like(q.values)
    for start in range(0, keys, TILE):
        (k_tile, k_scales), (v_tile, v_scales) = k.tile(start), v.tile(start)
        visible = _visible(rows, k_tile.shape[-2], 0, start, causal, q.values.device)
        scores = (q.values @ k_tile.mT) * (q.scales * scale * k_scales.mT)
        scores = torch.where(visible, scores, -torch.inf)
        new_largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
        kept = torch.exp(largest - new_largest)
        weights = torch.exp(scores - new_largest)
        stored, scales = _rounded(torch.where(visible, weights * v_scales.mT, 0.0), E4M3)
        output = output * kept + (stored @ v_tile) * scales
        total = total * kept + weights.sum(-1, keepdim=True)
        largest = new_largest
    log_sum = (largest + total.log()).reshape(query.payload.shape[:3])
    return (output / total).to(dtype).view(query.payload.shape), log_sum


def attention_backward(
    query: Operand, key: Operand, value: Operand, grad_output: Operand, log_sum: Tensor, delta: Tensor,
    scale: float, causal: bool, format: Format, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dQ, dK, dV) in ``dtype``; ``delta`` is rowsum(dO O), FP32 (B, H, T), and ``format`` is that of dS."""
    q, k, v, g = (_heads(t, key.payload.shape[1]) for t in (query, key, value, grad_output))
    per_row = q.scales.shape
    log_sum, delta = log_sum.reshape(per_row), delta.reshape(per_row)
    grad_query, grad_key, grad_value = (torch.zeros_like(t.values) for t in (q, k, v))
    rows, keys = q.values.shape[-2], k.values.shape[-2]
    for first in range(0, keys, TILE):
        (k_tile, k_scales), (v_tile, v_scales) = k.tile(first), v.tile(first)
        there = slice(first, first + TILE)
        for start in range(first if causal else 0, rows, TILE):
            (q_tile, q_scales), (g_tile, g_scales) = q.tile(start), g.tile(start)
            here = slice(start, start + TILE)
            visible = _visible(q_tile.shape[-2], k_tile.shape[-2], start, first, causal, q_tile.device)
            scores = (q_tile @ k_tile.mT) * (q_scales * scale * k_scales.mT)
            weights = torch.where(visible, torch.exp(scores - log_sum[..., here, :]), 0.0)
            inner = (g_tile @ v_tile.mT) * (g_scales * v_scales.mT)
            grad_scores = torch.where(visible, weights * (inner - delta[..., here, :]), 0.0)
            stored, scales = _rounded((weights * g_scales).mT.contiguous(), E4M3)
            grad_value[..., there, :] += ((stored @ g_tile) * scales).sum(2, keepdim=True)
            stored, scales = _rounded((grad_scores * (q_scales * scale)).mT.contiguous(), format)
            grad_key[..., there, :] += ((stored @ q_tile) * scales).sum(2, keepdim=True)
            stored, scales = _rounded(torch.where(visible, grad_scores * (k_scales.mT * scale), 0.0), format)
            grad_query[..., here, :] += (stored @ k_tile) * scales
    made = zip((grad_query, grad_key, grad_value), (query, key, value), strict=True)
    query_made, key_made, value_made = (x.to(dtype).reshape(t.payload.shape) for x, t in made)
    return query_made, key_made, value_made
