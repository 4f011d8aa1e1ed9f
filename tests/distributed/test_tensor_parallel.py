"""A model split over ranks computes what the whole one does: outputs, gradients, steps; in FP32, and at every level."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from msamp_like import amp
from msamp_like.comm.activations import message_bytes
from msamp_like.comm.group import CountedGroup
from msamp_like.comm.parallel_layers import Context, Shard
from msamp_like.comm.tensor_parallel import (
    Column,
    Enter,
    Join,
    Row,
    Split,
    Vocab,
    VocabLoss,
    Whole,
    adopt,
    context,
    forget,
    full_state_dict,
    gather_whole,
    load_full_state_dict,
    parallelize,
    partial_gradients,
    plan_decoder,
    plan_gpt,
    sharded_parameters,
)
from msamp_like.formats import E4M3, FP32
from msamp_like.models.gpt import GPT, GPTConfig
from msamp_like.policy import LEVELS, O2, O3, Role, Rule
from msamp_like.scaling import roll
from msamp_like.tensor import real
from tests.closeness import sqnr
from tests.distributed.spy import Spy

SMALL = GPTConfig(vocab_size=48, context=32, dim=64, num_layers=2, num_heads=4)
LLAMA = replace(SMALL, norm="rmsnorm", activation="swiglu", hidden_dim=96, bias=False, tied=False)


def made(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    """Every parameter random: zero biases and unit norms would hide a forgotten term."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name and name.endswith("weight")))
            else:
                parameter.mul_(3)
    return model


def batch(config: GPTConfig = SMALL) -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(config.vocab_size, (2, 2, 16), generator=torch.Generator().manual_seed(0))
    targets[0, :3] = -100
    return tokens, targets


def whole_grads(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient of a split model as the whole model has it."""
    shards, group = sharded_parameters(model), context(model)
    parts = () if isinstance(model, amp.Converted) else {id(p) for _, p in partial_gradients(model)}
    found = {}
    for name, parameter in model.named_parameters():
        grad = real(parameter.grad).clone()
        if id(parameter) in parts:
            dist.all_reduce(grad, group=group.group)
        found[name] = whole(grad, shards[name], group) if name in shards else grad
    return found


def whole(shard: Tensor, how: Shard, group: CountedGroup) -> Tensor:
    return gather_whole(shard, how, Context(group, sequence=False))


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: real(p.grad).clone() for name, p in model.named_parameters()}


def train_step(model: nn.Module, autocast: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(*batch())[1]
    loss.backward()
    return loss.detach()


# --- the same function ----------------------------------------------------------------------------------------------


def split_and_whole(rank, world, group, config, sequence):
    """A model split before its optimizer's first step, made of other values on every rank but the first."""
    whole_model = made(config)
    model = made(config, seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parallelize(model, group, plan_gpt(config), sequence=sequence)
    reference = torch.optim.SGD(whole_model.parameters(), lr=0.1, momentum=0.9)
    worst, losses, without_sum = [], [], []
    for _ in range(2):
        expected, found = train_step(whole_model, autocast=False), train_step(model, autocast=False)
        losses.append((expected.item(), found.item()))
        summed = whole_grads(model)
        worst.append(min(sqnr(p.grad, summed[n]) for n, p in whole_model.named_parameters()))
        parts = partial_gradients(model)
        without_sum += [sqnr(whole_model.get_parameter(n).grad, p.grad) for n, p in parts]
        for _, parameter in parts:
            dist.all_reduce(parameter.grad, group=group)
        for one in (optimizer, reference):
            one.step()
            one.zero_grad()
    trained = full_state_dict(model)
    return {
        "losses": losses,
        "worst": min(worst),
        "without_sum": max(without_sum, default=0.0),
        "partial": [n for n, _ in parts],
        "weights": min(sqnr(value, trained[n]) for n, value in whole_model.state_dict().items()),
        "trained": trained,
        "shapes": {n: tuple(p.shape) for n, p in model.named_parameters()},
    }


@pytest.mark.parametrize("sequence", [False, True], ids=["whole sequences", "split sequences"])
@pytest.mark.parametrize(("world", "config"), [(2, LLAMA), (4, SMALL)], ids=["2, llama", "4, gpt"])
def test_a_split_model_computes_and_trains_as_the_whole_one(ranks, world, config, sequence):
    """In FP32 only the order of sums differs: some 1e-7 relative a sum, so at least 110 dB after four layers."""
    answers = ranks(world, split_and_whole, config, sequence)
    first = answers[0]
    for expected, found in first["losses"]:
        assert found == pytest.approx(expected, rel=1e-6)
    assert first["worst"] > 110
    assert first["weights"] > 110
    assert all(answer["losses"] == first["losses"] for answer in answers)
    assert all(torch.equal(answer["trained"][n], first["trained"][n]) for answer in answers for n in first["trained"])
    replicated = {n for n in first["shapes"] if "norm" in n or n.endswith(("out.bias", "down.bias"))}
    for name, shape in first["shapes"].items():
        assert math.prod(shape) == first["trained"][name].numel() // (1 if name in replicated else world), name
    assert set(first["partial"]) == (replicated if sequence else set())


def test_without_the_sum_over_ranks_a_partial_gradient_is_wrong(ranks):
    """The negative control: not one norm's or bias' gradient on a rank is near the whole."""
    assert ranks(2, split_and_whole, SMALL, True)[0]["without_sum"] < 15


def at_levels(rank, world, group, sequence, levels):
    """By level, for the whole model and the split one: error of the loss, and dB of each gradient, against FP32."""
    exact = made()
    loss = train_step(exact, autocast=False)
    answer = {}
    for level in levels:
        for name in ("whole", "split"):
            model = made()
            if name == "split":
                parallelize(model, group, plan_gpt(SMALL), sequence=sequence)
            amp.initialize(model, level=level, data_parallel=False)
            adopt(model, LEVELS[level])
            found = train_step(model, autocast=True)
            mine = whole_grads(model) if name == "split" else grads(model)
            answer[level, name] = abs(found - loss).item(), [sqnr(p.grad, mine[n]) for n, p in exact.named_parameters()]
        answer[level, "bits"] = found, {n: g for n, g in mine.items() if n not in sharded_parameters(model)}
    return answer


@pytest.mark.parametrize(("world", "sequence"), [(2, True), (2, False), (4, True)])
def test_a_split_model_is_as_near_fp32_at_every_level(ranks, world, sequence):
    """O0 rounds what travels to BF16, as its products' results are: within 2 dB. At O2 and O3 a second source as large
    as the first, a rounding to E4M3 a leg (31 dB), is 3 dB; 1 more for a sum of two on the way (all-reduce)."""
    answers = ranks(world, at_levels, sequence, ["O0", "O2", "O3"])
    first = answers[0]
    for level, near, least in (("O0", 2, 41), ("O2", 4, 16), ("O3", 4, 16)):
        _, whole_db = first[level, "whole"]
        error, split_db = first[level, "split"]
        assert sum(split_db) / len(split_db) > sum(whole_db) / len(whole_db) - near, level
        assert min(split_db) > least, level
        assert error < (0.001 if level == "O0" else 0.02), level  # of a loss of 4 nats
        for answer in answers:
            assert torch.equal(answer[level, "bits"][0], first[level, "bits"][0])
            for name, grad in answer[level, "bits"][1].items():
                assert torch.equal(grad, first[level, "bits"][1][name]), (level, name)


def delayed(rank, world, group, reduces):
    """Column and row under scales of the step before, in integers, whose sums have no order."""
    policy = O2.with_rule(Role.INPUT, Rule(format=E4M3, history=1)).with_rule(Role.PARTIAL_OUTPUT, Rule(format=FP32))
    draw = torch.Generator().manual_seed(0)

    def model():
        found = nn.Sequential(nn.Linear(32, 48, bias=False), nn.Linear(48, 16, bias=False))
        for layer in found:
            layer.weight.data = torch.randint(-7, 8, layer.weight.shape, generator=draw.manual_seed(1)).float()
        found[0].weight.data[24:].clamp_(-1, 1)  # so that the row-parallel layer's shards see different amaxes
        return found

    split = parallelize(model(), group, {"0": Column(), "1": Row()})
    small, large = (torch.randint(-n, n + 1, (40, 32), generator=draw).float() for n in (20, 400))
    outputs, scales = [], []
    for one in (model(), split):
        amp.initialize(one, level=policy, data_parallel=False)
        one(small)
        scalers = [layer.gemm.input for layer in one]
        if one is split and reduces:
            roll(scalers, lambda amax: dist.all_reduce(amax, dist.ReduceOp.MAX, group=group))
        else:
            roll(scalers)
        hidden = one[0](large)
        outputs.append((hidden.detach(), one(large).detach()))
        scales.append([scaler.scale_bits for scaler in scalers])
    columns = outputs[0][0].chunk(world, 1)[rank]
    return torch.equal(columns, outputs[1][0]), torch.equal(outputs[0][1], outputs[1][1]), scales[0] == scales[1]


def test_under_delayed_scales_a_split_layer_gives_the_bits_of_the_whole_one(ranks):
    assert ranks(2, delayed, True) == [(True, True, True)] * 2


def test_without_the_maximum_over_ranks_the_scales_differ(ranks):
    columns, rows, scales = zip(*ranks(2, delayed, False))
    assert all(columns)  # all ranks see the same input
    assert not all(scales)
    assert not all(rows)


# --- what travels ---------------------------------------------------------------------------------------------------


def counted(rank, world, group, level, sequence):
    model = parallelize(made(), group, plan_gpt(SMALL), sequence=sequence)
    amp.initialize(model, level=level, data_parallel=False)
    with Spy(world, rank) as spy:
        train_step(model, autocast=True)
    entries = context(model).ledger
    loss = sum(e.sent for e in entries if e.label.startswith("loss"))
    summed = sum(e.sent for e in entries if e.label.endswith("/partial"))
    activations = context(model).sent - loss - summed
    return activations, loss, summed, spy.sent, set(spy.names), {e.axis for e in entries}


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_bytes_of_a_step_are_those_of_the_plan(ranks, level, sequence):
    """A layer exchanges four times each way, the embedding and the head once; an all-reduce is two of those halves."""
    world, rows = 2, 32
    part = message_bytes(rows // world, SMALL.dim, LEVELS[level][Role.PARTIAL_OUTPUT], torch.bfloat16)
    for activations, loss, summed, seen, names, axes in ranks(world, counted, level, sequence):
        assert activations == (4 + 8 * SMALL.num_layers) * (world - 1) * part
        assert loss == (world - 1) * 3 * 4 * rows
        assert seen == activations + loss + summed
        assert (summed > 0) == sequence  # the norms' gradients, plain FP32
        # no sum or maximum ever sees a code
        assert names == {"alltoall_base", "allgather_base", *(["allreduce"] if sequence else [])}
        assert axes == {"tp"}


class Doubled(nn.Module):
    """Two layers that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def gathered_at_the_root(rank, world, group):
    model = parallelize(Doubled(), group, {"": Enter(argument="x"), "a": Column(), "b": Column()}, sequence=True)
    with Spy(world, rank) as spy:
        output = model(torch.ones(2, 4, 8))
    return tuple(output.shape), spy.names


def test_the_model_itself_can_gather_its_input_once(ranks):
    assert ranks(2, gathered_at_the_root) == [((2, 8, 8), ["allgather_base"])] * 2


# --- with the rest of torch -----------------------------------------------------------------------------------------


def ways(rank, world, group, level):
    """One step in several ways: as it is, recomputed, compiled, accumulated from halves, deep-copied, evaluated."""

    def model():
        found = parallelize(made(), group, plan_gpt(SMALL), sequence=True)
        if level:
            amp.initialize(found, level=level, data_parallel=False)
        return found

    answer = {}
    plain = model()
    answer["loss"] = train_step(plain, bool(level))
    answer["plain"] = grads(plain)
    recomputed = model()
    for block in recomputed.blocks:
        block.register_module("inner", copy.copy(block))
        block.forward = partial(checkpoint, block.inner, use_reentrant=False)
    train_step(recomputed, bool(level))
    answer["recomputed"] = {n.replace(".inner", ""): g for n, g in grads(recomputed).items()}
    compiled = model()
    compiled.blocks[0].compile(backend="aot_eager")
    train_step(compiled, bool(level))
    answer["compiled"] = grads(compiled)
    torch._dynamo.reset()
    copied = copy.deepcopy(model())
    train_step(copied, bool(level))
    answer["copied"] = grads(copied)
    for name, parameter in partial_gradients(copied):  # a copy stands outside of what reduces gradients
        if level:
            dist.all_reduce(parameter.grad, group=group)
            answer["copied"][name] = parameter.grad
    context(plain).end_step()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bool(level)):
        logits, answer["evaluated"] = plain(*batch())
    answer["forward only"] = all(e.label.endswith("/forward") for e in context(plain).ledger)
    answer["logits"] = tuple(logits.shape)
    return answer


@pytest.mark.parametrize("level", [None, "O3"])
def test_recomputed_compiled_and_copied_models_give_the_same_bits(ranks, level):
    for answer in ranks(2, ways, level):
        for way in ("recomputed", "compiled", "copied"):
            assert answer[way].keys() == answer["plain"].keys()
            assert all(torch.equal(answer[way][n], grad) for n, grad in answer["plain"].items()), way
        assert torch.equal(answer["evaluated"], answer["loss"])
        assert answer["forward only"]
        assert answer["logits"] == (2, 16, SMALL.vocab_size // 2)


def kept(rank, world, group):
    """What hangs on a parameter; and a graph from before, which torch refuses to run."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    weight = model[0].weight
    weight.note = "mine"
    seen = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    before = model(torch.ones(1, 8)).sum()
    parallelize(model, group, {"0": Column(gather_output=True)})
    with pytest.raises(RuntimeError, match="poisoned"):
        before.backward()
    model(torch.ones(1, 8)).sum().backward()
    return weight is model[0].weight and weight.note == "mine", seen


def test_a_parameter_stays_itself_with_its_hooks(ranks):
    assert ranks(2, kept) == [(True, [(4, 8)])] * 2


def accumulated(rank, world, group):
    whole_model, model = made(), parallelize(made(), group, plan_gpt(SMALL, gather_logits=True), sequence=True)
    for part in zip(*(t.chunk(2) for t in batch())):
        for one in (whole_model, model):
            one(*part)[1].backward()
    logits = [one(batch()[0]).detach() for one in (whole_model, model)]
    summed = whole_grads(model)
    return min(sqnr(p.grad, summed[n]) for n, p in whole_model.named_parameters()), sqnr(*logits)


def test_gradients_accumulate_and_logits_can_be_whole(ranks):
    for least, logits in ranks(2, accumulated):
        assert least > 110
        assert logits > 110


def ends(rank, world, group):
    """Split sequences between a replicated embedding and a replicated head that is tied to it."""
    plan = {
        **{name: entry for name, entry in plan_gpt(SMALL).items() if name.startswith("blocks")},
        "embed": Whole(),
        "blocks.0": Split(),
        "norm": Join(),
        "lm_head": Whole(),
    }
    whole_model, model = made(), parallelize(made(), group, plan, sequence=True)
    losses = [train_step(one, autocast=False).item() for one in (whole_model, model)]
    summed = whole_grads(model)
    return losses, min(sqnr(p.grad, summed[n]) for n, p in whole_model.named_parameters())


def test_sequences_are_split_and_joined_where_the_plan_says(ranks):
    for (expected, found), worst in ranks(2, ends):
        assert found == pytest.approx(expected, rel=1e-6)
        assert worst > 110


# --- a decoder in Llama's names -------------------------------------------------------------------------------------


class DecoderAttention(nn.Module):
    """Grouped queries, norms of queries and keys, called by keyword, heads counted from the projection."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.groups = heads // kv_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj, self.v_proj = (nn.Linear(dim, kv_heads * self.head_dim) for _ in range(2))
        self.o_proj = nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (self.q_norm(q) * positions).transpose(1, 2), (self.k_norm(k) * positions).transpose(1, 2)
        k, v = (x.repeat_interleave(self.groups, 1) for x in (k, v.transpose(1, 2)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class DecoderMLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, 96, bias=False), nn.Linear(dim, 96, bias=False)
        self.down_proj = nn.Linear(96, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.self_attn, self.mlp = DecoderAttention(dim, 8, 4), DecoderMLP(dim)

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), positions=positions)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Decoder(nn.Module):
    """As Hugging Face lays one out: positions from the embeddings' length, the head beside the model, tied to it."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(48, dim, padding_idx=30)
        self.model.layers = nn.ModuleList(DecoderLayer(dim) for _ in range(2))
        self.model.norm = nn.RMSNorm(dim)
        self.lm_head = nn.Linear(dim, 48, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.model.embed_tokens(tokens)
        positions = torch.linspace(0.5, 2, x.shape[1])[:, None, None]
        for layer in self.model.layers:
            x = layer(x, positions)
        logits = self.lm_head(self.model.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def decoder(rank, world, group, sequence):
    torch.manual_seed(0)
    whole_model = Decoder()
    torch.manual_seed(0)
    model = parallelize(Decoder(), group, plan_decoder(head_dim=8, qk_norm=True), sequence=sequence)
    copied = copy.deepcopy(model)  # whose hooks lead to a context of its own
    adopt(copied, O3)
    rounded = train_step(copied, autocast=False)
    context(model).end_step()
    expected, found = (train_step(one, autocast=False) for one in (whole_model, model))
    summed = whole_grads(model)
    worst = min(sqnr(p.grad, summed[n]) for n, p in whole_model.named_parameters())
    calls = {e.label: e.calls for e in context(model).ledger if "layers.0" in e.label and e.collective == "all_gather"}
    separate = found != rounded and context(copied) is context(model) and sharded_parameters(copied) != {}
    return abs(expected - found).item(), worst, calls, [n for n, _ in partial_gradients(copied)], separate


@pytest.mark.parametrize("sequence", [False, True])
def test_a_decoder_gathers_once_for_all_projections_of_one_input(ranks, sequence):
    for error, worst, calls, partial_names, separate in ranks(4, decoder, sequence):
        assert separate
        assert error < 1e-5
        assert worst > 110
        assert not any(f".{name}_proj" in label for name in ("q", "k", "v", "gate", "up") for label in calls)
        wanted = "forward" if sequence else "backward"
        assert calls[f"model.layers.0.self_attn/{wanted}"] == calls[f"model.layers.0.mlp/{wanted}"] == 1
        assert "model.layers.0.self_attn.q_norm.weight" in partial_names
        assert ("model.norm.weight" in partial_names) == sequence


# --- the vocabulary -------------------------------------------------------------------------------------------------


def cross_entropy(rank, world, group):
    torch.manual_seed(0)
    logits, target = torch.randn(50, 32) * 5, torch.randint(32, (50,))
    target[:7] = -100
    logits[3, :16] = -torch.inf  # all that the first rank has
    answer = {}
    for dtype in (torch.float32, torch.bfloat16):
        for reduction in ("mean", "sum"):
            reference = logits.to(dtype).float().clone().requires_grad_()
            expected = F.cross_entropy(reference, target, reduction=reduction)
            expected.backward()
            model = nn.Sequential(nn.Linear(4, 4), nn.CrossEntropyLoss(reduction=reduction))
            loss = parallelize(model, group, {"0": Column(), "1": VocabLoss()})[1]
            shard = logits.to(dtype).chunk(world, 1)[rank].clone().requires_grad_()
            found = loss(shard, target)
            found.backward()
            grad = whole(shard.grad.float(), Shard(1, 1), context(loss))
            answer[dtype, reduction] = abs(found / expected - 1).item(), sqnr(reference.grad, grad), found.detach()
    target[9] = 32
    answer["beyond"] = loss(shard, target).item()
    return answer


def test_cross_entropy_of_a_split_vocabulary(ranks):
    """FP32 inside whatever the logits are; their gradient has their dtype: one rounding to BF16 is 50 dB at least."""
    answers = ranks(2, cross_entropy)
    for answer in answers:
        assert answer.pop("beyond") == math.inf
        for (dtype, reduction), (error, grad_db, loss) in answer.items():
            assert error < 1e-6
            assert grad_db > (120 if dtype == torch.float32 else 50)
            assert loss.dtype == torch.float32
            assert torch.equal(loss, answers[0][dtype, reduction][2])


# --- whole states ---------------------------------------------------------------------------------------------------


def states(rank, world, group):
    whole_state = made(LLAMA).state_dict()
    model = parallelize(made(LLAMA, seed=7), group, plan_gpt(LLAMA), sequence=True)
    load_full_state_dict(model, whole_state)
    loaded = full_state_dict(model)
    amp.initialize(model, level="O2", data_parallel=False)
    adopt(model, LEVELS["O2"])
    stored = full_state_dict(model)
    amp.restore(model)
    forget(model)
    found = full_state_dict(model)
    return (
        all(torch.equal(loaded[n], value) for n, value in whole_state.items()),
        min(sqnr(value, stored[n]) for n, value in whole_state.items()),
        all(torch.equal(found[n], stored[n]) for n in whole_state),
        {type(t) for t in stored.values()} == {Tensor},
        isinstance(model.blocks[0].mlp.up, nn.Linear) and sqnr(*(m(batch()[0]) for m in (model, model))) == math.inf,
    )


def test_a_whole_state_is_taken_and_loaded(ranks):
    """FP16 with a scale is 73 dB."""
    for loaded, stored, restored, plain, runs in ranks(2, states):
        assert loaded
        assert stored > 70
        assert restored
        assert plain
        assert runs


# --- what is refused ------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.conv = nn.Conv1d(4, 4, 1)
        self.lookup = nn.Embedding(10, 4, max_norm=1.0)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight


def converted() -> nn.Module:
    return amp.initialize(made(), level="O2", data_parallel=False)[0]


def with_gradient() -> nn.Module:
    model = made()
    train_step(model, autocast=False)
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return GPT(SMALL)


PLAN = plan_gpt(SMALL)
REFUSED: list[tuple[Callable[[], nn.Module], dict, str]] = [
    (made, {"blocks.*.attention.kqv": Column()}, r"'blocks.\*.attention.kqv', which matches none"),
    (made, {"blocks.*.mlp.up": Column(), "*.up": Row()}, r"one entry .* 'blocks.\*.mlp.up', '\*.up' for 'blocks.0"),
    (made, {**PLAN, "blocks.*.attention.qkv": Column(parts=3, unit=64)}, "heads of 64, must divide by the 2 ranks"),
    (lambda: nn.Sequential(nn.Linear(8, 9)), {"0": Column()}, "output features must divide by the 2 .* got 9 at '0'"),
    (lambda: nn.Sequential(nn.Linear(9, 8)), {"0": Row()}, "input features must divide .* got 9"),
    (lambda: nn.Sequential(nn.Embedding(9, 8)), {"0": Vocab()}, "rows of the vocabulary must divide .* got 9"),
    (made, {"embed": Vocab(), "lm_head": Row()}, "'embed' and 'lm_head' split by dims 0 and 1"),
    (made, {"lm_head": Column()}, "'lm_head' in the plan and not 'embed', whose weight is the same"),
    (Mixed, {"a": Column(), "b": Column(parts=2)}, "split by dims 0 and 0 in 1 and 2 parts"),
    (Mixed, {"attention": Column()}, "nn.MultiheadAttention multiplies .* 'attention'"),
    (Mixed, {"attention.out_proj": Row()}, "nn.MultiheadAttention multiplies .* 'attention.out_proj'"),
    (Mixed, {"conv": Column()}, "Column splits an nn.Linear, got 'conv', a Conv1d"),
    (Mixed, {"lookup": Vocab()}, "a plain lookup, got {'max_norm': 1.0} at 'lookup'"),
    (Mixed, {"loss": VocabLoss()}, "no label smoothing, got them at 'loss'"),
    (converted, PLAN, "call parallelize before amp.initialize"),
    (with_gradient, PLAN, r"call model.zero_grad\(set_to_none=True\) first"),
    (on_meta, PLAN, "on the meta device"),
    (made, {name: entry for name, entry in PLAN.items() if name != "norm"}, "none for 'norm', the first of 1"),
    (made, {**PLAN, "norm": Enter()}, "none for 'norm', the first of 1"),
]  # fmt: skip


def refused(rank, world, group):
    """The messages, and whether each model is as it was."""
    answers = []
    for make, plan, _ in REFUSED:
        model = make()
        before = [(n, type(m), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
        shapes = [p.shape for p in model.parameters()]
        with pytest.raises(ValueError) as error:
            parallelize(model, group, plan, sequence=True)
        same = before == [(n, type(m), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
        answers.append((str(error.value), same and shapes == [p.shape for p in model.parameters()]))
    model = parallelize(made(), group, PLAN, sequence=True)
    with pytest.raises(ValueError, match="parallelized once"):
        parallelize(model, group, PLAN)
    with pytest.raises(ValueError, match="15 positions at 'embed'; pad the batch"):
        model(torch.zeros(1, 15, dtype=torch.long))
    with pytest.raises(ValueError, match="history=3"):
        adopt(model, O2.with_rule(Role.PARTIAL_OUTPUT, Rule(format=E4M3, history=3)))
    loss = model.loss
    with pytest.raises(ValueError, match=r"N token ids, got shapes \(2, 3, 4\) and \(2, 3\); flatten"):
        loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))
    entered = parallelize(nn.Sequential(DecoderMLP(8)), group, {"0": Enter(), "0.*_proj": Column()})
    with pytest.raises(ValueError, match="the one named 'hidden_states', got x; name it in the plan"):
        entered[0](x=torch.zeros(1, 8))
    held = nn.Sequential(nn.Linear(8, 8))
    output = held(torch.zeros(1, 8, requires_grad=True))
    with pytest.raises(RuntimeError, match="the graph of an earlier forward"):
        parallelize(held, group, {"0": Column()})
    del output
    with pytest.raises(ValueError, match="plan 0 Column.* on rank 0 and Row.* on rank 1"):
        parallelize(nn.Sequential(nn.Linear(8, 8)), group, {"0": Row() if rank else Column()})
    with pytest.raises(ValueError, match=r"one axis of a mesh, got the axes \('dp', 'tp'\)"):
        parallelize(made(), init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")), PLAN)
    return answers


def test_what_is_refused_and_why(ranks):
    for answers in ranks(2, refused):
        for (message, unchanged), (_, _, expected) in zip(answers, REFUSED):
            assert re.search(expected, message), message
            assert unchanged


def test_entries_are_checked():
    with pytest.raises(ValueError, match="of one projection"):
        Column(parts=3, gather_output=True)
    with pytest.raises(ValueError, match="at least 1, got 0 and 1"):
        Column(parts=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Row(unit=0)


def over_a_mesh(rank, world, group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize(made(seed=rank), mesh["tp"], plan_gpt(SMALL), sequence=True)
    alone = made()
    one = init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "tp"))["tp"]
    same = parallelize(alone, one, plan_gpt(SMALL), sequence=True) is alone
    found = context(model)
    unchanged = same and context(alone) is None and not partial_gradients(alone) and type(alone.lm_head) is nn.Linear
    return found.world, found.axis, sum(p.sum() for p in full_state_dict(model).values()).item(), unchanged


def test_a_mesh_axis_is_a_group_and_one_rank_is_no_split(ranks):
    answers = ranks(4, over_a_mesh)
    assert all(answer[:2] == (2, "tp") and answer[3] for answer in answers)
    sums = [answer[2] for answer in answers]
    assert sums[0] == sums[1] != sums[2] == sums[3]  # the first rank's of each tensor-parallel group
