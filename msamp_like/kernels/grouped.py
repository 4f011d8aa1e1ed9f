"""Definition of the grouped product: rows sorted by expert, each expert's rows times its own matrix.

    "nt"   a[T, K] b[E, N, K]^T  ->  (T, N)       output = input weight^T
    "nn"   a[T, N] b[E, N, K]    ->  (T, K)       grad_input = grad_output weight
    "tn"   a[T, N]^T b[T, K]     ->  (E, N, K)    grad_weight = grad_output^T input

``offsets`` is int32 of shape (E,): expert e has the rows from ``offsets[e - 1]`` (0 for the first) to ``offsets[e]``;
an expert may have none. Rows past the last offset belong to nobody, and what is made of them is 0.

Scales of what has rows are one for all, or a row each has its own; of ``b[E, N, K]`` a block lies in one expert, or is
all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from msamp_like.kernels.reference import Operand

Multiply = Callable[[Operand, Operand, str, torch.dtype], Tensor]


def by_expert(a: Operand, b: Operand, offsets: Tensor, layout: str, dtype: torch.dtype, multiply: Multiply) -> Tensor:
    """One product an expert by ``multiply``, a ``scaled_matmul``. Reads ``offsets`` on the host: on a GPU it waits."""
    made = empty_product(a.payload, b.payload, offsets, layout, dtype).zero_()
    for expert, start, stop in spans(offsets):
        if start == stop:
            continue
        left = rows(a, start, stop)
        if layout == "tn":
            made[expert] = multiply(left, rows(b, start, stop), "tn", dtype)
        else:
            made[start:stop] = multiply(left, matrix(b, expert), layout, dtype)
    return made


def spans(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, row after the last)."""
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        yield expert, start, stop
        start = stop


def empty_product(a: Tensor, b: Tensor, offsets: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """What the product is written to."""
    shapes = {
        "nt": (a.shape[0], b.shape[-2]),
        "nn": (a.shape[0], b.shape[-1]),
        "tn": (offsets.shape[0], a.shape[-1], b.shape[-1]),
    }
    return torch.empty(shapes[layout], dtype=dtype, device=a.device)


def rows(stored: Operand, start: int, stop: int) -> Operand:
    """Some rows of a stored matrix, in the same memory."""
    scales = stored.scale_inv if stored.block[0] == -1 else stored.scale_inv[start:stop]
    return Operand(stored.payload[start:stop], scales, stored.block)


def matrix(stored: Operand, expert: int) -> Operand:
    """One expert's matrix, in the same memory."""
    block_rows = stored.block[0]
    each = 0 if block_rows == -1 else stored.payload.shape[1] // block_rows
    scales = stored.scale_inv[expert * each : (expert + 1) * each] if each else stored.scale_inv
    return Operand(stored.payload[expert], scales, stored.block)
