"""Host-offload: the same step bit for bit, wherever copies are late; what is on the device; and what it refuses.

Device and host are both the CPU here. The buffers are separate all the same, and ``LateLane`` copies only when somebody
waits: a weight read too early is stale, a buffer written too early is lost.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from msamp_like import amp
from msamp_like.optim import AdamW, GradientRelease, Lion
from msamp_like.optim.offload import HOST, Lanes, holding_weights
from msamp_like.policy import LEVELS, O2, Role
from msamp_like.scaling import quantize
from msamp_like.tensor import ScalingTensor, real
from tests.closeness import same_bits

OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=1e-2, weight_decay=1e-2),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=3e-2, momentum=0.9),
    "Lion": lambda groups: Lion(groups, lr=1e-3),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are small: two threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class LateLane:
    """Copies when somebody waits, and no sooner: the slowest lane there can be."""

    def __init__(self):
        self.moved_bytes = 0
        self.queue = []
        self.done = 0

    def copy(self, pairs):
        self.queue += pairs
        self.moved_bytes += sum(source.nbytes for _, source in pairs)
        return LateTicket(self, self.done + len(self.queue))


class LateTicket:
    def __init__(self, lane, end):
        self.lane, self.end = lane, end

    def await_on_host(self):
        while self.lane.done < self.end:
            target, source = self.lane.queue.pop(0)
            target.copy_(source)
            self.lane.done += 1

    await_on_device = await_on_host


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(40, 64),
        nn.Linear(64, 160),
        nn.GELU(),
        nn.Linear(160, 64, bias=False),
        nn.LayerNorm(64),
        nn.Linear(64, 64),
        nn.Linear(64, 48),
    )
    model[5].weight.requires_grad_(False)
    return model


def groups_of(model):
    """Two, with other settings, and a frozen parameter in the second."""
    parameters = list(model.parameters())
    return [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 5e-3}]


def initialized(optimizer="AdamW", level="O2", offload="cpu", overlap_forward=True, **options):
    """(model, optimizer) with offload, or under the very same policy without."""
    model = network()
    policy = LEVELS[level] if offload else holding_weights(LEVELS[level])
    model, stepper = amp.initialize(
        model,
        OPTIMIZERS[optimizer](groups_of(model)),
        level=policy,
        data_parallel=False,
        offload=offload,
        overlap_forward=overlap_forward,
        **options,
    )
    if offload:
        stepper.home.lanes[HOST] = Lanes(LateLane(), LateLane())
    return model, stepper


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step % 4)
    tokens = torch.randint(0, 40, (64,), generator=generator)
    return (model(tokens) - torch.randn(64, 48, generator=generator)).square().mean()


def train(model, stepper, steps, first=0, clip=None, micro_batches=1, after=lambda: None):
    losses = []
    for step in range(first, first + steps):
        for micro_batch in range(micro_batches - 1):
            with model.no_sync():
                loss_of(model, step + 7 * micro_batch + 1).backward()
        loss = loss_of(model, step)
        loss.backward()
        if clip is not None:
            round_sums(model)
            losses.append(amp.clip_grad_norm_(model, clip))
        stepper.step()
        after()
        stepper.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def round_sums(model):
    """Of micro-batches, before they are clipped: without offload that comes later, in the step."""
    for p in model.parameters():
        if isinstance(p.grad, ScalingTensor) and p.grad.format != amp.policy_of(model)[Role.GRAD_WEIGHT].format:
            p.grad.replace_(quantize(p.grad.dequantize(torch.float32), amp.policy_of(model)[Role.GRAD_WEIGHT]))


def stored(model, stepper):
    """Every bit of weights and states."""
    states = [(name, value) for p in model.parameters() for name, value in sorted(stepper.state[p].items())]
    return [p.detach() for p in model.parameters()], states


def assert_same(one, other):
    (weights, states), (other_weights, other_states) = stored(*one), stored(*other)
    assert all(map(same_bits, weights, other_weights))
    assert [name for name, _ in states] == [name for name, _ in other_states]
    for (_, value), (_, expected) in zip(states, other_states, strict=True):
        assert same_bits(value, expected) if isinstance(value, torch.Tensor) else value == expected


def same(one, other):
    try:
        assert_same(one, other)
    except AssertionError:
        return False
    return True


CASES = [("O2", name) for name in OPTIMIZERS] + [("lean", "AdamW"), ("lean", "Lion"), ("O0", "AdamW"), ("O3", "AdamW")]


@pytest.mark.parametrize(("level", "optimizer"), CASES)
def test_twenty_steps_are_those_without_bit_for_bit(level, optimizer):
    offloaded, kept = initialized(optimizer, level), initialized(optimizer, level, offload=None)
    assert same_bits(train(*offloaded, 20), train(*kept, 20))
    assert_same(offloaded, kept)
    train(*kept, 1)
    assert not same(offloaded, kept)  # control: a step more is another state


@pytest.mark.parametrize("level", ["O2", "lean"])
@pytest.mark.parametrize("options", [{"clip": 0.05}, {"micro_batches": 3}, {"clip": 0.05, "micro_batches": 2}])
def test_clipping_and_micro_batches(level, options):
    offloaded, kept = initialized(level=level), initialized(level=level, offload=None)
    assert same_bits(train(*offloaded, 4, **options), train(*kept, 4, **options))
    assert_same(offloaded, kept)
    other = initialized(level=level, offload=None)
    train(*other, 4)
    assert not same(other, kept)  # control: the options matter


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_compute_copies_are_made_from_the_weight_that_arrived(recipe):
    offloaded, kept = (initialized(offload=offload, recipe=recipe) for offload in ("cpu", None))
    assert same_bits(train(*offloaded, 4), train(*kept, 4))
    assert_same(offloaded, kept)


@pytest.mark.parametrize("forgotten", ["weight", "gradient"])
def test_every_wait_is_needed(forgotten):
    """Control of all tests here: without a wait a late copy changes the result."""
    model, stepper = initialized()
    home = stepper.home

    def forget():
        waiting = model.parameters() if forgotten == "weight" else map(home.gradient, model.parameters())
        for tensor in waiting:
            if isinstance(tensor, ScalingTensor):
                tensor.arrival = None

    rolled = stepper.before_update
    if forgotten == "gradient":
        stepper.before_update = lambda: (rolled(), forget())
    train(model, stepper, 3, after=forget if forgotten == "weight" else lambda: None)
    kept = initialized(offload=None)
    train(*kept, 3)
    for lane in home.lanes[HOST]:
        lane.copy([]).await_on_host()
    assert not same((model, stepper), kept)


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_buffer_is_not_written_while_it_leaves(forgotten):
    """Two steps and no forward pass in between: the first weights are still in the host's buffers."""
    model, stepper = initialized()
    expected, kept = initialized(offload=None)
    step_by_hand(model, stepper, 0)
    step_by_hand(expected, kept, 0)
    first = [real(p).clone() for p in expected.parameters()]
    for parameter, (twin, _) in stepper.home.sides():
        parameter.arrival = None  # a reader on the device, which does not keep the host waiting
        if forgotten:
            twin.arrival = None
    step_by_hand(model, stepper, 1)
    arrived = [p._payload.float() * p._scale_inv if isinstance(p, ScalingTensor) else None for p in model.parameters()]
    matrices = [(a, f) for a, f in zip(arrived, first, strict=True) if a is not None]
    assert all(torch.equal(a, f) for a, f in matrices[:2]) != forgotten


def step_by_hand(model, stepper, step):
    """A step from gradients that no backward made."""
    for p in model.parameters():
        values = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        if p.requires_grad:
            p.grad = quantize(values, O2[Role.GRAD_WEIGHT]) if isinstance(p, ScalingTensor) else values
    stepper.step()
    stepper.zero_grad()


def test_gradients_leave_in_backward_and_weights_during_the_step():
    """In the order of events: not all gradients exist together, and no weight waits for the last to be stepped."""
    events = []

    class Watched(AdamW):
        def fused_update(self, rows, group, bad):
            events.append(("stepped", len(rows)))
            return super().fused_update(rows, group, bad)

    class WatchedLane(LateLane):
        def __init__(self, way):
            super().__init__()
            self.way = way

        def copy(self, pairs):
            events.append((self.way, tuple(pairs[0][0].shape)))
            return super().copy(pairs)

    model = network()
    alive = []
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(q.grad is not None and q.dim() == 2 for q in model.parameters()))
            )
    model, stepper = amp.initialize(model, Watched(model.parameters()), data_parallel=False, offload="cpu")
    stepper.home.lanes[HOST] = Lanes(WatchedLane("down"), WatchedLane("up"))
    loss_of(model, 0).backward()
    assert [way for way, _ in events] == ["down"] * 4
    assert [shape for _, shape in events] == [(48, 64), (64, 160), (160, 64), (40, 64)]
    assert max(alive) == 1
    assert all(p.grad is None for p in model.parameters() if isinstance(p, ScalingTensor))
    events.clear()
    stepper.step()
    order = [way for way, _ in events if way == "up" or way == "stepped"]
    assert order.index("up") < len(order) - order[::-1].index("stepped") - 1
    assert order.count("up") == 4


def test_what_moves_and_what_is_where():
    """A byte down and a byte up for an element in FP8; the device keeps a byte of it."""
    model, stepper = initialized()
    train(model, stepper, 2)
    matrices = [p for p in model.parameters() if isinstance(p, ScalingTensor) and p.requires_grad]
    grads = sum(p.numel() + 4 for p in matrices)
    weights = sum(p.stored_bytes for p in matrices)
    assert stepper.home.moved_bytes == (2 * grads, 2 * weights)
    found = amp.state_bytes(model, stepper)
    assert found["grad_weight"] == found["master_weight"] == found["first_moment"] == found["second_moment"] == 0
    assert found["weight"] == sum(p.stored_bytes for p in model.parameters() if isinstance(p, ScalingTensor))
    assert found["host_weight"] == weights
    assert found["host_grad_weight"] == grads
    kept = amp.state_bytes(*trained_without())
    for role in ("master_weight", "first_moment", "second_moment"):
        assert found[f"host_{role}"] == kept[role] > 0
    assert not any(name.startswith("host") for name in kept)
    assert all(s.device == HOST for state in stepper.state.values() for s in state.values() if torch.is_tensor(s))


def trained_without():
    kept = initialized(offload=None)
    train(*kept, 1)
    return kept


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step(poison):
    model, stepper = initialized()
    train(model, stepper, 1)
    saved = copy.deepcopy(stored(model, stepper))
    handle = model[3].weight.register_hook(lambda g: g.mul_(poison))
    train(model, stepper, 1)
    handle.remove()
    assert stepper.skipped_steps == 1
    now = stored(model, stepper)
    assert all(map(same_bits, now[0], saved[0]))
    assert [v for _, v in now[1] if isinstance(v, int)] == [v for _, v in saved[1] if isinstance(v, int)]
    train(model, stepper, 1)
    assert not all(map(same_bits, stored(model, stepper)[0], saved[0]))


@pytest.mark.parametrize("overlap_forward", [False, True])
def test_a_compiled_model_reads_what_has_arrived(overlap_forward, monkeypatch):
    """A graph takes its plain tensors by the weights' own names, which wait; control: names that do not."""

    def trained(offload):
        model, stepper = initialized(offload=offload, overlap_forward=overlap_forward)
        train(torch.compile(model, backend="aot_eager"), stepper, 3)
        return model, stepper

    kept = trained(None)
    assert same(trained("cpu"), kept)
    for name in ("payload", "scale_inv"):
        waiting = getattr(ScalingTensor, name)

        def read(tensor, name=name, waiting=waiting):
            return getattr(tensor, f"_{name}") if isinstance(tensor, nn.Parameter) else waiting.fget(tensor)

        monkeypatch.setattr(ScalingTensor, name, property(read, waiting.fset))
    assert same(trained("cpu"), kept) != overlap_forward


@pytest.mark.parametrize("level", ["O2", "lean"])
def test_a_resume_continues_bit_for_bit(level):
    model, stepper = initialized(level=level)
    train(model, stepper, 3)
    saved = copy.deepcopy(amp.state_dict(model, stepper))
    expected = train(model, stepper, 3, first=3)
    for offload in ("cpu", None):  # a state is the same wherever it lies
        again = initialized(level=level, offload=offload)
        train(*again, 1)
        amp.load_state_dict(*again, saved)
        assert same_bits(train(*again, 3, first=3), expected)
        assert_same(again, (model, stepper))
    cold = initialized(level=level)
    cold[0].load_state_dict(saved["model"])
    train(*cold, 3, first=3)
    assert not same(cold, (model, stepper))  # control: the optimizer's state is part of it


def test_a_weight_that_somebody_else_wrote_is_stepped_from():
    """Under lean the weight is half of its master: the host's half-master must not go stale."""
    pairs = [initialized(level="lean", offload=offload) for offload in ("cpu", None)]
    for model, stepper in pairs:
        train(model, stepper, 2)
        with torch.no_grad():
            model[3].weight.copy_(torch.linspace(-1, 1, 64 * 160).view(64, 160))
            model[0].weight.mul_(0.5)
        train(model, stepper, 2, first=2)
    assert_same(*pairs)


def test_restored_and_scheduled():
    models = []
    for offload in ("cpu", None):
        model, stepper = initialized(offload=offload)
        schedule = torch.optim.lr_scheduler.ExponentialLR(stepper, 0.5)
        train(model, stepper, 3, after=schedule.step)
        models.append(amp.restore(model))
    assert all(map(torch.equal, *(list(m.parameters()) for m in models)))
    loss_of(models[0], 0).backward()
    assert all(p.grad is not None for p in models[0].parameters() if p.requires_grad)


def test_discarded_gradients_are_discarded():
    for discard in (lambda model, stepper: stepper.zero_grad(), lambda model, stepper: model.zero_grad()):
        model, stepper = initialized()
        loss_of(model, 3).backward()
        discard(model, stepper)
        kept = initialized(offload=None)
        loss_of(kept[0], 3).backward()
        kept[1].zero_grad()
        assert same_bits(train(model, stepper, 2), train(*kept, 2))
        assert_same((model, stepper), kept)


def test_what_cannot_be_is_refused_with_a_remedy():
    model, _ = initialized()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"got a second one for .*; run all micro-batches .* in model.no_sync\(\)"):
        loss_of(model, 1).backward()
    for options, message in (
        ({"offload": "disk"}, """offloaded to the "cpu", got offload='disk'; give "cpu\""""),
        ({"offload": "cpu", "gradient_release": GradientRelease()}, "got gradient_release beside offload.*; leave"),
    ):
        model = network()
        with pytest.raises(ValueError, match=message):
            amp.initialize(model, torch.optim.SGD(model.parameters()), data_parallel=False, **options)
        assert not any(isinstance(p, ScalingTensor) for p in model.parameters())
    with pytest.raises(ValueError, match="got no optimizer; give one, or .*cpu_offload of .*fsdp2"):
        amp.initialize(network(), None, level="O3", data_parallel=False, offload="cpu")
