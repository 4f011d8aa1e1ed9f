"""Conversion there and back: which modules, which parameters, who still holds them, and what the report says."""

from __future__ import annotations

import json
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msamp_like import amp
from msamp_like.formats import BF16, FP16
from msamp_like.nn import Fp8Linear, ReadsAsBase, convert, restore
from msamp_like.policy import O0, O2, O3
from msamp_like.tensor import ScalingTensor, real
from tests.closeness import same_bits, sqnr


class Sub(nn.Linear):
    """A Linear that does something else with its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.abs(), self.bias)


class Everything(nn.Module):
    """One of each kind that a report has to say something about."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.sparse = nn.Embedding(10, 16, sparse=True)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.sub = Sub(16, 16)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.spectral = nn.utils.spectral_norm(nn.Linear(16, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.bilinear = nn.Bilinear(16, 16, 16)
        self.conv = nn.Conv1d(16, 16, 1)
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 10, bias=False)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.embedding(indices) + self.sparse(indices)
        for block in self.blocks:
            x = x + block(x)
        x = self.spectral(self.parametrized(self.sub(x)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.conv(self.bilinear(x, x).transpose(1, 2)).transpose(1, 2)
        return self.lm_head(self.norm(x))


PRODUCTS = {
    "embedding": "lookup", "sparse": "plain", "blocks.0.0": "fp8", "blocks.0.2": "fp8", "blocks.1.0": "fp8",
    "blocks.1.2": "fp8", "sub": "plain", "parametrized": "plain", "spectral": "plain", "attention": "plain",
    "attention.out_proj": "plain", "bilinear": "plain", "lm_head": "bf16",
}  # fmt: skip


def indices() -> Tensor:
    return torch.randint(10, (3, 5))


# --- which modules --------------------------------------------------------------------------------------------------


def test_every_matrix_gets_a_plan_and_a_reason():
    model, _ = amp.initialize(Everything())
    report = amp.fp8_report(model)
    assert {row.name: row.product for row in report.rows} == PRODUCTS
    assert all(row.reason for row in report.rows if row.product != "fp8")
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        assert isinstance(weight, ScalingTensor) == (PRODUCTS.get(name) in ("fp8", "bf16", "lookup")), name
        assert isinstance(module, Fp8Linear) == (PRODUCTS.get(name) in ("fp8", "bf16")), name


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_all_of_it_trains(level):
    """At every level, and the loss falls; Sub, attention and the parametrizations keep working beside FP8."""
    model = Everything()
    table = model.sparse.weight.requires_grad_(False)  # a sparse gradient is refused elsewhere
    model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-2), level=level)
    x, y = indices(), indices()
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.8
    assert type(table) is nn.Parameter


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({"lm_head": "fp8"}, {"lm_head": "fp8"}),
        ({"blocks.1.*": "bf16"}, {"blocks.1.0": "bf16", "blocks.1.2": "bf16"}),
        ({"blocks.*": "skip", "blocks.0.*": "fp8"}, {"blocks.1.0": "plain", "blocks.1.2": "plain"}),
        ({"embedding": "skip"}, {"embedding": "plain"}),
        ({"*": "fp8"}, {"lm_head": "fp8"}),
    ],
)
def test_overrides_by_name(overrides, changed):
    model, _ = amp.initialize(Everything(), overrides=overrides)
    report = {row.name: row for row in amp.fp8_report(model).rows}
    assert {name: row.product for name, row in report.items()} == {**PRODUCTS, **changed}
    for name, product in changed.items():
        assert product == "fp8" or any(repr(pattern) in report[name].reason for pattern in overrides)
        assert isinstance(dict(model.named_modules())[name].weight, ScalingTensor) == (product != "plain")


class Tied(nn.Module):
    """Modules that share one weight."""

    def __init__(self, **shared: nn.Module) -> None:
        super().__init__()
        for name, module in shared.items():
            self.add_module(name, module)
        first, *others = shared.values()
        for module in others:
            module.weight = first.weight


@pytest.mark.parametrize(
    ("modules", "overrides", "products"),
    [
        ({"wte": nn.Embedding, "lm_head": nn.Linear}, {}, ["lookup", "bf16"]),
        ({"wte": nn.Embedding, "lm_head": nn.Linear}, {"lm_head": "fp8"}, ["lookup", "fp8"]),
        ({"wte": nn.Embedding, "lm_head": nn.Linear}, {"wte": "skip"}, ["plain", "plain"]),
        ({"wte": nn.Embedding, "lm_head": nn.Linear}, {"lm_head": "skip"}, ["plain", "plain"]),
        ({"a": nn.Linear, "b": nn.Linear}, {"b": "bf16"}, ["fp8", "fp8"]),
        ({"a": nn.Linear, "b": nn.Linear}, {"a": "bf16"}, ["bf16", "bf16"]),
        ({"a": nn.Linear, "b": Sub}, {}, ["plain", "plain"]),
    ],
)
def test_modules_that_share_a_weight_share_a_plan(modules, overrides, products):
    model = Tied(**{name: kind(16, 16) for name, kind in modules.items()})
    model.more = nn.Linear(16, 16)
    weight = next(model.parameters())
    amp.initialize(model, overrides=overrides)
    rows = amp.fp8_report(model).rows
    assert [row.product for row in rows] == [*products, "fp8"]
    first, second = list(model.children())[:2]
    assert first.weight is second.weight is weight
    assert isinstance(weight, ScalingTensor) == (products[0] != "plain")
    if products[0] == products[1] == "fp8" or products[1] == "plain":
        assert sum("shares the weight of" in row.reason for row in rows) == 1
    x = torch.ones(1, dtype=torch.long) if isinstance(first, nn.Embedding) else torch.randn(2, 16)
    (first(x).sum() + second(torch.randn(2, 16)).sum()).backward()
    assert real(weight.grad).count_nonzero() > 0


def test_a_lazy_layer_is_told_to_run_first():
    model, _ = amp.initialize(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8)))
    assert "run one, then initialize" in amp.fp8_report(model).rows[0].reason


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.ReLU()),
        nn.Conv2d(3, 3, 1),
        nn.Sequential(nn.Linear(0, 4)),
        nn.Linear(4, 4, dtype=torch.complex64),
    ],
    ids=["no parameters", "no matrix", "an empty one", "complex"],
)
def test_nothing_to_convert_is_an_error(model):
    with pytest.raises(ValueError, match="at least one nn.Linear or nn.Embedding to convert, .* train it without amp"):
        amp.initialize(model)


def test_overrides_can_leave_nothing():
    with pytest.raises(ValueError, match="loosen its overrides"):
        amp.initialize(nn.Sequential(nn.Linear(4, 4)), overrides={"*": "skip"})


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_identity_is_kept():
    """Behaviour 23: whoever holds a module, a parameter, a hook or an attribute still does."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].weight.no_decay, model[0].note = True, "mine"
    seen: list[Any] = []
    handles = [
        model[0].weight.register_hook(lambda grad: seen.append("hook")),
        model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("after")),
        model[0].register_forward_hook(lambda *_: seen.append("forward")),
    ]
    held = [*model, *model.parameters()]
    for convert_or_restore in (lambda: amp.initialize(model), lambda: amp.restore(model)):
        convert_or_restore()
        assert all(a is b for a, b in zip(held, [*model, *model.parameters()]))
        assert (model[0].weight.no_decay, model[0].note) == (True, "mine")
        seen.clear()
        model(torch.randn(2, 8)).sum().backward()
        assert seen == ["forward", "hook", "after"]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(torch.randn(2, 8)).sum().backward()
    assert not seen


def test_stored_weights_are_near_the_originals():
    """Behaviour 21: rtol 2e-4, atol 1e-3; FP16 with a scale a block is far inside (72 dB)."""
    model = nn.Linear(300, 40)
    original = model.weight.detach().clone()
    originals = convert(model, O2)
    assert torch.equal(originals[model.weight], original)
    assert model.weight.format is FP16
    torch.testing.assert_close(model.weight.dequantize(), original, rtol=2**-11, atol=0)
    assert sqnr(original, model.weight) > 72


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_restore_gives_a_plain_model_with_the_trained_values(dtype, level):
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 16), nn.LayerNorm(16)).to(dtype)
    model[1].bias.requires_grad_(False)
    model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters()), level=level)
    for _ in range(2):
        model(torch.randint(10, (4,))).float().sum().backward()
        optimizer.step()
    expected = {name: real(p, dtype).clone() for name, p in model.named_parameters()}
    grads = {name: real(p.grad, dtype).clone() for name, p in model.named_parameters() if p.grad is not None}
    assert amp.restore(model) is model
    assert [type(m) for m in model.modules()] == [nn.Sequential, nn.Embedding, nn.Linear, nn.LayerNorm]
    assert not [name for name, _ in model.named_modules() if "gemm" in name]
    for name, p in model.named_parameters():
        assert type(p) is nn.Parameter
        assert torch.equal(p, expected[name])
        assert p.grad is None or torch.equal(p.grad, grads[name])
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True, True]
    model.zero_grad()
    model(torch.randint(10, (4,))).float().sum().backward()
    assert all(type(p.grad) is Tensor for p in model.parameters() if p.requires_grad)  # no hook of ours is left
    again, _ = amp.initialize(model, level="O2")  # and it converts again
    assert again is model


def test_restore_is_part_of_the_layers_too():
    model = nn.Linear(4, 4)
    convert(model, O0)
    assert restore(model) is model
    assert type(model) is nn.Linear
    assert type(model.weight) is nn.Parameter


def test_state_dict_stays_that_of_the_plain_model():
    plain, ours = (nn.Sequential(nn.Linear(300, 8), nn.LayerNorm(8)) for _ in range(2))
    amp.initialize(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    assert sqnr(plain[0].weight, ours[0].weight) > 72
    values = {name: real(value) for name, value in ours.state_dict().items()}
    plain.load_state_dict(ours.state_dict())
    assert all(torch.equal(value, values[name]) for name, value in plain.state_dict().items())


def test_gradients_that_are_there_come_along():
    model = nn.Linear(8, 4)
    model(torch.randn(3, 8)).sum().backward()
    before = model.weight.grad.clone()
    amp.initialize(model)
    assert model.weight.grad.format is BF16
    assert torch.equal(model.weight.grad.dequantize(), before.bfloat16().float())
    amp.restore(model)
    assert torch.equal(model.weight.grad, before.bfloat16().float())


@pytest.mark.parametrize(
    ("hold", "back"),
    [("graph", False), ("graph of a frozen weight", False), ("weak reference", False), ("weak reference", True)],
)
def test_a_held_weight_stops_conversion_before_it_begins(hold, back):
    """Exchanging one weight and failing at the next would leave half a model."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight.requires_grad_(hold != "graph of a frozen weight")
    if back:
        amp.initialize(model)
    model(torch.randn(2, 8)).sum().backward()
    grad = model[0].weight.grad
    before = [(type(m), [type(p) for p in m.parameters()]) for m in model.modules()]
    held = weakref.ref(model[2].weight) if hold == "weak reference" else model[2](torch.randn(2, 8, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"'2\.weight' is held by the graph of an earlier .*delete losses"):
        amp.restore(model) if back else amp.initialize(model)
    assert [(type(m), [type(p) for p in m.parameters()]) for m in model.modules()] == before
    assert model[0].weight.grad is grad
    del held
    amp.restore(model) if back else amp.initialize(model)


def test_a_finished_graph_does_not_stop_it():
    """``loss`` of the last step is still a variable in every notebook."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    loss = model(torch.randn(2, 8)).sum()
    loss.backward()
    amp.initialize(model)
    model(torch.randn(2, 8)).sum().backward()
    assert loss.isfinite()


def test_a_model_on_the_meta_device_gets_its_values_later():
    """Memory that ``to_empty`` brings holds anything; a history must not start with it. (Plain parameters become other
    objects there, which no optimizer built before holds: torch's way, so there are none here.)"""

    def layers() -> nn.Sequential:
        return nn.Sequential(nn.Linear(300, 16, bias=False), nn.Linear(16, 4, bias=False))

    source = layers()
    with torch.device("meta"):
        model = layers()
    model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters()))
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    direct, other = amp.initialize(source, torch.optim.AdamW(source.parameters()))
    x = torch.randn(4, 300)
    for m, o in ((model, optimizer), (direct, other)):
        for _ in range(2):
            m(x).sum().backward()
            o.step()
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), direct.parameters()))


# --- report ---------------------------------------------------------------------------------------------------------


class TestReport:
    def test_shares_are_of_the_linear_flops_and_of_the_bytes(self):
        model = nn.Sequential()
        model.body, model.lm_head = nn.Linear(96, 64), nn.Linear(64, 32)
        amp.initialize(model)
        report = amp.fp8_report(model)
        assert report.flops_share == 3 / 4
        stored = [2 * 96 * 64 + 4 * 64, 2 * 64 * 32 + 4 * 32]  # FP16 and one scale a row of at most 128
        assert [row.bytes for row in report.rows] == stored
        assert report.bytes_share == stored[0] / sum(stored)

    def test_computed_and_borrowed_weights_count_where_they_multiply(self):
        """16 x 16 of each; Bilinear 16 of them, attention 3 and its out_proj, an embedding's lookup none."""
        model, _ = amp.initialize(Everything())
        flops = {row.name: row.flops // (2 * 16 * 16) for row in amp.fp8_report(model).rows}
        expected = {"blocks.0.0": 2, "sub": 1, "parametrized": 1, "spectral": 1, "attention": 3, "bilinear": 16}
        assert {name: flops[name] for name in expected} == expected
        assert flops["embedding"] == flops["sparse"] == 0
        assert flops["attention.out_proj"] == 1

    def test_prints_every_layer_and_serializes(self):
        model, _ = amp.initialize(Everything())
        report = amp.fp8_report(model)
        lines = str(report).splitlines()
        for row in report.rows:
            assert any(line.startswith(f"{row.name} ") and row.product in line for line in lines)
        assert lines[-2].startswith("O2: ")
        assert lines[-1] == "saved activations: as torch keeps them"
        loaded = json.loads(json.dumps(report.as_dict()))
        assert [row["name"] for row in loaded["rows"]] == list(PRODUCTS)
        assert loaded["flops_share"] == report.flops_share

    def test_without_fp8_products_no_share_is_claimed(self):
        model, _ = amp.initialize(Everything(), level="O0")
        report = amp.fp8_report(model)
        assert report.flops_share == report.bytes_share == 0
        assert "level O0 has no FP8 products" in {row.reason for row in report.rows}

    def test_a_plain_model_has_none(self):
        with pytest.raises(ValueError, match="the model that amp.initialize returned, got a plain Linear"):
            amp.fp8_report(nn.Linear(2, 2))


def test_where_the_parameter_is_the_compute_weight_only_those_of_fp8_products_are_fp8():
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 32), nn.Linear(32, 8))
    convert(model, O3.override({"2": "bf16"}))
    assert [layer.weight.format.name for layer in model] == ["bf16", "e4m3", "bf16"]


class Doubled(ReadsAsBase, nn.Linear):
    """A Linear with something around its product."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * F.linear(input, self.weight, self.bias)


def test_a_subclass_that_reads_its_weight_as_its_base_is_converted_and_keeps_its_forward():
    model = nn.Sequential(Doubled(32, 32))
    x = torch.randn(4, 32)
    before = model(x)
    convert(model, O2)
    assert type(model[0]) is Doubled
    assert isinstance(model[0].weight, ScalingTensor)
    assert sqnr(model(x), before) > 25
    restore(model)
    assert type(model[0]) is Doubled
    assert type(model[0].weight) is nn.Parameter
    assert "gemm" not in dir(model[0])
