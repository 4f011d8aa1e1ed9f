"""Triton twin of :mod:`.attention`, for CUDA and ROCm: the same tiles, the same scales, sums in the device's order.

A program has a tile of queries and walks the keys; in backward a tile of keys and walks the queries for dK and dV, and
again a tile of queries for dQ. Scores live in registers. P and dS are rounded by the integer arithmetic of
:mod:`.triton_codec`, so only the sums and the exponential differ from the reference. Operands are decoded to BF16,
which holds every FP8 value, or with ``units`` go to FP8 tensor cores as they are.

Left out: skipping tiles by warp, TMA, a schedule over keys for long sequences. The speed is not measured yet.
"""

# The compiler reads these sources: annotations stay objects, and a kernel argument has none.
# mypy: allow-untyped-defs, allow-incomplete-defs
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from msamp_like.formats import Format, format_of
from msamp_like.kernels import attention as definition
from msamp_like.kernels.fp8_units import has_fp8_units
from msamp_like.kernels.reference import Operand
from msamp_like.kernels.triton_codec import decode, encode, magnitude_bits, scale_down, scale_inv_of
from msamp_like.kernels.triton_tiles import raw

# --- on the device ----------------------------------------------------------------------------------------------------


@triton.jit
def _codes(payload, head, row, count, column, dim):
    """Codes of some rows of one head, 0 beyond its rows and columns."""
    where = (head.to(tl.int64) * count + row[:, None]) * dim + column[None, :]
    return tl.load(payload + where, mask=(row < count)[:, None] & (column < dim)[None, :], other=0)


@triton.jit
def _of_rows(values, head, row, count, STEP: tl.constexpr):
    """An FP32 number of each row: its scale (STEP 0: one for all), its sum."""
    return tl.load(values + (head.to(tl.int64) * count + row) * STEP, mask=row < count, other=1.0)


@triton.jit
def _factor(code, FORMAT: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr):
    """Codes as a product takes them."""
    if UNITS:
        if FORMAT == "e5m2":
            value = code.to(tl.uint8).to(tl.float8e5, bitcast=True)
        else:
            value = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        value = decode(code, FORMAT)
        if not WIDE:  # Triton's interpreter has no BF16 product
            value = value.to(tl.bfloat16)
    return value


@triton.jit
def _rounded(value, FORMAT: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr):
    """``value`` in the format, ready for a product, and the scale of each row."""
    scale_inv = scale_inv_of(tl.max(magnitude_bits(value), axis=1), FORMAT, 0, True)
    return _factor(encode(scale_down(value, scale_inv), 0, FORMAT, False), FORMAT, UNITS, WIDE), scale_inv


@triton.jit
def _sees(query, key, queries, keys, CAUSAL: tl.constexpr):
    inside = (query < queries)[:, None] & (key < keys)[None, :]
    if CAUSAL:
        inside = inside & (query[:, None] >= key[None, :])
    return inside


@triton.jit
def _forward_kernel(
    q, q_scales, k, k_scales, v, v_scales, out, log_sum, heads, key_heads, queries, keys, dim, scale,
    CAUSAL: tl.constexpr, Q_STEP: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    UNITS: tl.constexpr, WIDE: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    group = (head // heads) * key_heads + (head % heads) // (heads // key_heads)
    first = tl.program_id(0) * TILE
    row, column = first + tl.arange(0, TILE), tl.arange(0, DIM)
    q_factor = _factor(_codes(q, head, row, queries, column, dim), "e4m3", UNITS, WIDE)
    q_scale = _of_rows(q_scales, head, row, queries, Q_STEP) * scale
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    output = tl.zeros((TILE, DIM), tl.float32)
    end = tl.minimum(keys, first + TILE) if CAUSAL else keys
    for start in range(0, end, TILE):
        key = start + tl.arange(0, TILE)
        sees = _sees(row, key, queries, keys, CAUSAL)
        k_factor = _factor(tl.trans(_codes(k, group, key, keys, column, dim)), "e4m3", UNITS, WIDE)
        scores = tl.dot(q_factor, k_factor, tl.zeros((TILE, TILE), tl.float32))
        scores = scores * (q_scale[:, None] * _of_rows(k_scales, group, key, keys, K_STEP)[None, :])
        scores = tl.where(sees, scores, float("-inf"))
        scores = tl.where((row < queries)[:, None], scores, 0.0)
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        kept = tl.exp(largest - new_largest)
        weights = tl.exp(scores - new_largest[:, None])
        weighted = tl.where(sees, weights * _of_rows(v_scales, group, key, keys, V_STEP)[None, :], 0.0)
        p_factor, p_scale = _rounded(weighted, "e4m3", UNITS, WIDE)
        v_factor = _factor(_codes(v, group, key, keys, column, dim), "e4m3", UNITS, WIDE)
        product = tl.dot(p_factor, v_factor, tl.zeros((TILE, DIM), tl.float32))
        output = output * kept[:, None] + product * p_scale[:, None]
        total = total * kept + tl.sum(weights, axis=1)
        largest = new_largest
    output = output / total[:, None]
    where = (head.to(tl.int64) * queries + row[:, None]) * dim + column[None, :]
    tl.store(out + where, output.to(out.dtype.element_ty), mask=(row < queries)[:, None] & (column < dim)[None, :])
    tl.store(log_sum + head.to(tl.int64) * queries + row, largest + tl.log(total), mask=row < queries)


@triton.jit
def _tile_gradient(
    q_factor, q_scale, k_factor, k_scale, v_factor, v_scale, g_factor, g_scale, log_sum, delta, sees, TILE: tl.constexpr
):
    """P and dS of a tile, FP32 and not rounded; ``q_scale`` holds the softmax's scale, k and v come transposed."""
    zeros = tl.zeros((TILE, TILE), tl.float32)
    scores = tl.dot(q_factor, k_factor, zeros) * (q_scale[:, None] * k_scale[None, :])
    weights = tl.where(sees, tl.exp(scores - log_sum[:, None]), 0.0)
    inner = tl.dot(g_factor, v_factor, zeros) * (g_scale[:, None] * v_scale[None, :])
    return weights, tl.where(sees, weights * (inner - delta[:, None]), 0.0)


@triton.jit
def _keys_kernel(
    q, q_scales, k, k_scales, v, v_scales, g, g_scales, log_sum, delta, grad_key, grad_value,
    heads, key_heads, queries, keys, dim, scale,
    CAUSAL: tl.constexpr, Q_STEP: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr, G_STEP: tl.constexpr,
    G_FORMAT: tl.constexpr, S_FORMAT: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr,
    DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys: sums over the queries of all heads that share it."""
    group = tl.program_id(1)
    first = tl.program_id(0) * TILE
    key, column = first + tl.arange(0, TILE), tl.arange(0, DIM)
    k_factor = _factor(tl.trans(_codes(k, group, key, keys, column, dim)), "e4m3", UNITS, WIDE)
    v_factor = _factor(tl.trans(_codes(v, group, key, keys, column, dim)), "e4m3", UNITS, WIDE)
    k_scale = _of_rows(k_scales, group, key, keys, K_STEP)
    v_scale = _of_rows(v_scales, group, key, keys, V_STEP)
    key_sum = tl.zeros((TILE, DIM), tl.float32)
    value_sum = tl.zeros((TILE, DIM), tl.float32)
    each = heads // key_heads
    for member in range(each):
        head = (group // key_heads) * heads + (group % key_heads) * each + member
        for start in range(first if CAUSAL else 0, queries, TILE):
            row = start + tl.arange(0, TILE)
            q_factor = _factor(_codes(q, head, row, queries, column, dim), "e4m3", UNITS, WIDE)
            g_factor = _factor(_codes(g, head, row, queries, column, dim), G_FORMAT, UNITS, WIDE)
            q_scale = _of_rows(q_scales, head, row, queries, Q_STEP) * scale
            g_scale = _of_rows(g_scales, head, row, queries, G_STEP)
            weights, grad_scores = _tile_gradient(
                q_factor, q_scale, k_factor, k_scale, v_factor, v_scale, g_factor, g_scale,
                _of_rows(log_sum, head, row, queries, 1), _of_rows(delta, head, row, queries, 1),
                _sees(row, key, queries, keys, CAUSAL), TILE,
            )  # fmt: skip
            factor, scales = _rounded(tl.trans(weights * g_scale[:, None]), "e4m3", UNITS, WIDE)
            value_sum += tl.dot(factor, g_factor, tl.zeros((TILE, DIM), tl.float32)) * scales[:, None]
            factor, scales = _rounded(tl.trans(grad_scores * q_scale[:, None]), S_FORMAT, UNITS, WIDE)
            key_sum += tl.dot(factor, q_factor, tl.zeros((TILE, DIM), tl.float32)) * scales[:, None]
    where = (group.to(tl.int64) * keys + key[:, None]) * dim + column[None, :]
    inside = (key < keys)[:, None] & (column < dim)[None, :]
    tl.store(grad_key + where, key_sum.to(grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value + where, value_sum.to(grad_value.dtype.element_ty), mask=inside)


@triton.jit
def _queries_kernel(
    q, q_scales, k, k_scales, v, v_scales, g, g_scales, log_sum, delta, grad_query,
    heads, key_heads, queries, keys, dim, scale,
    CAUSAL: tl.constexpr, Q_STEP: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr, G_STEP: tl.constexpr,
    G_FORMAT: tl.constexpr, S_FORMAT: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr,
    DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries."""
    head = tl.program_id(1)
    group = (head // heads) * key_heads + (head % heads) // (heads // key_heads)
    first = tl.program_id(0) * TILE
    row, column = first + tl.arange(0, TILE), tl.arange(0, DIM)
    q_factor = _factor(_codes(q, head, row, queries, column, dim), "e4m3", UNITS, WIDE)
    g_factor = _factor(_codes(g, head, row, queries, column, dim), G_FORMAT, UNITS, WIDE)
    q_scale = _of_rows(q_scales, head, row, queries, Q_STEP) * scale
    g_scale = _of_rows(g_scales, head, row, queries, G_STEP)
    sums, deltas = _of_rows(log_sum, head, row, queries, 1), _of_rows(delta, head, row, queries, 1)
    total = tl.zeros((TILE, DIM), tl.float32)
    end = tl.minimum(keys, first + TILE) if CAUSAL else keys
    for start in range(0, end, TILE):
        key = start + tl.arange(0, TILE)
        k_codes = _codes(k, group, key, keys, column, dim)
        k_scale = _of_rows(k_scales, group, key, keys, K_STEP)
        sees = _sees(row, key, queries, keys, CAUSAL)
        _, grad_scores = _tile_gradient(
            q_factor, q_scale, _factor(tl.trans(k_codes), "e4m3", UNITS, WIDE), k_scale,
            _factor(tl.trans(_codes(v, group, key, keys, column, dim)), "e4m3", UNITS, WIDE),
            _of_rows(v_scales, group, key, keys, V_STEP), g_factor, g_scale, sums, deltas, sees, TILE,
        )  # fmt: skip
        scaled = tl.where(sees, grad_scores * (k_scale * scale)[None, :], 0.0)
        factor, scales = _rounded(scaled, S_FORMAT, UNITS, WIDE)
        k_factor = _factor(k_codes, "e4m3", UNITS, WIDE)
        total += tl.dot(factor, k_factor, tl.zeros((TILE, DIM), tl.float32)) * scales[:, None]
    where = (head.to(tl.int64) * queries + row[:, None]) * dim + column[None, :]
    tl.store(grad_query + where, total.to(grad_query.dtype.element_ty),
             mask=(row < queries)[:, None] & (column < dim)[None, :])  # fmt: skip


# --- on the host ------------------------------------------------------------------------------------------------------


def attention(
    query: Operand, key: Operand, value: Operand, scale: float, causal: bool, dtype: torch.dtype,
    *, units: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`.attention.attention`; ``units`` None asks the device for FP8 units."""
    operands = _contiguous(query, key, value)
    output = torch.empty(query.payload.shape, dtype=dtype, device=query.payload.device)
    log_sum = torch.empty(query.payload.shape[:3], dtype=torch.float32, device=output.device)
    grid = triton.cdiv(query.payload.shape[2], definition.TILE), query.payload.shape[0] * query.payload.shape[1]
    options = _options(operands, causal, units)
    with torch.cuda.device_of(output):
        _forward_kernel[grid](*_flat(operands), output, log_sum, *_sizes(query, key), scale, **options)
    return output, log_sum


def attention_backward(
    query: Operand, key: Operand, value: Operand, grad_output: Operand, log_sum: Tensor, delta: Tensor,
    scale: float, causal: bool, format: Format, dtype: torch.dtype, *, units: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`.attention.attention_backward`."""
    operands = _contiguous(query, key, value, grad_output)
    grad_query, grad_key, grad_value = (
        torch.empty(t.payload.shape, dtype=dtype, device=t.payload.device) for t in operands[:3]
    )
    formats = {"G_FORMAT": format_of(grad_output.payload.dtype).name, "S_FORMAT": format.name}
    options = {**_options(operands, causal, units), **formats}
    arguments = (*_flat(operands), log_sum.contiguous(), delta.contiguous())
    for kernel, walked, made in (
        (_keys_kernel, key, (grad_key, grad_value)),
        (_queries_kernel, query, (grad_query,)),
    ):
        batch, heads, rows, _ = walked.payload.shape
        with torch.cuda.device_of(grad_query):
            grid = triton.cdiv(rows, definition.TILE), batch * heads
            kernel[grid](*arguments, *made, *_sizes(query, key), scale, **options)
    return grad_query, grad_key, grad_value


def _contiguous(*operands: Operand) -> list[Operand]:
    return [Operand(t.payload.contiguous(), t.scale_inv.contiguous(), t.block) for t in operands]


def _flat(operands: list[Operand]) -> list[Tensor]:
    return [tensor for t in operands for tensor in (raw(t.payload), t.scale_inv)]


def _sizes(query: Operand, key: Operand) -> tuple[int, ...]:
    heads, queries, dim = query.payload.shape[1:]
    return heads, key.payload.shape[1], queries, key.payload.shape[2], dim


def _options(operands: list[Operand], causal: bool, units: bool | None) -> dict[str, Any]:
    like = operands[0].payload
    if units is None:
        units = like.is_cuda and has_fp8_units(like.device)
    steps = zip(("Q_STEP", "K_STEP", "V_STEP", "G_STEP"), operands, strict=False)
    return {
        **{name: int(t.scale_inv.numel() > 1) for name, t in steps},
        "CAUSAL": causal,
        "UNITS": units,
        "WIDE": not like.is_cuda,
        "DIM": max(16, triton.next_power_of_2(like.shape[3])),
        "TILE": definition.TILE,
        "enable_fp_fusion": False,
    }
