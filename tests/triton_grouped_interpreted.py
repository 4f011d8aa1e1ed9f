"""The Triton twin of grouped products on CPU tensors; test_triton_newcomers.py runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from msamp_like.formats import BF16, E4M3, E5M2, ROW, WHOLE
from msamp_like.kernels import grouped, reference, triton_grouped
from tests.closeness import sqnr
from tests.test_grouped import EXPERTS, IN, OUT, SPLITS, offsets_of, stored, tokens_of


@pytest.mark.parametrize("ends", SPLITS.values(), ids=list(SPLITS))
@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
@pytest.mark.parametrize("blocks", [(WHOLE, (OUT, -1)), (ROW, WHOLE), ((1, 16), (16, 16))], ids=str)
def test_equals_the_reference_but_for_the_order_of_the_sum(ends, layout, blocks):
    """BF16 holds the operands, power-of-two scales included, and the sum is FP32's: 110 dB."""
    count = tokens_of(ends)
    rows = [torch.randn(count, width) for width in ((IN, IN) if layout == "nt" else (OUT, IN))]
    a = stored(rows[0], E4M3 if layout == "nt" else E5M2, blocks[0])
    b = stored(rows[1], E4M3, blocks[0]) if layout == "tn" else stored(torch.randn(EXPERTS, OUT, IN), E4M3, blocks[1])
    assert triton_grouped.takes(a, b)
    exact = grouped.by_expert(a, b, offsets_of(ends), layout, torch.float32, reference.scaled_matmul)
    got = triton_grouped.grouped_matmul(a, b, offsets_of(ends), layout, torch.float32)
    assert got.shape == exact.shape
    assert sqnr(exact, got) > 110
    if blocks[1] == (OUT, -1):  # what tensor cores would take: the FP8 bytes as they are
        got = triton_grouped.grouped_matmul(a, b, offsets_of(ends), layout, torch.float32, units=True)
        assert sqnr(exact, got) > 110


def test_more_than_a_tile_and_bf16():
    a, b = stored(torch.randn(200, 150), BF16, WHOLE), stored(torch.randn(3, 70, 150), BF16, WHOLE)
    offsets = offsets_of([130, 130, 200])
    exact = grouped.by_expert(a, b, offsets, "nt", torch.float32, reference.scaled_matmul)
    assert sqnr(exact, triton_grouped.grouped_matmul(a, b, offsets, "nt", torch.float32)) > 110
    low = triton_grouped.grouped_matmul(a, b, offsets, "nt", torch.bfloat16)
    assert low.dtype == torch.bfloat16


def test_a_wrong_expert_would_be_seen():
    """The negative control: the same product with the experts' rows moved by one."""
    a, b = stored(torch.randn(40, IN), E4M3, ROW), stored(torch.randn(EXPERTS, OUT, IN), E4M3, (OUT, -1))
    exact = grouped.by_expert(a, b, offsets_of([1, 14, 29, 40]), "nt", torch.float32, reference.scaled_matmul)
    assert sqnr(exact, triton_grouped.grouped_matmul(a, b, offsets_of([2, 15, 30, 40]), "nt", torch.float32)) < 20
