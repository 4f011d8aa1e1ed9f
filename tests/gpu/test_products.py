"""Products on the device: FP8 units against the emulation, the emulation against the reference, layers end to end."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from msamp_like import amp, kernels
from msamp_like.formats import BF16, E4M3, E5M2, ROW, WHOLE
from msamp_like.kernels import Operand, reference
from msamp_like.kernels.fp8_units import has_fp8_units
from msamp_like.tensor import real
from tests.gpu import NEEDS_GPU

pytestmark = NEEDS_GPU

_SHAPES = {
    "aligned": {"nt": ((512, 1024), (256, 1024)), "nn": ((512, 1024), (1024, 256)), "tn": ((1024, 512), (1024, 256))},
    "ragged": {"nt": ((57, 333), (71, 333)), "nn": ((57, 333), (333, 71)), "tn": ((333, 57), (333, 71))},
}


def decibels(expected, got):
    """Signal to noise."""
    expected, got = expected.double().cpu(), got.double().cpu()
    return float(10 * torch.log10(expected.square().sum() / (expected - got).square().sum()))


def stored(shape, format, block=WHOLE):
    payload, scale_inv, _ = kernels.quantize_current(torch.randn(shape).cuda(), format, block)
    return Operand(payload, scale_inv, block)


@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
@pytest.mark.parametrize("shapes", _SHAPES)
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3)], ids=lambda pair: " x ".join(map(str, pair)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_fp8_units_against_the_emulation(layout, shapes, formats, dtype):
    cuda = pytest.importorskip("msamp_like.kernels.cuda", reason="needs Triton")
    a, b = (stored(shape, format) for shape, format in zip(_SHAPES[shapes][layout], formats, strict=True))
    if not has_fp8_units(a.payload.device):
        pytest.skip("the device has no FP8 units; its products are the emulation")
    got = kernels.scaled_matmul(a, b, layout, dtype)
    assert got.is_contiguous()
    # 14 bits of fast accumulation over K = 1024 leave about 50 dB; a wrong operand, scale or layout leaves none.
    assert decibels(cuda.emulate(a, b, layout, torch.float32), got) > 40


_SCALED = [(ROW, ROW), ((1, 128), (1, 128)), ((1, 128), (128, 128)), ((1, 32), (1, 32)), (WHOLE, ROW)]


@pytest.mark.parametrize("sizes", [(512, 256, 1024), (57, 71, 333), (300, 140, 130)], ids=str)
@pytest.mark.parametrize("blocks", _SCALED, ids=str)
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3)], ids=lambda pair: " x ".join(map(str, pair)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_with_many_scales_against_the_emulation(sizes, blocks, formats, dtype):
    """Whatever the table of products chooses here, and our Triton product beside it where that takes the operands."""
    cuda = pytest.importorskip("msamp_like.kernels.cuda", reason="needs Triton")
    m, n, k = sizes
    a, b = (stored(s, f, block) for s, f, block in zip(((m, k), (n, k)), formats, blocks, strict=True))
    expected = cuda.emulate(a, b, "nt", torch.float32)
    got = kernels.scaled_matmul(a, b, "nt", dtype)
    assert got.is_contiguous()
    assert decibels(expected, got) > 40
    if has_fp8_units(a.payload.device):
        assert decibels(expected, cuda.triton_products.multiply(a, b, dtype)) > 40


@pytest.mark.parametrize("block", [ROW, (1, 128), (1, 32)], ids=str)
@pytest.mark.parametrize("shape", [(512, 1024), (57, 333)], ids=str)
def test_both_directions_against_the_reference(shape, block):
    x = torch.randn(shape, device="cuda").bfloat16()
    for got, expected in zip(kernels.quantize_both(x, E4M3, block), reference.quantize_both(x.cpu(), E4M3, block)):
        assert torch.equal(*(t.cpu().contiguous().view(torch.uint8) for t in (got, expected)))


@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
@pytest.mark.parametrize("block", [WHOLE, (1, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("formats", [(E5M2, E4M3), (BF16, BF16)], ids=lambda pair: " x ".join(map(str, pair)))
def test_the_emulation_against_the_reference(layout, block, dtype, formats):
    cuda = pytest.importorskip("msamp_like.kernels.cuda", reason="needs Triton")
    a, b = (stored(s, f, block) for s, f in zip(_SHAPES["aligned"][layout], formats, strict=True))
    on_cpu = [Operand(t.payload.cpu(), t.scale_inv.cpu(), t.block) for t in (a, b)]
    expected = reference.scaled_matmul(*on_cpu, layout, torch.float32)
    # Operands are exact: BF16 rounds the result once (2^-9 relative, 54 dB); FP32 sums in another order.
    assert decibels(expected, cuda.emulate(a, b, layout, dtype)) > (50 if dtype == torch.bfloat16 else 90)


def trained(device, level, compiled=False, steps=3, recipe=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 512), nn.GELU(), nn.Linear(512, 136)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = amp.initialize(model, optimizer, level=level, recipe=recipe)
    run = torch.compile(model) if compiled else model
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(48, 200, generator=generator).to(device)
        output = run(x)
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, output.detach()


@pytest.mark.parametrize(
    ("level", "recipe"),
    [("O0", None), ("O1", None), ("O2", None), ("O2", "rowwise"), ("O2", "blockwise"), ("O2", "mxfp8")],
)
def test_training_agrees_with_the_cpu(level, recipe):
    """The whole public path. Sums differ in their order, so codes may differ by a step; the outputs stay close."""
    _, on_cpu = trained("cpu", level, recipe=recipe)
    _, on_gpu = trained("cuda", level, recipe=recipe)
    assert on_gpu.is_cuda
    assert decibels(on_cpu, on_gpu) > 28  # the bar of one FP8 layer


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_compiled_training_agrees_with_eager(level):
    _, eager = trained("cuda", level)
    _, compiled = trained("cuda", level, compiled=True)
    assert decibels(eager, compiled) > 28


def test_a_layer_against_fp32():
    """N(0, 1), 1024 cubed, one scale a tensor: the figures that benchmarks/products.py reports for a CPU."""
    torch.manual_seed(0)
    layer = nn.Linear(1024, 1024, bias=False).cuda()
    with torch.no_grad():
        layer.weight.normal_()
    weight = layer.weight.detach().clone()
    holder, _ = amp.initialize(nn.Sequential(layer), None, level="O2", recipe="current")
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    grad_output = torch.randn(1024, 1024, device="cuda")
    output = holder(x)
    output.backward(grad_output)
    assert decibels(x.detach().double() @ weight.double().t(), output.detach()) > 28
    assert decibels(grad_output.double() @ weight.double(), x.grad) > 24
    assert decibels(grad_output.double().t() @ x.detach().double(), real(holder[0].weight.grad)) > 23.5
