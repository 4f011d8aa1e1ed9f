"""Stages on torch's schedules: what crosses is codes and scales, and nothing else about the training changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msamp_like import amp
from msamp_like.comm.pipeline import Boundary, decode, encode
from msamp_like.formats import BF16, E4M3, E5M2, FP16, FP32, ROW, WHOLE
from msamp_like.models.gpt import GPT, GPTConfig
from msamp_like.policy import O3, Role, Rule
from msamp_like.scaling import Scaler, quantize
from msamp_like.tensor import ScalingTensor, real
from tests.closeness import same_bits, sqnr

PARTIAL = O3[Role.PARTIAL_OUTPUT]
PLAIN = Rule(format=FP32)
CONFIG = GPTConfig(vocab_size=64, context=16, dim=128, num_layers=8, num_heads=2, tied=False)
SHAPE = (CONFIG.context, CONFIG.dim)
BATCH, MICRO_BATCHES = 8, 4
CASES = [(2, 2, "1F1B"), (4, 4, "1F1B"), (2, 4, "Interleaved1F1B"), (4, 8, "Interleaved1F1B")]
"""Ranks, stages and schedule."""

# --- carriers, in one process ---------------------------------------------------------------------------------------

RULES = [
    PARTIAL,
    Rule(format=E5M2, block=(1, 32)),
    Rule(format=E4M3, block=ROW, power_of_two=False),
    Rule(format=E4M3, block=WHOLE),
    Rule(format=FP16, block=(1, 128)),
]


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Activations of very different magnitude from row to row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** torch.randn(*shape[:-1], 1, generator=generator)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6, 256), (1, 3, 129), (3, 7), (2, 1, 1)])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_activation_and_gradient_are_rounded_once_each(rule, shape, dtype):
    """Both directions give the bits of one cast, in the dtype that each side works in."""
    boundary = Boundary(rule=rule, shape=shape[1:], dtype=torch.float32)
    x, grad = sample(shape, dtype).requires_grad_(), sample(shape, seed=1)
    carrier = encode(x, boundary)
    assert carrier.shape == boundary.example(shape[0]).shape
    assert carrier.dtype == boundary.example(shape[0]).dtype
    assert carrier.nbytes == shape[0] * boundary.sample_bytes
    assert carrier.is_contiguous()
    output = decode(carrier, boundary)
    assert same_bits(output, quantize(x.detach(), rule).dequantize(torch.float32))
    output.backward(grad)
    assert same_bits(x.grad, quantize(grad, rule).dequantize(dtype))


def test_bytes_are_half_of_bf16():
    boundary = Boundary(rule=PARTIAL, shape=(256, 768))
    assert boundary.sample_bytes == 256 * 768 * (1 + 4 / 128) + 2  # codes, scales, the mark
    assert boundary.sample_bytes / (256 * 768 * BF16.bytes) < 0.516
    assert Boundary(rule=PLAIN, shape=(256, 768)).sample_bytes == 256 * 768 * 4


def every_word() -> Tensor:
    """All 65,536 words that a carrier could hold, every NaN among them."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(256, 256).view(torch.bfloat16)


def test_every_copy_keeps_every_bit():
    carrier = every_word()
    buffer = torch.empty_strided(carrier.shape, carrier.stride(), dtype=carrier.dtype)
    buffer.copy_(carrier)
    for copy in (buffer, carrier.clone(), carrier.detach(), torch.cat(carrier.split(5)), carrier[:, None].squeeze(1)):
        assert same_bits(copy, carrier)


def passed_on(rank: int, world: int, group: dist.ProcessGroup) -> Tensor:
    """Every word, sent from rank 0 to rank 1 as the schedules send."""
    buffer = every_word() if rank == 0 else torch.empty(256, 256, dtype=torch.bfloat16)
    operation = dist.P2POp(dist.isend if rank == 0 else dist.irecv, buffer, 1 - rank)
    for work in dist.batch_isend_irecv([operation]):
        work.wait()
    return buffer


def test_a_send_keeps_every_bit(ranks):
    assert same_bits(ranks(2, passed_on)[1], every_word())


COMPUTED = {
    "half": lambda c: c * 0.5,
    "times one": lambda c: c * 1.0,
    "plus zero": lambda c: c + torch.zeros_like(c),
    "sum of two": lambda c: c + c,
    "another dtype and back": lambda c: c.float().bfloat16(),
    "ones": torch.ones_like,
    "one row of two": lambda c: torch.cat([c[:1], c[1:] / 2]),
}


@pytest.mark.parametrize("operation", COMPUTED, ids=str)
def test_a_carrier_that_was_computed_with_decodes_to_nan(operation):
    boundary = Boundary(rule=PARTIAL, shape=(4, 256))
    x = sample((2, 4, 256))
    spoilt = decode(COMPUTED[operation](encode(x, boundary)), boundary)
    if operation == "one row of two":
        assert same_bits(spoilt[0], quantize(x, PARTIAL).dequantize(torch.float32)[0])
        spoilt = spoilt[1]
    assert spoilt.isnan().all()


def test_zeros_for_a_missing_gradient_decode_to_zeros():
    boundary = Boundary(rule=PARTIAL, shape=(4, 256))
    assert torch.equal(
        decode(torch.zeros_like(encode(sample((2, 4, 256)), boundary)), boundary), torch.zeros(2, 4, 256)
    )


def test_a_value_that_is_not_finite_flags_its_block_alone():
    boundary = Boundary(rule=PARTIAL, shape=(4, 256))
    x = sample((2, 4, 256))
    x[1, 2, 200] = torch.inf
    finite = decode(encode(x, boundary), boundary).isfinite()
    assert not finite[1, 2, 128:].any()
    finite[1, 2, 128:] = True
    assert finite.all()


def test_a_rule_without_scales_wraps_nothing():
    stage = nn.Linear(8, 8)
    for rule in (Rule(format=BF16), Rule(format=FP32)):
        boundary = Boundary(rule=rule, shape=(8,), dtype=torch.bfloat16)
        assert boundary.wrap(stage, first=False, last=False) is stage
        assert boundary.example(3).shape == (3, 8)
    assert Boundary(rule=PARTIAL, shape=(8,)).wrap(stage, first=False, last=False) is not stage


def test_what_cannot_cross_is_refused():
    boundary = Boundary(rule=PARTIAL, shape=(4, 256))
    with pytest.raises(ValueError, match=r"got \(5, 256\)"):
        encode(torch.zeros(2, 5, 256), boundary)
    with pytest.raises(ValueError, match="got tuple"):
        encode((torch.zeros(2, 4, 256),), boundary)
    with pytest.raises(ValueError, match="one and the same Boundary"):
        decode(torch.zeros(2, 4, 256), boundary)
    with pytest.raises(ValueError, match="history=0"):
        Boundary(rule=Rule(format=E4M3, history=16), shape=(8,))
    with pytest.raises(ValueError, match="use \\(1, 128\\)"):
        Boundary(rule=Rule(format=E4M3, block=(128, 128)), shape=(8,))
    with pytest.raises(ValueError, match="without the batch"):
        Boundary(rule=PARTIAL, shape=())


# --- a GPT in stages ------------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """Some blocks of a GPT, with the embedding if they are the first and the head if they are the last; parameters
    keep the names that they have in the whole."""

    def __init__(self, model: GPT, layers: range) -> None:
        super().__init__()
        self.embed = model.embed if layers.start == 0 else None
        self.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in layers})
        last = layers.stop == len(model.blocks)
        self.norm, self.lm_head = (model.norm, model.lm_head) if last else (None, None)
        self.register_buffer("cos", model.cos, persistent=False)
        self.register_buffer("sin", model.sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for block in self.blocks.values():
            x = block(x, self.cos[: x.shape[1]], self.sin[: x.shape[1]])
        return x if self.lm_head is None else self.lm_head(self.norm(x))


def stages(model: GPT, num: int) -> list[Stage]:
    """``model`` cut into ``num`` stages of equally many blocks; their weights are the model's."""
    count = len(model.blocks) // num
    return [Stage(model, range(i * count, (i + 1) * count)) for i in range(num)]


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of one step: sequences that repeat with a short period, which a model learns at once."""
    start = torch.randint(8, (BATCH, 1), generator=torch.Generator().manual_seed(step % 2))
    tokens = (start + torch.arange(CONFIG.context + 1)) % 8
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # PyTorch 2.11 compares strides with the example


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=3e-3)


def fresh() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def stored_bits(model: nn.Module) -> dict[str, Any]:
    return {name: real(p.grad).clone() for name, p in model.named_parameters()}


def histories(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.history.clone() for n, m in model.named_modules() if isinstance(m, Scaler) and m.rule.history}


class Halved(nn.Module):
    """What no schedule does: it computes with the carrier on its way."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, carrier: Tensor) -> Tensor:
        return self.module(carrier * 0.5)


class Sent(TorchDispatchMode):
    """What this rank hands to point-to-point sends, as dtype and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func.__name__.startswith("send"):
            self.calls += [(t.dtype, t.nbytes) for t in tree_leaves(args) if isinstance(t, Tensor)]
        return func(*args, **(kwargs or {}))


def pipelined(
    rank: int,
    world: int,
    group: dist.ProcessGroup,
    num: int,
    schedule: str,
    level: str,
    rule: Rule,
    steps: int = 1,
    static: bool = True,
    halved: bool = False,
) -> dict[str, Any]:
    """Train the GPT in ``num`` stages; what this rank has of the losses, first gradients and histories."""
    boundary = Boundary(rule=rule, shape=SHAPE)
    micro = BATCH // MICRO_BATCHES
    tokens = torch.empty(micro, CONFIG.context, dtype=torch.int64, device="meta")
    logits = torch.empty(micro, CONFIG.context, CONFIG.vocab_size, device="meta")
    made = []
    own = {index: stage for index, stage in enumerate(stages(fresh(), num)) if index % world == rank}
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("pp",))
    model = nn.ModuleList(own.values())  # a rank's stages are one model: one norm, one decision to skip
    model, optimizer = amp.initialize(model, optimizer_of(model), level=level, mesh=mesh)
    for index, module in own.items():
        first, last = index == 0, index == num - 1
        known = {
            "input_args": tokens if first else boundary.example(micro),
            "output_args": logits if last else boundary.example(micro),
        }
        wrapped = boundary.wrap(module, first=first, last=last)
        wrapped = Halved(wrapped) if halved and index == 1 else wrapped
        made.append(pipelining.PipelineStage(wrapped, index, num, torch.device("cpu"), **(known if static else {})))
    schedule_class = getattr(pipelining, f"Schedule{schedule}")
    given = made if issubclass(schedule_class, pipelining.schedules.PipelineScheduleMulti) else made[0]
    runner = schedule_class(given, MICRO_BATCHES, loss_fn=cross_entropy)
    losses: list[float] = []
    first_grads: dict[str, Tensor] = {}
    kinds: set[torch.dtype] = set()
    sent: list[tuple[torch.dtype, int]] = []
    norms: list[float] = []
    for step in range(steps):
        x, targets = batch(step)
        found: list[Tensor] = []
        with Sent() as spy:
            runner.step(*([x] if rank == 0 else []), target=targets, losses=found)
        losses += [torch.stack(found).mean().item()] if found else []
        if step == 0:
            first_grads = {name: grad for module in own.values() for name, grad in stored_bits(module).items()}
            grads = [p.grad for module in own.values() for p in module.parameters()]
            kinds = {g.payload.dtype for g in grads if isinstance(g, ScalingTensor)}
            sent = [call for call in spy.calls if call[1] > 8]  # shorter ones say hello, and agree on shapes
        norms.append(amp.clip_grad_norm_(model, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return {
        "losses": losses,
        "norms": norms,
        "skipped": [optimizer.skipped_steps],
        "grads": first_grads,
        "histories": {name: bits for module in own.values() for name, bits in histories(module).items()},
        "kinds": kinds,
        "sent": sent,
    }


def alone(rank: int, world: int, group: dist.ProcessGroup, level: str, steps: int = 1) -> dict[str, Any]:
    """The same training with no pipeline: micro-batches one after the other."""
    model = fresh()
    model, optimizer = amp.initialize(model, optimizer_of(model), level=level, data_parallel=False)
    losses, norms, first_grads, first_histories = [], [], {}, {}
    for step in range(steps):
        found = []
        for x, targets in zip(*(t.chunk(MICRO_BATCHES) for t in batch(step)), strict=True):
            found.append(cross_entropy(model(x), targets))
            found[-1].backward()
        for p in model.parameters():
            p.grad.div_(MICRO_BATCHES)
        losses.append(torch.stack(found).mean().item())
        first_grads = first_grads or stored_bits(model)
        norms.append(amp.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        first_histories = first_histories or histories(model)
    return {"losses": losses, "norms": norms, "grads": first_grads, "first_histories": first_histories}


def joined(answers: list[dict[str, Any]], key: str) -> dict[str, Tensor]:
    return {name: value for answer in answers for name, value in answer[key].items()}


def flat(grads: dict[str, Tensor], names: Any) -> Tensor:
    return torch.cat([grads[name].flatten() for name in names])


STEPS = 6


@pytest.fixture(scope="module")
def whole(rank_pool):
    """The training without a pipeline, by level; in a rank, so that sums have the order that they have there."""
    return {level: rank_pool.run(1, alone, level, STEPS)[0] for level in ("O0", "O3")}


@pytest.mark.parametrize("world, num, schedule", CASES)
def test_stages_with_a_plain_boundary_are_the_model(ranks, whole, world, num, schedule):
    """Bit for bit: loss, gradients summed over micro-batches as the contract says, amax histories of every layer."""
    answers, expected = ranks(world, pipelined, num, schedule, "O3", PLAIN), whole["O3"]
    assert answers[-1]["losses"][0] == expected["losses"][0]
    grads, bits = joined(answers, "grads"), joined(answers, "histories")
    assert grads.keys() == expected["grads"].keys()
    assert all(same_bits(grads[name], expected["grads"][name]) for name in grads)
    assert bits.keys() == expected["first_histories"].keys()
    assert all(same_bits(bits[name], expected["first_histories"][name]) for name in bits)
    assert any(history.any() for history in bits.values())
    assert all(answer["kinds"] == {torch.bfloat16} for answer in answers)
    assert all(answer["norms"] == pytest.approx(expected["norms"][:1], rel=1e-6) for answer in answers)


@pytest.mark.parametrize("world, num, schedule", CASES)
def test_what_the_boundary_costs_and_sends(ranks, whole, world, num, schedule):
    """Everything else in BF16, so what differs is the crossings: at each an activation and a gradient are rounded to
    E4M3, 31 dB each, and a gradient has seen all of them at most."""
    answers = ranks(world, pipelined, num, schedule, "O0", PARTIAL)
    grads, expected = joined(answers, "grads"), whole["O0"]["grads"]
    crossings = num - 1
    least_db = 31 - 10 * torch.tensor(2.0 * crossings).log10().item()
    worst = min(sqnr(expected[name], grads[name]) for name in grads)
    assert least_db <= worst < 60, worst  # 60: nothing that was rounded once is as close
    message = (torch.bfloat16, BATCH // MICRO_BATCHES * Boundary(rule=PARTIAL, shape=SHAPE).sample_bytes)
    sent = [call for answer in answers for call in answer["sent"]]
    assert sent == [message] * (2 * crossings * MICRO_BATCHES)  # there and back
    assert message[1] / (BATCH // MICRO_BATCHES * CONFIG.context * CONFIG.dim * BF16.bytes) < 0.52


@pytest.mark.parametrize("world, num, schedule", [CASES[0], CASES[2]])
def test_all_of_o3_trains(ranks, whole, world, num, schedule):
    """Against gradients in BF16, FP8 products are 23 dB away; the crossings take 0.4 dB of that for one, 0.7 for three.
    The norm over all stages is one number everywhere."""
    answers, exact = ranks(world, pipelined, num, schedule, "O3", PARTIAL, STEPS), whole["O0"]["grads"]
    grads = joined(answers, "grads")
    without = sqnr(flat(exact, exact), flat(whole["O3"]["grads"], exact))
    assert sqnr(flat(exact, exact), flat(grads, exact)) > without - 2
    losses = answers[-1]["losses"]
    assert losses[-1] < losses[0] - 1.5
    assert abs(losses[-1] - whole["O3"]["losses"][-1]) < 0.5
    assert len({tuple(answer["norms"]) for answer in answers}) == 1
    assert not any(sum(answer["skipped"]) for answer in answers)


def test_a_schedule_that_computes_with_carriers_is_found_out(ranks):
    """One stage halves what it gets: the loss is NaN at once, and no stage takes the step."""
    answers = ranks(2, pipelined, 2, "1F1B", "O3", PARTIAL, 1, True, True)
    assert answers[1]["losses"][0] != answers[1]["losses"][0]
    assert [answer["skipped"] for answer in answers] == [[1], [1]]


def test_shapes_found_by_a_run_of_the_schedule_change_no_gradient(ranks):
    """Without input_args and output_args the stages run on made-up values first, which the marks keep out."""
    given, found = (
        joined(ranks(2, pipelined, 4, "Interleaved1F1B", "O3", PARTIAL, 1, s), "grads") for s in (True, False)
    )
    assert all(same_bits(given[name], found[name]) for name in given)
