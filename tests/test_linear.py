"""Fp8Linear: the three products are those of the quantized operands, whatever the shape, the dtype and the caller."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msamp_like import amp
from msamp_like.formats import BF16, E4M3, E5M2, FP16, FP32
from msamp_like.kernels import Operand, reference
from msamp_like.nn import Fp8Linear
from msamp_like.policy import O2, Policy, Role, Rule
from msamp_like.scaling import quantize
from msamp_like.tensor import ScalingTensor
from tests.closeness import same_bits, sqnr

CURRENT = O2.with_recipe("current")


def converted(in_features: int, out_features: int, bias: bool = True, level: Policy | str = "O2", dtype=torch.float32):
    """A plain layer and the same one converted."""
    plain = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    ours = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    ours.load_state_dict(plain.state_dict())
    return plain, amp.initialize(ours, level=level)[0]


def run(layer: nn.Module, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    """Output, grad_input, grad_weight and grad_bias."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    output = layer(x)
    output.backward(grad_output)
    grads = [p.grad for p in (layer.weight, layer.bias) if p is not None]
    return [output.detach(), x.grad, *grads]


# --- accuracy -------------------------------------------------------------------------------------------------------


def test_products_are_as_close_as_their_formats_allow():
    """N(0, 1), 256 cubed, one scale a tensor. One rounding to E4M3 costs 31.5 dB, to E5M2 25.5: an output has two of
    the first (28.5), grad_input one of each (24.5); grad_weight as stored one more of E4M3 (23.7)."""
    plain, ours = nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False)
    with torch.no_grad():
        plain.weight.normal_()
        ours.weight.copy_(plain.weight)
    amp.initialize(ours)
    x, grad_output = torch.randn(256, 256), torch.randn(256, 256)
    quality = [sqnr(exact, value) for exact, value in zip(run(plain, x, grad_output), run(ours, x, grad_output))]
    assert quality[0] > 28
    assert quality[1] > 24
    assert quality[2] > 23.5
    assert max(quality) < 30  # it is FP8, and not a plain product in disguise


@pytest.mark.parametrize("rows", [1, 5, 16, 33])
@pytest.mark.parametrize("features", [(1, 1), (16, 16), (17, 3), (40, 72), (130, 16)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_stored_operands(rows, features, bias):
    """Against the definition on the operands quantized here; sums in another order cost FP32's last bits (> 120 dB),
    and grad_weight is BF16 before it is stored."""
    plain, ours = converted(*features, bias=bias, level=CURRENT)
    x, grad_output = torch.randn(rows, features[0]), torch.randn(rows, features[1])
    weight = quantize(ours.weight.dequantize(), O2[Role.WEIGHT]).operand
    stored_x, stored_grad = (quantize(t, Rule(format=f)).operand for t, f in ((x, E4M3), (grad_output, E5M2)))
    output, grad_input, grad_weight, *grad_bias = run(ours, x, grad_output)
    expected = reference.scaled_matmul(stored_x, weight, "nt", torch.float32)
    assert sqnr(expected + (plain.bias if bias else 0), output) > 120
    assert sqnr(reference.scaled_matmul(stored_grad, weight, "nn", torch.float32), grad_input) > 120
    exact = reference.scaled_matmul(stored_grad, stored_x, "tn", torch.float32)
    assert grad_weight.format is E4M3
    assert sqnr(exact, grad_weight) > 28
    if bias:
        assert same_bits(grad_bias[0], run(plain, x, grad_output)[3])  # behaviour 19


def test_small_integers_are_exact_in_any_shape():
    """Behaviour 16: ones times ones, and what E4M3 holds, need no tolerance."""
    for rows, columns, inner in [(1, 1, 1), (3, 5, 7), (16, 16, 16), (17, 33, 65)]:
        ours = nn.Linear(inner, columns, bias=False)
        with torch.no_grad():
            ours.weight.fill_(1.0)
        amp.initialize(ours, level=CURRENT)
        output, grad_input, grad_weight = run(ours, torch.ones(rows, inner), torch.ones(rows, columns))
        assert torch.equal(output, torch.full((rows, columns), float(inner)))
        assert torch.equal(grad_input, torch.full((rows, inner), float(columns)))
        assert torch.equal(grad_weight.dequantize(), quantize(torch.full((columns, inner), float(rows)), CURRENT[Role.GRAD_WEIGHT]).dequantize())  # fmt: skip # noqa: E501


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (3, 24), (2, 3, 24), (2, 1, 3, 24)], ids=str)
def test_any_leading_dims(shape):
    _, ours = converted(24, 10)
    x = torch.randn(shape)
    output, grad_input, grad_weight, grad_bias = run(ours, x, torch.ones(*shape[:-1], 10))
    assert output.shape == (*shape[:-1], 10)
    assert grad_input.shape == shape
    assert (grad_weight.shape, grad_bias.shape) == ((10, 24), (10,))
    if x.numel() == 0:
        assert grad_weight.dequantize().count_nonzero() == 0
        assert grad_bias.count_nonzero() == 0


def test_an_empty_batch_leaves_the_history_alone():
    ours = nn.Linear(8, 8)
    model, optimizer = amp.initialize(ours, torch.optim.AdamW(ours.parameters()))
    model(torch.zeros(0, 8)).sum().backward()
    optimizer.step()
    assert model.gemm.input.filled == model.gemm.grad_output.filled == 0


def test_strides_do_not_matter():
    _, ours = converted(24, 10)
    x, grad_output = torch.randn(24, 6), torch.randn(10, 6)
    strided = run(ours, x.t(), grad_output.t())
    packed = run(ours, x.t().contiguous(), grad_output.t().contiguous())
    assert all(same_bits(a, b) for a, b in zip(strided, packed))
    expanded = run(ours, torch.ones(1, 24).expand(6, 24), torch.ones(1).expand(6, 10))  # as .sum().backward() sends it
    assert all(same_bits(a, b) for a, b in zip(expanded, run(ours, torch.ones(6, 24), torch.ones(6, 10))))


def test_a_wrong_width_is_refused():
    _, ours = converted(24, 10)
    with pytest.raises(ValueError, match=r"must be in_features 24, got shape \(3, 10\); transpose"):
        ours(torch.randn(3, 10))


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_output_and_gradients_have_the_inputs_dtype(dtype):
    """Behaviour 22."""
    plain, ours = converted(32, 16, dtype=dtype)
    x, grad_output = torch.randn(64, 32, dtype=dtype), torch.randn(64, 16, dtype=dtype)
    for exact, value, bound in zip(run(plain, x, grad_output), run(ours, x, grad_output), (26, 22, 22, 40)):
        assert value.dtype == dtype
        assert sqnr(exact, value) > bound
    assert ours.weight.dtype == dtype


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_output(autocast):
    _, ours = converted(32, 16)
    x = torch.randn(8, 32, requires_grad=True)
    expected = ours(x)
    with torch.autocast("cpu", dtype=autocast):
        output = ours(x)
        with torch.autocast("cpu", enabled=False):
            assert ours(x).dtype == torch.float32
    assert output.dtype == autocast
    assert sqnr(expected, output) > (45 if autocast == torch.bfloat16 else 60)  # one rounding of product, one of sum
    output.sum().backward()
    assert x.grad.dtype == torch.float32
    assert ours.bias.grad.dtype == torch.float32


def test_large_operands_do_not_overflow_inside_autocast():
    """The input times its scale is beyond FP16: a product taken there, and not only returned, would be NaN."""
    _, ours = converted(16, 64, bias=False)
    x = torch.full((4, 16), 3e5)
    expected = ours(x)
    with torch.autocast("cpu", dtype=torch.float16):
        output = ours(x)
    fits = expected.abs() < 60000
    assert 0.1 < fits.float().mean() < 0.9
    assert sqnr(expected[fits], output[fits]) > 60


# --- one path -------------------------------------------------------------------------------------------------------


def test_function_and_module_are_one_computation():
    """Behaviour 24: outputs, gradients and what the scalers saw, to the bit."""
    _, module = converted(24, 10)
    _, function = converted(24, 10)
    function.load_state_dict(module.state_dict())
    x, grad_output = torch.randn(6, 24), torch.randn(6, 10)

    def call(x: Tensor) -> Tensor:
        return F.linear(x, function.weight, bias=function.bias)

    results = run(module, x, grad_output)
    x = x.requires_grad_()
    output = call(x)
    output.backward(grad_output)
    for a, b in zip(results, (output, x.grad, function.weight.grad, function.bias.grad)):
        assert same_bits(a, b.detach())
    for role in ("input", "grad_output"):
        one, other = (getattr(layer.gemm, role).pending for layer in (module, function))
        assert one.item() != 0
        assert torch.equal(one, other)


def test_plain_and_stored_weights_are_not_mixed_in_silence():
    _, ours = converted(8, 8)
    with pytest.raises(NotImplementedError, match="converted"):
        F.linear(torch.ones(1, 8), ours.weight.detach().clone())  # a clone is no longer the layer's weight
    with pytest.raises(NotImplementedError, match="dequantize"):
        torch.ones(1, 8) @ ours.weight.t()


@pytest.mark.parametrize(
    ("frozen_weight", "input_needs_grad"), [(True, True), (False, False), (True, False), (False, True)]
)
def test_only_what_is_needed_is_computed(frozen_weight, input_needs_grad):
    layer = nn.Linear(16, 8)
    layer.weight.requires_grad_(not frozen_weight)
    amp.initialize(layer)
    x = torch.randn(4, 16, requires_grad=input_needs_grad)
    layer(x).sum().backward()
    assert (layer.weight.grad is None) == frozen_weight
    assert (x.grad is None) == (not input_needs_grad)
    assert layer.bias.grad is not None


def test_backward_keeps_one_byte_an_element():
    """The quantized input and the weight's compute copy, and none of the tensors they came from."""
    _, ours = converted(64, 32, bias=False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(torch.randn(128, 64, requires_grad=True))
    sizes = sorted((t.numel(), t.element_size()) for t in kept)
    assert sizes == [(1, 4), (1, 4), (32 * 64, 1), (128 * 64, 1)]


def test_a_second_derivative_is_refused():
    """A gradient penalty through the casts would silently train with zeros."""
    _, ours = converted(8, 8)
    x = torch.randn(2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_products_in_bf16_are_those_of_torch():
    """An exception by name (and level O0) is a BF16 product: the one torch takes of BF16 operands."""
    ours = nn.Sequential()
    ours.head = nn.Linear(64, 32, bias=False)
    exact = ours.head.weight.detach().clone()
    amp.initialize(ours, level="O0")
    x = torch.randn(16, 64)
    expected = x.bfloat16().float() @ exact.bfloat16().float().t()
    assert sqnr(expected, ours.head(x)) > 120
    assert ours.head.weight.cast(BF16).payload is ours.head.weight.payload  # no copy


@pytest.mark.parametrize("format", [FP16, BF16, FP32, E4M3], ids=str)
def test_weight_may_be_stored_in_any_format(format):
    """Behaviour 18."""
    policy = O2.with_rule(Role.MASTER_WEIGHT, Rule(format=format))
    plain, ours = converted(4, 8, level=policy)
    assert isinstance(ours, Fp8Linear)
    assert ours.weight.format is format
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0.1)


@pytest.mark.parametrize("block", [(1, 32), (1, 128), (128, 128), (1, -1)], ids=str)
def test_operands_may_have_blocks(block):
    """Rows of very different size keep their accuracy with scales of their own, and lose it with one for all."""
    blocked = CURRENT
    for role in (Role.INPUT, Role.WEIGHT, Role.GRAD_OUTPUT):
        blocked = blocked.with_rule(role, Rule(format=CURRENT[role].format, block=block))
    x = torch.randn(256, 160) * (2.0 ** torch.linspace(-12, 12, 256)).unsqueeze(1)
    quality = {}
    for name, level in (("blocked", blocked), ("whole", CURRENT)):
        torch.manual_seed(0)
        plain, ours = converted(160, 40, bias=False, level=level)
        quality[name] = [sqnr(a, b) for a, b in zip(plain(x).split(32), ours(x).split(32))]
    assert quality["whole"][0] < 5  # the smallest rows
    assert quality["blocked"][0] > (28 if block[0] == 1 else 20)
    assert quality["whole"][-1] > 28  # the largest


def test_scaled_operands_reach_the_kernels():
    """The operand of a stored tensor is its storage, not a copy."""
    tensor = quantize(torch.randn(4, 4), Rule(format=E4M3))
    assert isinstance(tensor, ScalingTensor)
    assert tensor.operand == Operand(tensor.payload, tensor.scale_inv, tensor.block)


def test_profiler_ranges_name_the_layer_and_the_phase():
    model = amp.initialize(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(torch.randn(4, 16, requires_grad=True)).sum().backward()
    found = {event.key for event in profile.key_averages()}
    phases = ("quantize input and weight", "output", "quantize grad_output", "grad_input", "grad_weight")
    assert {f"{layer}/{phase}" for layer in ("0", "2") for phase in phases} <= found
