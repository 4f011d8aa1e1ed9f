"""Grouped products and attention on the device beside their definitions."""

from __future__ import annotations

import pytest
import torch

from msamp_like import kernels
from msamp_like.formats import E4M3, E5M2, ROW, WHOLE
from msamp_like.kernels import Operand, attention, grouped, reference
from tests.closeness import sqnr
from tests.gpu import NEEDS_GPU
from tests.test_attention import inputs
from tests.test_grouped import EXPERTS, IN, OUT, SPLITS, offsets_of, stored, tokens_of

pytestmark = NEEDS_GPU


def there(stored: Operand) -> Operand:
    return Operand(stored.payload.cuda(), stored.scale_inv.cuda(), stored.block)


@pytest.mark.parametrize("ends", SPLITS.values(), ids=list(SPLITS))
@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
@pytest.mark.parametrize("blocks", [(WHOLE, (OUT, -1)), (ROW, WHOLE), ((1, 16), (16, 16))], ids=str)
def test_grouped_products(ends, layout, blocks):
    """60 dB: tensor cores sum in fewer bits than FP32."""
    count = tokens_of(ends)
    a = stored(torch.randn(count, IN if layout == "nt" else OUT), E4M3 if layout == "nt" else E5M2, blocks[0])
    b = torch.randn(count, IN) if layout == "tn" else torch.randn(EXPERTS, OUT, IN)
    b = stored(b, E4M3, blocks[0] if layout == "tn" else blocks[1])
    want = grouped.by_expert(a, b, offsets_of(ends), layout, torch.float32, reference.scaled_matmul)
    got = kernels.grouped_matmul(there(a), there(b), offsets_of(ends).cuda(), layout, torch.float32)
    assert sqnr(want, got.cpu()) > 60


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [24, 64, 128])
def test_attention(causal, dim):
    """The bounds of the interpreter's test, less what tensor cores' sums cost."""
    pairs = zip(inputs(key_heads=2, dim=dim), (E4M3, E4M3, E4M3, E5M2), strict=True)
    operands = [Operand(*reference.quantize_current(x, format, ROW)[:2], ROW) for x, format in pairs]
    want = attention.attention(*operands[:3], 0.2, causal, torch.float32)
    on_device = [there(t) for t in operands]
    got = kernels.attention_forward(*on_device[:3], 0.2, causal, torch.float32)
    assert sqnr(want[0], got[0].cpu()) > 45
    delta = (reference.dequantize(*operands[3][:3], torch.float32) * want[0]).sum(-1)
    rest = (0.2, causal, E5M2, torch.float32)
    expected = attention.attention_backward(*operands, want[1], delta, *rest)
    found = kernels.attention_backward(*on_device, want[1].cuda(), delta.cuda(), *rest)
    assert all(sqnr(a, b.cpu()) > 35 for a, b in zip(expected, found, strict=True))
