"""FP8 saved activations on a whole model: what is kept, what comes out, checkpointing, torch.compile, and when."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from msamp_like import amp
from msamp_like.formats import E4M3, E5M2, FP16
from msamp_like.models import gpt
from msamp_like.nn.saved_activations import SMALLEST, SavedActivations, _without_the_rest
from msamp_like.policy import O0, O2, SAVED_ACTIVATIONS, Role, Rule
from msamp_like.telemetry.activations import KeptBytes
from tests.closeness import same_bits, sqnr

CONFIG = gpt.GPTConfig(vocab_size=512, context=64, dim=128, num_layers=2, num_heads=2)
LLAMA = replace(CONFIG, norm="rmsnorm", activation="swiglu", bias=False)
FP8 = SAVED_ACTIVATIONS["fp8"]


class HandWrittenNorm(nn.Module):
    """RMSNorm as decoders on Hugging Face write it."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Decoder(nn.Module):
    """One block in the manner of Hugging Face: hand-written norms, three projections, act_fn(gate) * up."""

    def __init__(self, dim=128):
        super().__init__()
        self.input_norm, self.output_norm = HandWrittenNorm(dim), HandWrittenNorm(dim)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(dim, 3 * dim, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(3 * dim, dim, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        y = self.input_norm(x)
        heads = (p(y).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o_proj(y)
        y = self.output_norm(x)
        return x + self.down_proj(self.act_fn(self.gate_proj(y)) * self.up_proj(y))


def build(config=CONFIG, saved="fp8", level="O0", model=None):
    """O0: what is not FP8 saved activations is BF16, so that differences are theirs alone."""
    torch.manual_seed(0)
    model = gpt.GPT(config) if model is None else model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return amp.initialize(model, optimizer, level=level, saved_activations=saved, data_parallel=False)


def tokens(config=CONFIG):
    return torch.randint(0, config.vocab_size, (2, config.context + 1), generator=torch.Generator().manual_seed(1))


def run(model, batch, forward=None):
    """Loss, gradients by name, and what the forward pass kept."""
    model.zero_grad()
    with KeptBytes(model) as kept, torch.autocast("cpu", torch.bfloat16):
        loss = forward(model, batch) if forward else model(batch[:, :-1], batch[:, 1:])[1]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, kept


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["layernorm gelu", "rmsnorm swiglu"])
def test_loss_is_the_same_gradients_are_close_and_less_is_kept(config):
    plain, saved = (run(build(config, kind)[0], tokens(config)) for kind in (None, "fp8"))
    assert abs(plain[0] - saved[0]) < 1e-4  # forward is not rounded: sums run in another order
    # One E4M3 rounding of what a product with the gradient reads is 31 dB; matrices see it behind other operations.
    assert min(sqnr(plain[1][name], grad) for name, grad in saved[1].items()) > 26
    assert saved[2].total < 0.6 * plain[2].total


def test_two_bits_of_mantissa_are_too_few():
    """The negative control of the bound above: E5M2, 6 dB coarser, does not meet it."""
    policy = O0.with_rule(Role.SAVED_ACTIVATION, Rule(format=E5M2, block=FP8.block))
    plain, coarse = run(build(saved=None)[0], tokens()), run(build(saved=None, level=policy)[0], tokens())
    assert min(sqnr(plain[1][name], grad) for name, grad in coarse[1].items()) < 26


def test_hand_written_norms_and_gates():
    x, direction = torch.randn(2, 64, 128, requires_grad=True), torch.randn(128)

    def forward(model, x):
        return model(x.clone()).float() @ direction @ torch.ones(64) @ torch.ones(2)

    plain, saved = (run(build(saved=kind, model=Decoder)[0], x, forward) for kind in (None, "fp8"))
    assert abs(plain[0] / saved[0] - 1) < 1e-2  # BF16 products of values that differ in their last bits
    assert min(sqnr(plain[1][name], grad) for name, grad in saved[1].items()) > 24  # four roundings in a norm
    assert saved[2].total < 0.65 * plain[2].total


def test_o2_keeps_less_than_the_figure():
    assert run(build(level="O2")[0], tokens())[2].total < 0.5 * run(build(saved=None)[0], tokens())[2].total


def test_attention_keeps_what_it_needs_of_its_own_tensors():
    """Nothing of attention is rounded, and a value does not hold queries and keys that were rotated since."""
    model = gpt.Attention(CONFIG)
    x, tables = torch.randn(2, 64, 128, requires_grad=True), gpt.rotation_tables(64, 64, 1e4)
    with KeptBytes(model) as plain:
        expected = model(x, *tables)
    SavedActivations(FP8).attach(model)
    with KeptBytes(model) as saved:
        got = model(x, *tables)
    assert same_bits(got, expected)
    assert plain.total - saved.total == 2 * x.nbytes
    projected = torch.randn(2, 64, 3, 2, 64, requires_grad=True) * 1
    heads = [t.transpose(1, 2) for t in projected.unbind(2)]  # of one projection, whole: there is nothing to let go of
    assert all(a is b for a, b in zip(_without_the_rest(heads), heads, strict=True))


# --- checkpointing, compilation -------------------------------------------------------------------------------------


def checkpointed(model, batch):
    x = model.embed(batch[:, :-1])
    cos, sin = model.rotation(x.shape[1], x)
    for block in model.blocks:
        x = checkpoint(block, x, cos, sin, use_reentrant=False)
    return model.loss(model.lm_head(model.norm(x)).flatten(0, 1).float(), batch[:, 1:].flatten())


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_activation_checkpointing(level):
    """A block that is run again in backward keeps in FP8 what it kept: the same gradients to the bit, fewer bytes."""
    model, _ = build(level=level)
    kept, again = run(model, tokens()), run(model, tokens(), checkpointed)
    assert same_bits(kept[0], again[0])
    assert all(same_bits(kept[1][name], grad) for name, grad in again[1].items())
    assert again[2].total < 0.6 * kept[2].total
    assert model._wiring.saved.depth == 0


@pytest.mark.slow
def test_compiled_blocks():
    """One graph a block, in which the kernels are; and again in the recomputation of a checkpoint."""
    torch._dynamo.reset()  # the limit of recompilations is of a function, whichever test compiled it
    model, _ = build(replace(LLAMA, num_layers=1), level="O2")
    eager = run(model, tokens())
    model.blocks[0].compile(fullgraph=True, backend="aot_eager")
    compiled, again = run(model, tokens()), run(model, tokens(), checkpointed)
    hidden = {f"{dtype} (2, 64, {dim})" for dtype in ("bfloat16", "float32") for dim in (128, LLAMA.mlp_dim)}
    assert not hidden & set(compiled[2].by_kind())
    assert abs(eager[0] - compiled[0]) < 1e-3
    assert abs(eager[0] - again[0]) < 1e-3
    with torch.compiler.set_stance("fail_on_recompile"):
        run(model, tokens())
        run(model, tokens(), checkpointed)


# --- when it is on --------------------------------------------------------------------------------------------------


def test_off_unless_asked_for():
    for level in ("O0", "O1", "O2", "O3"):
        model, _ = build(saved=None, level=level)
        assert model._wiring.saved is None
        assert not model.blocks[0]._forward_pre_hooks
    model, _ = build(level="O2")
    assert amp.policy_of(model)[Role.SAVED_ACTIVATION] == FP8
    assert str(amp.fp8_report(model)).endswith("saved activations: e4m3, scale per 1x128 from this tensor")
    assert amp.fp8_report(build(saved="bf16")[0]).as_dict()["saved_activations"] == "as torch keeps them"


def test_without_gradients_torch_computes():
    model, _ = build()
    plain, _ = build(saved=None)
    with torch.no_grad():
        assert same_bits(model(tokens()[:, :-1]), plain(tokens()[:, :-1]))
    with torch.inference_mode():
        assert same_bits(model.eval()(tokens()[:, :-1]), plain.eval()(tokens()[:, :-1]))


def test_restore_and_deepcopy():
    model, _ = build()
    twin = copy.deepcopy(model)
    before = run(model, tokens())
    assert run(twin, tokens())[2].total == before[2].total
    assert twin._wiring.saved is not model._wiring.saved
    for m in (model, twin):
        amp.restore(m)
    plain = run(amp.restore(build(saved=None)[0]), tokens())
    assert run(model, tokens())[2].total == run(twin, tokens())[2].total == plain[2].total
    assert not model.blocks[0]._forward_pre_hooks
    assert run(model, tokens())[2].total > 1.5 * before[2].total


def test_an_error_in_forward_switches_off():
    model, _ = build()
    with pytest.raises(ValueError, match="at most 64 tokens"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    assert model._wiring.saved.depth == 0
    x = torch.randn(64, 128, requires_grad=True)
    assert F.gelu(x).grad_fn.name() == "GeluBackward0"


@pytest.mark.parametrize(
    "rule", [Rule(format=E4M3), Rule(format=E4M3, block=(1, 256)), Rule(format=FP16, block=(1, 64))]
)
def test_a_rule_that_no_kernel_keeps_is_refused(rule):
    with pytest.raises(ValueError, match="saved activations are FP8 with a scale for each 16 to 128"):
        build(saved=None, level=O2.with_rule(Role.SAVED_ACTIVATION, rule))
    with pytest.raises(ValueError, match="must be one of bf16, fp8, got 'fp4'"):
        build(saved="fp4")


# --- what is left to torch ------------------------------------------------------------------------------------------

X = torch.randn(64, 128)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.cross_entropy(x, X.softmax(-1)),
        lambda x: F.cross_entropy(x, torch.zeros(64, dtype=torch.int64), label_smoothing=0.1),
        lambda x: F.cross_entropy(x, torch.zeros(64, dtype=torch.int64), weight=torch.ones(128)),
        lambda x: F.layer_norm(x, (64, 128)),
        lambda x: F.silu(x.clone(), inplace=True),
        lambda x: x * X,
        lambda x: x * 2,
        lambda x: x**3,
        lambda x: 2**x,
        lambda x: F.gelu(x[:8]),
    ],
)
def test_left_to_torch(call):
    x = X.clone().requires_grad_()
    assert x[:8].numel() < SMALLEST
    with SavedActivations(FP8):
        made = call(x)
    assert same_bits(made, call(x))
    assert made.grad_fn.name() == call(x).grad_fn.name()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy(reduction, dtype):
    logits = (torch.randn(64, 300) * 3).to(dtype).requires_grad_()
    targets = torch.randint(0, 300, (64,)).masked_fill(torch.rand(64) < 0.2, -100)
    expected = F.cross_entropy(logits, targets, reduction=reduction)
    with SavedActivations(FP8):
        got = F.cross_entropy(logits, targets, reduction=reduction)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (expected, got)]
    assert sqnr(*grads) > 31  # a softmax is rounded once, the part of the target not at all
    assert not grads[1][targets == -100].any()
    with SavedActivations(FP8), pytest.raises(RuntimeError, match="out of bounds"):
        F.cross_entropy(logits, torch.full((64,), 300))


def test_rms_norm_without_eps():
    """Which eps stands for none depends on dtype and version; in FP32 it is FP32's."""
    for dtype, name in ((torch.float32, "_NormBackward"), (torch.bfloat16, None)):
        x = (torch.randn(64, 128) * 1e-3).to(dtype).requires_grad_()
        with SavedActivations(FP8):
            got = nn.RMSNorm(128, dtype=dtype)(x)
        expected = nn.RMSNorm(128, dtype=dtype)(x)
        assert sqnr(expected, got) > 100
        assert got.grad_fn.name() == (name or expected.grad_fn.name())
