"""Exchanges beside products: the bits of one after the other, the same bytes, and neither waits for the other.

Time proves nothing on a busy machine. What a product waits for is shown by cause: one rank begins its exchange only
when the other says that a product is done, which never happens if that product waits for the exchange.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from msamp_like import amp
from msamp_like.comm.activations import message_bytes
from msamp_like.comm.group import CountedGroup
from msamp_like.comm.tensor_parallel import Column, Enter, Row, adopt, context, parallelize, plan_gpt
from msamp_like.formats import E4M3, E5M2
from msamp_like.policy import LEVELS, O0, O2, O3, Policy, Role, Rule
from msamp_like.scaling import Scaler, roll
from msamp_like.tensor import real
from tests.closeness import same_bits
from tests.distributed.spy import Spy
from tests.distributed.test_composition import BATCH, CONFIG, fresh, optimizer_of, train
from tests.distributed.test_data_parallel import raised

DELAYED = O3.with_rule(Role.INPUT, Rule(format=E4M3, history=1)).with_rule(
    Role.GRAD_OUTPUT, Rule(format=E5M2, history=1)
)
ROWS = O3.with_rule(Role.INPUT, Rule(format=E4M3, block=(1, 128))).with_rule(
    Role.GRAD_OUTPUT, Rule(format=E5M2, block=(1, 128))
)
SQUARES = O3.with_rule(Role.INPUT, Rule(format=E4M3, block=(8, 8)))
POLICIES = {"O0": O0, "delayed": DELAYED, "current": O2, "squares": SQUARES, "rows": ROWS}
PRODUCTS = {"nt": "output", "nn": "grad_input", "tn": "grad_weight"}


# --- the same function ----------------------------------------------------------------------------------------------


def layers() -> nn.Sequential:
    """A column- and a row-parallel layer with biases; every value random."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(200, 96), nn.GELU(), nn.Linear(96, 136))


def split_layers(group: Any, policy: Policy, *, overlap: bool) -> nn.Sequential:
    model = parallelize(layers(), group, {"0": Column(), "2": Row()}, sequence=True, overlap=overlap)
    amp.initialize(model, level=policy, data_parallel=False)
    adopt(model, policy)
    return model


def step(model: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Output and input gradient of this rank's part, under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    output.backward(grad.to(output.dtype))
    return output.detach(), x.grad


def scalers(model: nn.Module) -> list[Scaler]:
    return [module for module in model.modules() if isinstance(module, Scaler)]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_ways(rank, world, group, policy_name, shape, frozen):
    """Two steps and an evaluation, one after the other and side by side: everything that a caller can see."""
    seen = []
    for overlap in (False, True):
        model = split_layers(group, POLICIES[policy_name], overlap=overlap)
        if frozen:
            model[0].weight.requires_grad_(False)
            model[2].weight.requires_grad_(False)
        ledger = []
        for turn in range(2):
            x = drawn(10 * turn + rank, *shape, 200).requires_grad_()
            with Spy(world, rank) as spy:
                found = step(model, x, drawn(20 * turn + rank, *shape, 136))
            ledger.append((sum(e.sent for e in context(model).ledger), spy.sent))
            assert all(e.sent == e.planned for e in context(model).ledger if not e.label.endswith("/partial"))
            context(model).end_step()
            roll(scalers(model), lambda amax: dist.all_reduce(amax, dist.ReduceOp.MAX, group=group))
        grads = {n: None if p.grad is None else real(p.grad).clone() for n, p in model.named_parameters()}
        histories = [s.scale_bits.clone() for s in scalers(model) if s.rule.history]
        with torch.no_grad():
            evaluated = model.eval()(drawn(rank, *shape, 200))
        seen.append((found, grads, histories, evaluated, ledger))
    return seen


@pytest.mark.parametrize(
    ("world", "policy", "shape", "frozen"),
    [
        (2, "O0", (2, 6), False),
        (2, "delayed", (2, 6), False),
        (3, "delayed", (3, 2, 5), False),
        (4, "delayed", (7,), False),
        (2, "delayed", (2, 6), True),
        (2, "current", (2, 6), False),
        (3, "rows", (2, 5), False),
        (2, "squares", (2, 6), False),
    ],
)
def test_the_bits_and_bytes_are_those_of_one_after_the_other(ranks, world, policy, shape, frozen):
    """A row of a product has one order of summation here, however many rows there are; another device may differ in a
    last bit of BF16."""
    for apart, beside in ranks(world, two_ways, policy, shape, frozen):
        (output, grad_input), grads, histories, evaluated, ledger = apart
        assert same_bits(output, beside[0][0])
        assert same_bits(grad_input, beside[0][1])
        assert grads.keys() == beside[1].keys()
        assert (grads["0.weight"] is None) == frozen
        for name, grad in grads.items():
            assert (grad is None and beside[1][name] is None) or same_bits(grad, beside[1][name]), name
        assert all(same_bits(a, b) for a, b in zip(histories, beside[2], strict=True))
        assert same_bits(evaluated, beside[3])
        assert ledger == beside[4]
        assert all(counted == seen for counted, seen in ledger)


def first_input(rank, world, group):
    """The first layer's input is data and asks for no gradient: nothing is sent for it, and nothing multiplied."""
    model = split_layers(group, DELAYED, overlap=True)
    step(model, drawn(rank, 2, 6, 200), drawn(rank, 2, 6, 136))
    with Events() as seen:
        model[2](drawn(rank, 2, 12, 48)).sum().backward()
    assert "grad_weight" in seen.seen
    assert "grad_input" not in seen.seen
    context(model).end_step()
    model.zero_grad()
    step(model, drawn(rank, 2, 6, 200), drawn(rank, 2, 6, 136))
    sent = {(e.label, e.calls, e.sent) for e in context(model).ledger if not e.label.endswith("/partial")}
    return sent, real(model[0].weight.grad).norm().item()


def test_what_is_not_asked_for_is_not_sent(ranks):
    def part(columns: int) -> int:
        return message_bytes(12, columns, DELAYED[Role.PARTIAL_OUTPUT], torch.bfloat16)

    for ledger, norm in ranks(2, first_input):
        assert ledger == {("0/forward", 1, part(200)), ("2/forward", 1, part(136)), ("2/backward", 1, part(136))}
        assert norm > 0


def not_finite(rank, world, group):
    """One rank's part holds an infinity, under a scale that is known beforehand."""
    model = split_layers(group, DELAYED, overlap=True)
    for poisoned in (False, True):
        x = drawn(rank, 1, 4, 200)
        if poisoned and rank == 1:
            x[0, 2, 7] = float("inf")
        found = step(model, x.requires_grad_(), drawn(rank, 1, 4, 136))
        grads = [p.grad for p in model.parameters()]
        if not poisoned:
            assert all(bool(torch.isfinite(real(g)).all()) for g in (*found, *grads))
            roll(scalers(model))
            model.zero_grad()
    return [bool(torch.isfinite(real(g)).all()) for g in (found[0], model[0].weight.grad, model[2].weight.grad)]


def test_what_is_not_finite_reaches_the_gradients_of_all_ranks(ranks):
    first, second = ranks(2, not_finite)
    assert not second[0]  # its own part of the sequence
    assert not any((*first[1:], *second[1:]))


# --- neither waits for the other ------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Calls ``before`` and ``after`` around product number ``count`` of a layout, counted from 1."""

    def __init__(self, layout: str, count: int, before: Callable[[], None], after: Callable[[], None]) -> None:
        super().__init__()
        self.layout, self.left, self.before, self.after = layout, count, before, after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counts = func.__name__.startswith("scaled_matmul") and self.layout in args
        self.left -= counts
        if counts and self.left == 0:
            self.before()
        done = func(*args, **(kwargs or {}))
        if counts and self.left == 0:
            self.after()
        return done


def heard(key: str, wait_s: float) -> bool:
    """Whether another rank says ``key`` in that time."""
    try:
        dist.distributed_c10d._get_default_store().wait([key], datetime.timedelta(seconds=wait_s))
    except (RuntimeError, dist.DistStoreError):
        return False
    return True


def say(key: str) -> None:
    dist.distributed_c10d._get_default_store().set(key, "done")


def one_layer(group: Any, rank: int, world: int, kind: str, *, overlap: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A split layer with full histories, so with scales that are known beforehand; its input and output gradient."""
    torch.manual_seed(0)
    entry = {"column": Column(), "row": Row()}[kind]
    model = parallelize(nn.Sequential(nn.Linear(96, 96)), group, {"0": entry}, sequence=True, overlap=overlap)
    amp.initialize(model, level=DELAYED, data_parallel=False)
    adopt(model, DELAYED)
    for scaler in scalers(model):
        scaler.quantize(torch.ones(4, 96), record=True)
    roll(scalers(model))
    part, whole = drawn(rank, 2, 4, 96), drawn(rank, 2, 4 * world, 96 // world)
    given, grad = (part, whole) if kind == "column" else (whole, part)
    return model, given.requires_grad_(), grad


def late(rank, world, group, kind, layout, overlap, wait_s):
    """Rank 1 begins an exchange when rank 0 has multiplied all parts but rank 1's, or gives up: which of both."""
    model, x, grad = one_layer(group, rank, world, kind, overlap=overlap)
    key, phase = f"late {kind} {world} {overlap}", {"nt": "forward", "nn": "backward"}[layout]
    products = Products(layout, world - 1, lambda: None, lambda: say(key) if rank == 0 else None)
    in_time = rank != 1 or phase == "backward" or heard(key, wait_s)
    with products if phase == "forward" else contextlib.nullcontext():
        output = model(x)
    in_time = in_time and (rank != 1 or phase == "forward" or heard(key, wait_s))
    with products if phase == "backward" else contextlib.nullcontext():
        output.backward(grad)
    return in_time


@pytest.mark.parametrize(("kind", "layout"), [("column", "nt"), ("row", "nn")], ids=["forward", "backward"])
def test_parts_that_are_there_are_multiplied_while_another_is_on_its_way(ranks, kind, layout):
    assert all(ranks(2, late, kind, layout, True, 60.0))
    assert ranks(2, late, kind, layout, False, 0.5) == [True, False]  # the negative control


def held(rank, world, group, kind, layout, overlap, wait_s):
    """Rank 0 takes its last product of a layout when rank 1 has what rank 0 sends it, or gives up: which of both."""
    model, x, grad = one_layer(group, rank, world, kind, overlap=overlap)
    key, answers = f"held {kind} {layout} {overlap}", []
    last = world if overlap and kind == "row" else 1
    products = Products(layout, last, lambda: answers.append(heard(key, wait_s)), lambda: None)
    with products if rank == 0 else contextlib.nullcontext():
        output = model(x)
        if kind == "row" and rank == 1:
            say(key)
        output.backward(grad)
    if kind == "column" and rank == 1:
        say(key)
    return answers


@pytest.mark.parametrize(("kind", "layout"), [("row", "nt"), ("column", "tn")], ids=["forward", "backward"])
def test_a_product_is_taken_while_what_was_made_before_is_on_its_way(ranks, kind, layout):
    assert ranks(2, held, kind, layout, True, 60.0) == [[True], []]
    assert ranks(2, held, kind, layout, False, 0.5) == [[False], []]  # the negative control


class Events(TorchDispatchMode):
    """The order in which exchanges are issued and products and casts are done."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0].strip("_")
        if func.namespace == "c10d":
            self.seen.append("exchange")
        elif name == "scaled_matmul":
            self.seen.append(next(PRODUCTS[a] for a in args if isinstance(a, str)))
        elif name == "dequantize":
            self.seen.append("read")
        return func(*args, **(kwargs or {}))


def events(rank, world, group):
    model = split_layers(group, DELAYED, overlap=True)
    found = []
    for _ in range(2):
        x = drawn(rank, 2, 6, 200).requires_grad_()
        with Events() as forward, torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        with Events() as backward:
            torch.autograd.grad(output.sum(), [x, model[0].weight, model[2].weight])  # not the sums of partial ones
        roll(scalers(model), lambda amax: dist.all_reduce(amax, dist.ReduceOp.MAX, group=group))
        found = [" ".join(e for e in events.seen) for events in (forward, backward)]
    return found


def test_every_exchange_is_issued_before_the_product_it_runs_beside(ranks):
    """Also where nothing is late, and for as many parts as ranks: the order of issue is all that CUDA needs."""
    gather = "exchange exchange read output read output read output"
    scatter = "output exchange output exchange output read read"
    back_scatter = "exchange exchange read grad_input read grad_input read grad_input grad_weight"
    back_gather = "grad_input exchange grad_weight read read"
    for forward, backward in ranks(3, events):
        assert forward == f"{gather} {scatter}"
        assert backward == f"{back_scatter} {back_gather}"


# --- with the rest --------------------------------------------------------------------------------------------------


def trained(rank, world, group, way, level, overlap, micro_batches):
    """Two steps of a GPT on a mesh, in one of several ways."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize(fresh(), mesh["tp"], plan_gpt(CONFIG), sequence=True, overlap=overlap)
    model, optimizer = amp.initialize(model, optimizer_of(model), level=level, mesh=mesh)
    if way == "recomputed":
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if way == "compiled":
        model.blocks[0].compile(backend="aot_eager")
    part = mesh.get_local_rank("dp")
    figures = train(model, optimizer, part=part, parts=world // 2, micro_batches=micro_batches, steps=2)
    torch._dynamo.reset()
    ledger = amp.wire_ledger(model)
    return {
        "figures": torch.stack(figures),
        "weights": {name: real(p).detach().clone() for name, p in model.named_parameters()},
        "sent": sum(line.sent for line in ledger),
        "unplanned": [str(line) for line in ledger if line.sent != line.expected],
    }


@pytest.mark.parametrize(
    ("world", "way", "level", "micro_batches"),
    [
        (4, "plain", "O3", 2),
        (2, "plain", "O0", 1),
        (2, "recomputed", "O3", 1),
        pytest.param(2, "compiled", "O3", 1, marks=pytest.mark.nightly),
    ],
)
def test_a_model_trains_to_the_same_bits(ranks, world, way, level, micro_batches):
    apart = ranks(world, trained, way, level, False, micro_batches)
    beside = ranks(world, trained, way, level, True, micro_batches)
    # recomputation ends with what backward needs: before a block's last exchange, unless the product is one with it
    message = message_bytes(BATCH * 32 // 2, CONFIG.dim, LEVELS[level][Role.PARTIAL_OUTPUT], torch.bfloat16)
    again = CONFIG.num_layers * message if way == "recomputed" else 0
    for expected, found in zip(apart, beside, strict=True):
        assert same_bits(expected["figures"], found["figures"])
        for name, weight in expected["weights"].items():
            assert same_bits(weight, found["weights"][name]), name
        assert found["sent"] == expected["sent"] + again
        assert not found["unplanned"]


def under_enter(rank, world, group):
    """Two layers that a module gathers for exchange as before; the row-parallel one overlaps; and a deep copy does."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.gate(x).sigmoid() * self.up(x))

    plan = {"": Enter(argument="x"), "gate": Column(), "up": Column(), "down": Row()}
    answers = []
    for overlap in (False, True):
        torch.manual_seed(0)
        model = parallelize(Gated(), group, plan, sequence=True, overlap=overlap)
        amp.initialize(model, level=O3, data_parallel=False)
        adopt(model, O3)
        for one in (model, copy.deepcopy(model)):
            x = drawn(rank, 2, 4, 32).requires_grad_()
            calls = Spy(world, rank)
            with calls:
                found = step(one, x, drawn(rank, 2, 4, 32))
            answers.append((*found, [real(p.grad).clone() for n, p in one.named_parameters() if "weight" in n], calls))
            answers[-1] = (*answers[-1][:3], calls.names)
    return answers


def test_layers_under_one_gathered_input_keep_it(ranks):
    for first, *others in ranks(2, under_enter):
        for other in others:
            assert same_bits(first[0], other[0])
            assert same_bits(first[1], other[1])
            assert all(same_bits(a, b) for a, b in zip(first[2], other[2], strict=True))
        assert [names.count("allgather_base") for *_, names in (first, *others)] == [2, 2, 1, 1]


def plain_weights(rank, world, group):
    """A model that amp has not converted, or has restored, exchanges and multiplies in turn."""
    found = []
    for overlap in (False, True):
        model = parallelize(layers(), group, {"0": Column(), "2": Row()}, sequence=True, overlap=overlap)
        x = drawn(rank, 2, 6, 200).requires_grad_()
        with Spy(world, rank) as spy:
            found.append((*step(model, x, drawn(rank, 2, 6, 136)), spy.names))
    return found


def test_plain_weights_are_not_overlapped(ranks):
    for (output, grad, names), (other_output, other_grad, other_names) in ranks(2, plain_weights):
        assert same_bits(output, other_output)
        assert same_bits(grad, other_grad)
        assert names == other_names


# --- what is refused, and the primitive -----------------------------------------------------------------------------


def refused(rank, world, group):
    model = split_layers(group, DELAYED, overlap=True)
    return {
        "whole": raised(lambda: parallelize(layers(), group, {"0": Column(), "2": Row()}, overlap=True)),
        "differ": raised(
            lambda: parallelize(layers(), group, {"0": Column(), "2": Row()}, sequence=True, overlap=rank == 0)
        ),
        "features": raised(lambda: model(torch.zeros(2, 4, 100))),
        "odd": raised(lambda: model[2](torch.zeros(2, 5, 48))),
    }


def test_what_cannot_be_is_refused(ranks):
    expected = {
        "whole": ("overlap=True with sequence=False", "sequence=True"),
        "differ": ("overlap", "True on rank 0", "False on rank 1"),
        "features": ("in_features 200", "(2, 4, 100)"),
        "odd": ("divide by the 2 ranks of axis 'tp'", "5 positions at '2'"),
    }
    for found in ranks(2, refused):
        for case, words in expected.items():
            assert all(word in found[case] for word in words), found[case]


def passed_on(rank, world, group):
    counted = CountedGroup(group, "tp")
    found = []
    for distance in range(1, world):
        received, work = counted.pass_on(torch.full((2, 3), rank, dtype=torch.uint8), distance, "round")
        work.wait()
        found.append(received)
    return found, counted.sent, work.what


def test_a_tensor_is_passed_on_by_any_distance(ranks):
    for rank, (found, sent, what) in enumerate(ranks(4, passed_on)):
        assert [received.tolist() for received in found] == [[[(rank - d) % 4] * 3] * 2 for d in (1, 2, 3)]
        assert sent == 3 * 6
        assert what == "all_to_all 'round' on axis 'tp'"
