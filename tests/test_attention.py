"""FP8 attention beside FP32: how close, what a later token may change, grouped heads, what is left to torch."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msamp_like import amp, kernels
from msamp_like.formats import E4M3, E5M2, ROW, WHOLE
from msamp_like.kernels import Operand, attention, reference
from msamp_like.models.gpt import GPT, PRESETS
from msamp_like.nn.attention import Fp8Attention, scaled_dot_product_attention
from msamp_like.policy import O0
from tests.closeness import sqnr


def inputs(rows: int = 150, keys: int = 150, heads: int = 4, key_heads: int = 4, dim: int = 32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, rows, dim), (2, key_heads, keys, dim), (2, key_heads, keys, dim), (2, heads, rows, dim)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def grads(function, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, **options) -> list[Tensor]:
    """[output, dQ, dK, dV]."""
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    output = function(*leaves, **options)
    output.backward(grad.to(output.dtype))
    return [output.detach(), *(x.grad for x in leaves)]


CASES = {
    "square": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "one tile": ({"rows": 33, "keys": 33}, {"is_causal": True}),
    "longer keys": ({"rows": 70, "keys": 150}, {"scale": 0.3}),
    "grouped": ({"key_heads": 2}, {"is_causal": True, "enable_gqa": True}),
    "one key head": ({"key_heads": 1, "dim": 24}, {"enable_gqa": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("grad_format", [E5M2, E4M3], ids=str)
def test_output_and_gradients_keep_what_products_keep(case, grad_format):
    """A product of two E4M3 casts keeps 28 dB. The output has that of Q K^T, damped by the softmax, and P V; a gradient
    has one of E5M2 (25 dB a cast) and what came before it: 21. The sharper softmax of a larger scale costs one more."""
    sizes, options = CASES[case]
    tensors = inputs(**sizes)
    exact = grads(F.scaled_dot_product_attention, *tensors, **options)
    low = grads(scaled_dot_product_attention, *tensors, grad_format=grad_format, **options)
    floors = [22.5, *([21.0] * 3 if grad_format is E4M3 else [18.0] * 3)]
    for name, want, got, floor in zip(("output", "dQ", "dK", "dV"), exact, low, floors, strict=True):
        assert got.shape == want.shape
        assert sqnr(want, got) > floor, name


def run(query: Tensor, key: Tensor, value: Tensor, block) -> Tensor:
    stored = [Operand(*reference.quantize_current(x, E4M3, block)[:2], block) for x in (query, key, value)]
    return kernels.attention_forward(*stored, 0.2, True, torch.float32)[0]


@pytest.mark.parametrize("factor", [1e3, 1e-3, float("inf"), float("nan")])
def test_a_later_token_changes_no_bit_of_an_earlier_output(factor):
    query, key, value, _ = inputs()
    token = 100
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, :, token] *= factor
    before, after = run(query, key, value, ROW), run(*changed, ROW)
    assert torch.equal(before[:, :, :token], after[:, :, :token])
    assert not torch.equal(before[:, :, token:], after[:, :, token:])


def test_one_scale_for_all_tokens_lets_the_future_through():
    """The negative control: a later token of another size moves the scale of those before it."""
    query, key, value, _ = inputs()
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, :, 100] *= 1e5
    before, after = run(query, key, value, WHOLE), run(*changed, WHOLE)
    assert not torch.equal(before[:, :, :100], after[:, :, :100])
    assert sqnr(before[:, :, :100], after[:, :, :100]) < 30


def test_samples_and_heads_do_not_see_each_other():
    query, key, value, _ = inputs()
    whole = run(query, key, value, ROW)
    assert torch.equal(whole[1:], run(query[1:], key[1:], value[1:], ROW))
    torch.testing.assert_close(whole[:, 2:], run(query[:, 2:], key[:, 2:], value[:, 2:], ROW), rtol=1e-6, atol=1e-6)


def test_a_token_of_another_size_keeps_its_own_precision():
    """Rows of a thousandth beside rows of 1: with a scale a row their gradients keep what the others keep."""
    query, key, value, grad = inputs()
    value[:, :, ::2] *= 1e-3
    grad[:, :, ::2] *= 1e-3
    exact = grads(F.scaled_dot_product_attention, query, key, value, grad, is_causal=True)
    low = grads(scaled_dot_product_attention, query, key, value, grad, is_causal=True)
    assert all(sqnr(a[:, :, ::2], b[:, :, ::2]) > 18 for a, b in zip(exact, low, strict=True))


def test_memory_is_linear_in_the_length(monkeypatch):
    """No tensor is larger than a tile of scores: rows times TILE keys."""
    seen = []
    quantize = reference.quantize_current

    def watched(x, *arguments):
        seen.append(x.shape[-1])
        return quantize(x, *arguments)

    monkeypatch.setattr(attention.reference, "quantize_current", watched)
    query, key, value, grad = inputs(rows=300, keys=300, heads=1, key_heads=1)
    grads(scaled_dot_product_attention, query, key, value, grad)
    assert max(seen) == attention.TILE


def test_what_backward_keeps_is_a_byte_an_element_and_the_output():
    query, key, value, _ = (x.requires_grad_() for x in inputs())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x), torch.autocast("cpu"):
        scaled_dot_product_attention(query, key, value)
    elements, rows = query.numel(), query.numel() // query.shape[-1]
    assert sum(x.nbytes for x in kept) == 3 * elements + 3 * 4 * rows + 2 * elements + 4 * rows


# --- the mode -------------------------------------------------------------------------------------------------------


def test_the_mode_takes_torchs_calls_and_gives_them_back():
    query, key, value, _ = inputs()
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    with Fp8Attention() as mode:
        low = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert (mode.taken, mode.left) == (1, 0)
    assert torch.equal(low, scaled_dot_product_attention(query, key, value, is_causal=True))
    assert torch.equal(plain, F.scaled_dot_product_attention(query, key, value, is_causal=True))
    with Fp8Attention(O0) as mode:
        assert torch.equal(plain, F.scaled_dot_product_attention(query, key, value, is_causal=True))
    assert mode.taken == 0


def test_what_it_cannot_take_stays_torchs_and_is_named_once(caplog):
    query, key, value, _ = inputs()
    mask = torch.ones(150, 150, dtype=torch.bool).tril()
    with Fp8Attention() as mode, caplog.at_level(logging.WARNING):
        for _ in range(2):
            got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.equal(got, F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
    assert (mode.taken, mode.left) == (0, 2)
    assert [r.getMessage() for r in caplog.records] == ["an attention stays in torch's precision: it has attn_mask"]


@pytest.mark.parametrize(
    ("options", "told"),
    [({"attn_mask": torch.ones(150, 150)}, "got attn_mask"), ({"dropout_p": 0.1}, "got dropout_p=0.1")],
)
def test_the_function_refuses_what_it_has_not(options, told):
    query, key, value, _ = inputs()
    with pytest.raises(ValueError, match=told):
        scaled_dot_product_attention(query, key, value, **options)
    with pytest.raises(ValueError, match="enable_gqa=False"):
        scaled_dot_product_attention(query, key[:, :2], value[:, :2])


def train(*, fp8: bool, level: str = "O2") -> tuple[float, int]:
    torch.manual_seed(0)
    model = GPT(PRESETS["tiny"])
    model.blocks = nn.ModuleList(list(model.blocks)[:1])
    model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters(), lr=3e-3), level=level)
    tokens = torch.arange(4 * 65).remainder(23).view(4, 65)
    taken = 0
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16), Fp8Attention(*(() if fp8 else (O0,))) as mode:
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken += mode.taken
    return loss.item(), taken


def test_a_model_trains_as_without_it():
    (low, taken), (plain, none) = train(fp8=True), train(fp8=False)
    assert (taken, none) == (8, 0)
    assert low == pytest.approx(plain, rel=0.05)


def test_shapes_without_data():
    with torch._subclasses.FakeTensorMode():
        query, key = torch.empty(2, 4, 10, 16), torch.empty(2, 2, 12, 16)
        assert scaled_dot_product_attention(query, key, key, enable_gqa=True).shape == query.shape
