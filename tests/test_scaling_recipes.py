"""Recipes: what the three products read under each, what backward keeps, that every level trains, compiles and waits
for nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from msamp_like import amp, kernels
from msamp_like.formats import E4M3, E5M2, WHOLE
from msamp_like.kernels import Operand, reference
from msamp_like.policy import GEMM_ROLES, LEAN, O0, O2, RECIPES, Role, Rule
from tests.closeness import same_bits, sqnr

BLOCKED = [name for name, recipe in RECIPES.items() if recipe.blocks[0] != WHOLE]


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors; waking a second thread for each costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer(in_features: int, out_features: int, recipe: str) -> nn.Linear:
    torch.manual_seed(0)
    return amp.initialize(nn.Linear(in_features, out_features, bias=False), level="O2", recipe=recipe)[0]


def run(ours: nn.Module, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    """Output, grad_input, grad_weight as products gave them."""
    ours.zero_grad()
    x = x.detach().clone().requires_grad_()
    output = ours(x)
    output.backward(grad_output)
    return [output.detach(), x.grad, ours.weight.grad]


def spread(rows: int, columns: int) -> Tensor:
    """Rows and columns of very different size."""
    sizes = torch.exp2(torch.linspace(-5, 5, rows)).unsqueeze(1) * torch.exp2(torch.linspace(-3, 3, columns))
    return torch.randn(rows, columns) * sizes


# --- the rules ------------------------------------------------------------------------------------------------------


def test_blocks_are_those_of_the_papers():
    """DeepSeek-V3, section 3.3.2: tiles of 1x128 for activations, blocks of 128x128 for weights; MX: runs of 32."""
    found = {name: [O2.with_recipe(name)[role].block for role in GEMM_ROLES] for name in RECIPES}
    assert found["blockwise"] == [(1, 128), (128, 128), (1, 128)]
    assert found["mxfp8"] == [(1, 32)] * 3
    assert found["rowwise"] == [(1, -1)] * 3
    assert found["current"] == found["delayed"] == [WHOLE] * 3
    histories = {name: [O2.with_recipe(name)[role].history for role in GEMM_ROLES] for name in RECIPES}
    assert [name for name, history in histories.items() if any(history)] == ["delayed"]
    for name in BLOCKED:
        policy = O2.with_recipe("blockwise").with_recipe(name)
        assert [policy[role].format for role in GEMM_ROLES] == [E4M3] * 3
        assert policy[Role.MASTER_WEIGHT] == O2[Role.MASTER_WEIGHT]
        assert O0.with_recipe(name) == O0
        assert O2.fnuz().with_recipe(name)[Role.GRAD_OUTPUT].format.name == "e4m3fnuz"


def test_a_weight_that_is_half_of_its_master_keeps_its_one_scale():
    """And needs no second copy: one scale serves every product."""
    for name in BLOCKED:
        policy = LEAN.with_recipe(name)
        assert policy[Role.WEIGHT] == LEAN[Role.WEIGHT]
        assert policy[Role.INPUT].block != WHOLE
    with pytest.raises(
        ValueError, match="residual's weight has one scale, got e4m3, scale per row .*; leave its block out"
    ):
        LEAN.with_rule(Role.WEIGHT, Rule(format=E4M3, block=(1, -1)))


def test_a_scale_of_an_mx_block_is_a_power_of_two():
    """So that E8M0 holds it; rounded so that the largest value of a block never saturates."""
    with pytest.raises(ValueError, match="1x32 is an MX block, .*got power_of_two=False; use"):
        Rule(format=E4M3, block=(1, 32), power_of_two=False)
    rule = O2.with_recipe("mxfp8")[Role.INPUT]
    x = torch.cat([torch.randn(64, 256), torch.tensor([[448.0], [449.0], [460.0], [479.0]]).expand(4, 256)])
    _, scale_inv, amax = kernels.quantize_current(x, rule.format, rule.block, rule.margin, rule.power_of_two)
    exponent = scale_inv.view(torch.int32)
    assert (exponent & 0x7FFFFF).count_nonzero() == 0
    assert bool((amax / scale_inv <= E4M3.largest).all())
    assert bool((amax / scale_inv > E4M3.largest / 2).all())
    e8m0 = (exponent >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)
    assert torch.equal(e8m0.float(), scale_inv)


# --- the products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(1, -1), (1, 128), (1, 32)], ids=str)
@pytest.mark.parametrize("shape", [(5, 17), (130, 300), (1, 1), (0, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_directions_are_two_casts(shape, block, dtype):
    x = torch.randn(shape).to(dtype)
    expected = reference.quantize_current(x, E5M2, block)[:2], reference.quantize_current(x.t(), E5M2, block)[:2]
    for twin in (reference, kernels):
        got = twin.quantize_both(x, E5M2, block)
        assert all(same_bits(a, b) for a, b in zip(got, (*expected[0], *expected[1]), strict=True))


@pytest.mark.parametrize("recipe", BLOCKED)
@pytest.mark.parametrize("sizes", [(33, 130, 16), (5, 17, 3), (300, 160, 260), (1, 1, 1)], ids=str)
def test_products_are_those_of_the_stored_operands(recipe, sizes):
    """Each operand quantized along the dim that the product contracts over, from the values themselves; the weight of
    ``blockwise`` once. Sums in another order cost FP32's last bits (> 120 dB); grad_weight is BF16, then E4M3."""
    rows, in_features, out_features = sizes
    ours = layer(in_features, out_features, recipe)
    rules = {role: O2.with_recipe(recipe)[role] for role in GEMM_ROLES}
    x, grad_output, weight = spread(rows, in_features), spread(rows, out_features), ours.weight.dequantize()

    def operand(values: Tensor, role: Role) -> Operand:
        rule = rules[role]
        return Operand(*reference.quantize_current(values.contiguous(), rule.format, rule.block)[:2], rule.block)

    expected = (
        reference.scaled_matmul(operand(x, Role.INPUT), operand(weight, Role.WEIGHT), "nt", torch.float32),
        reference.scaled_matmul(
            operand(grad_output, Role.GRAD_OUTPUT), operand(weight.t(), Role.WEIGHT), "nt", torch.float32
        ),
        reference.scaled_matmul(
            operand(grad_output.t(), Role.GRAD_OUTPUT), operand(x.t(), Role.INPUT), "nt", torch.float32
        ),
    )
    got = run(ours, x, grad_output)
    assert [sqnr(a, b) > bound for a, b, bound in zip(expected, got, (120, 120, 28), strict=True)] == [True] * 3


@pytest.mark.parametrize("recipe", BLOCKED)
def test_what_finer_scales_gain(recipe):
    """Tokens of sizes 2^-12 to 2^12: with scales of their own they keep the 28 dB that two roundings to E4M3 leave, and
    with one scale for all the smallest lose everything: the control."""
    x = torch.randn(256, 160) * (2.0 ** torch.linspace(-12, 12, 256)).unsqueeze(1)
    quality = {}
    for name in (recipe, "current"):
        ours = layer(160, 40, name)
        exact = x @ ours.weight.dequantize().t()
        quality[name] = [sqnr(a, b) for a, b in zip(exact.split(32), ours(x).split(32))]
    assert min(quality[recipe]) > 27
    assert quality["current"][0] < 5


@pytest.mark.parametrize("recipe", RECIPES)
def test_backward_keeps_one_byte_an_element(recipe):
    """Of the input what grad_weight reads, and of the weight its compute copy or, where that serves one direction, the
    parameter's own tensors, of which nothing is held twice."""
    ours = layer(256, 128, recipe)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(torch.randn(512, 256, requires_grad=True))
    payloads = sorted((t for t in kept if t.numel() >= 128 * 256), key=lambda t: t.numel())
    weight, x = payloads
    assert (x.numel(), x.element_size()) == (512 * 256, 1)
    if O2.with_recipe(recipe)[Role.WEIGHT].one_way:
        assert weight.data_ptr() == ours.weight.payload.data_ptr()
    else:
        assert weight.element_size() == 1
    scales = sum(t.nbytes for t in kept) - x.nbytes - weight.nbytes
    assert scales <= (512 * 256 + 128 * 256) * {"mxfp8": 4 / 32}.get(recipe, 4 / 120)
    assert ours.weight.cast_bytes <= 128 * 256 * (1 + (4 / 32 if recipe == "mxfp8" else 4 / 120))


@pytest.mark.parametrize(("frozen_weight", "input_needs_grad"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("recipe", BLOCKED)
def test_only_what_is_needed_is_computed(recipe, frozen_weight, input_needs_grad):
    model = nn.Linear(64, 48)
    model.weight.requires_grad_(not frozen_weight)
    amp.initialize(model, recipe=recipe)
    x = torch.randn(40, 64, requires_grad=input_needs_grad)
    model(x).sum().backward()
    assert (model.weight.grad is None) == frozen_weight
    assert (x.grad is None) == (not input_needs_grad)


# --- training -------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 16))


def batch(step: int, rows: int = 40) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer, steps: range, forward=None) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        x = batch(step)
        loss = ((forward or model)(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", BLOCKED)
@pytest.mark.parametrize("level", ["O1", "O2", "O3", "lean"])
def test_training_lowers_the_loss_as_fp32_does(level, recipe):
    """To within a twentieth of what FP32 gains, over 40 steps."""
    plain = network()
    model = copy.deepcopy(plain)
    model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-2), level, recipe=recipe)
    losses = train(model, optimizer, range(40))
    expected = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), range(40))
    assert expected[-1] < expected[0] / 4
    assert losses[-1] < expected[-1] + 0.05 * expected[0]


def test_an_override_keeps_a_layer_in_bf16_under_a_recipe():
    model = amp.initialize(network(), recipe="blockwise", overrides={"3": "bf16"})[0]
    assert [row.product for row in amp.fp8_report(model).rows] == ["fp8", "bf16"]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model[3](torch.randn(8, 64, requires_grad=True))
    assert {t.dtype for t in kept if t.numel() > 1} == {torch.bfloat16}


# --- torch.compile and waiting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_equals_eager_and_compiles_once(recipe):
    """50 steps of changing amax: one full graph (delayed: one more once its history is full), the same bits."""
    results = []
    for compiles in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = network()
        model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-2), recipe=recipe)
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        losses = train(model, optimizer, range(50 if compiles else 20), forward)
        if compiles:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if recipe == "delayed" else 1)
        results.append(losses[:20])
    assert results[0] == results[1]


class Waits(TorchDispatchMode):
    """Counts what reads a tensor on the host: on a GPU each waits for all that was launched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_and_backward_wait_for_nothing(recipe):
    model, optimizer = amp.initialize(
        model := network(), torch.optim.AdamW(model.parameters(), lr=1e-2), recipe=recipe, overrides={"0": "smooth"}
    )
    train(model, optimizer, range(20))  # delayed scaling has taken over
    with Waits() as waits:
        model(batch(0)).square().mean().backward()
        assert waits.count == 0
        torch.ones(1).item()
    assert waits.count == 1
