"""GPT against an independent plain forward, and the properties that make it a causal model with relative positions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from msamp_like.models.gpt import GPT, PRESETS, GPTConfig, rotate, rotation_tables

SMALL = GPTConfig(vocab_size=37, context=24, dim=32, num_layers=2, num_heads=2)
VARIANTS = {
    "gpt3": SMALL,
    "no bias": replace(SMALL, bias=False),
    "rmsnorm": replace(SMALL, norm="rmsnorm"),
    "swiglu": replace(SMALL, activation="swiglu", hidden_dim=48),
    "llama": replace(SMALL, norm="rmsnorm", activation="swiglu", bias=False, tied=False),
}


def make(config: GPTConfig) -> GPT:
    """A model whose every parameter is random: zero biases and unit norms would hide a forgotten term."""
    torch.manual_seed(1)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.double()


def reference_logits(model: GPT, tokens_BT: Tensor) -> Tensor:
    """The same function written from the equations: complex rotations, an explicit mask, one head at a time."""
    config, weights = model.config, dict(model.state_dict())
    head_dim = config.dim // config.num_heads

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def norm(x: Tensor, name: str) -> Tensor:
        if config.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weights[f"{name}.weight"]
        return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x

    def turned(x_BTD: Tensor) -> Tensor:
        position = torch.arange(x_BTD.shape[1], dtype=torch.float64)
        frequency = torch.tensor([config.rope_base ** (-2 * i / head_dim) for i in range(head_dim // 2)]).double()
        z = torch.complex(x_BTD[..., : head_dim // 2], x_BTD[..., head_dim // 2 :])
        z = z * torch.exp(1j * position[:, None] * frequency)
        return torch.cat((z.real, z.imag), -1)

    x = weights["embed.weight"][tokens_BT]
    length = tokens_BT.shape[1]
    future = torch.arange(length)[None, :] > torch.arange(length)[:, None]
    for i in range(config.num_layers):
        q, k, v = linear(norm(x, f"blocks.{i}.attention_norm"), f"blocks.{i}.attention.qkv").chunk(3, -1)
        heads = []
        for h in range(config.num_heads):
            mine = slice(h * head_dim, (h + 1) * head_dim)
            scores = turned(q[..., mine]) @ turned(k[..., mine]).transpose(1, 2) / math.sqrt(head_dim)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., mine])
        x = x + linear(torch.cat(heads, -1), f"blocks.{i}.attention.out")
        hidden = linear(norm(x, f"blocks.{i}.mlp_norm"), f"blocks.{i}.mlp.up")
        if config.activation == "gelu":
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        else:
            gate, value = hidden.chunk(2, -1)
            hidden = gate * torch.sigmoid(gate) * value
        x = x + linear(hidden, f"blocks.{i}.mlp.down")
    return linear(norm(x, "norm"), "lm_head")


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_loss_match_the_equations(config: GPTConfig) -> None:
    model = make(config)
    tokens, targets = torch.randint(0, 37, (2, 3, 24), generator=torch.Generator().manual_seed(0))
    logits, loss = model(tokens, targets)
    expected = reference_logits(model, tokens)
    # The tables are FP32 in the model (frequencies at 1e-7 relative), FP64 in the equations.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    log_probability = expected.log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(loss.double(), -log_probability.mean(), rtol=1e-5, atol=1e-5)


def test_a_token_changes_no_earlier_logit() -> None:
    model = make(SMALL)
    tokens = torch.randint(0, 37, (1, 24), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 10] = (tokens[0, 10] + 1) % 37
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


def test_rotation_keeps_lengths_and_sees_only_distance() -> None:
    cos, sin = rotation_tables(64, 16, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 1, 64, 1, 16)
    turned_q, turned_k = rotate(q, cos, sin)[0, :, 0], rotate(k, cos, sin)[0, :, 0]
    torch.testing.assert_close(turned_q.norm(dim=-1), q[0, :, 0].norm(dim=-1))
    scores = turned_q @ turned_k.T
    for distance in (0, 1, 7, 40):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)
    assert (scores[0, 1] - scores[0, 7]).abs() > 1e-2


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("tiny", 3.2), ("small", 25.3), ("125M", 123.6), ("7B", 6_650), ("13B", 12_844), ("175B", 174_592)],
)
def test_presets_have_the_size_their_name_says(preset: str, millions: float) -> None:
    config = PRESETS[preset]
    with torch.device("meta"):
        model = GPT(config)
    dim, layers, bias = config.dim, config.num_layers, int(config.bias)
    block = 12 * dim**2 + 2 * dim + bias * (9 * dim + 2 * dim)  # products; norm weights; biases of products and norms
    assert model.num_parameters() == layers * block + (1 + bias) * dim + config.vocab_size * dim
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.01)
    products = layers * 12 * dim**2 + config.vocab_size * dim
    assert model.flops_per_token() == 6 * products + 12 * layers * dim * config.context


def test_head_is_tied_or_not() -> None:
    tied, untied = GPT(SMALL), GPT(replace(SMALL, tied=False))
    assert tied.lm_head.weight is tied.embed.weight
    assert untied.lm_head.weight is not untied.embed.weight
    assert untied.num_parameters() - tied.num_parameters() == 37 * 32
    tokens = torch.zeros(1, 4, dtype=torch.long)
    _, loss = tied(tokens, tokens)
    loss.backward()
    assert tied.embed.weight.grad is not None
    assert tied.embed.weight.grad.abs().sum(dim=1).count_nonzero() == 37  # the head reaches rows no token looked up


def test_initialisation_starts_at_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model = GPT(PRESETS["tiny"])
    assert model.blocks[0].mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[0].mlp.down.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.02)
    tokens = torch.randint(0, 256, (2, 64))
    _, loss = model(tokens, tokens.roll(-1, 1))
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


def test_a_model_from_the_meta_device_is_complete_after_reset() -> None:
    direct = GPT(SMALL)
    with torch.device("meta"):
        model = GPT(SMALL)
    model.to_empty(device="cpu")
    for either in (direct, model):
        torch.manual_seed(3)
        either.reset_parameters()
    assert model.lm_head.weight is model.embed.weight
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens), direct(tokens))


def test_autocast_stays_near_fp32() -> None:
    model = make(SMALL).float()
    tokens = torch.randint(0, 37, (2, 24), generator=torch.Generator().manual_seed(0))
    _, exact = model(tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(tokens, tokens)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "heads of an even dim"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"norm": "batchnorm"}, "norm must be one of"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_a_longer_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 24 tokens"):
        GPT(SMALL)(torch.zeros(1, 25, dtype=torch.long))
