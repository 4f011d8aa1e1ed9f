"""The exchanges of activations: exact in FP32, near it in FP8, the same bits on all ranks, every byte accounted for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from msamp_like.comm import activations, sequence_parallel
from msamp_like.comm.group import CountedGroup
from msamp_like.comm.sequence_parallel import Route
from msamp_like.formats import E4M3, E5M2, WHOLE
from msamp_like.policy import O0, O3, Role, Rule
from tests.closeness import same_bits, sqnr
from tests.distributed.spy import Spy

BLOCKS = O3[Role.PARTIAL_OUTPUT]
RULES = {"as it is": None, "bf16": O0[Role.PARTIAL_OUTPUT], "tensor": Rule(format=E4M3), "blocks": BLOCKS}


def drawn(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows over six orders of magnitude, as activations and above all their gradients have them."""
    draw = torch.Generator().manual_seed(rank)
    rows = 10 ** torch.empty(*shape[:-1], 1).uniform_(-3, 3, generator=torch.Generator().manual_seed(99))
    return (torch.randn(*shape, generator=draw) * rows).to(dtype)


# --- the six functions ----------------------------------------------------------------------------------------------


def exchanged(rank, world, group, rule, shape, dtype):
    """By function: (output, its gradient's exchange) for inputs and output gradients that differ on every rank."""
    counted = CountedGroup(group, "tp")
    route = Route(group=counted, rule=rule, label="layer")
    part = (*shape[:-2], shape[-2] // world, shape[-1])
    takes_part, gives_part = {"gather", "join"}, {"scatter", "split"}
    answer = {}
    for name in ("copy", "reduce", "gather", "scatter", "split", "join"):
        x = drawn(rank, *(part if name in takes_part else shape), dtype=dtype).requires_grad_()
        output = getattr(sequence_parallel, name)(x, route)
        grad = drawn(10 + rank, *(part if name in gives_part else shape), dtype=dtype)
        output.backward(grad)
        answer[name] = x.detach(), grad, output.detach(), x.grad
    return answer


def expected(name: str, rank: int, answers: list) -> tuple[Tensor, Tensor]:
    """What a function's output and gradient are in FP64 from every rank's input and output gradient."""
    xs, grads = ([answer[name][i].double() for answer in answers] for i in (0, 1))
    world = len(answers)

    def own(x: Tensor) -> Tensor:
        return x.chunk(world, -2)[rank]

    return {
        "copy": lambda: (xs[rank], sum(grads)),
        "reduce": lambda: (sum(xs), grads[rank]),
        "gather": lambda: (torch.cat(xs, -2), own(sum(grads))),
        "scatter": lambda: (own(sum(xs)), torch.cat(grads, -2)),
        "split": lambda: (own(xs[rank]), torch.cat(grads, -2)),
        "join": lambda: (torch.cat(xs, -2), own(grads[rank])),
    }[name]()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("rule", "dtype", "least"),
    [
        (None, torch.float64, 290),  # 6e-16 in the worst case
        (None, torch.float32, 130),  # sums of FP32: 1e-7
        (None, torch.bfloat16, 48),  # a sum rounded to BF16, 55 dB, and again on its way back
        (RULES["bf16"], torch.float32, 50),
        (RULES["tensor"], torch.float32, 27),  # two roundings of 31 dB at most
        (BLOCKS, torch.float32, 27),
        (BLOCKS, torch.bfloat16, 27),
    ],
    ids=["FP64", "FP32", "BF16", "BF16 rule", "E4M3 tensor", "E4M3 blocks", "E4M3 blocks of BF16"],
)
def test_each_function_and_its_gradient(ranks, world, rule, dtype, least):
    answers = ranks(world, exchanged, rule, (2, 12, 200), dtype)
    for rank, answer in enumerate(answers):
        for name, (x, _, output, grad_input) in answer.items():
            exact_output, exact_grad = expected(name, rank, answers)
            assert output.dtype == grad_input.dtype == dtype
            assert output.is_contiguous()
            assert sqnr(exact_output, output) > least, name
            assert sqnr(exact_grad, grad_input) > least, name
            assert grad_input.shape == x.shape
    for first, *others in (
        [answer[name][i] for answer in answers] for name, i in [("copy", 3), ("reduce", 2), ("gather", 2), ("join", 2)]
    ):
        assert all(same_bits(first, other) for other in others)


def halves(rank, world, group):
    """Errors of each row of a sum, under one scale and in blocks, and summed in FP8 hop by hop."""
    counted = CountedGroup(group, "tp")
    x = drawn(rank, 64, 256)
    everyone = [drawn(r, 64, 256) for r in range(world)]
    exact = torch.stack(everyone).double().sum(0)
    found = {name: activations.all_reduce(x, rule, counted, name) for name, rule in RULES.items()}
    found["reduce_scatter"] = activations.reduce_scatter(x, 0, BLOCKS, counted, "reduce_scatter")
    scale = (everyone[0].abs().amax(1, keepdim=True) * 2 * world / E4M3.largest).log2().ceil().exp2()
    total = torch.zeros_like(x)
    for part in everyone:  # a ring that adds codes has codes, and rounds after every hop
        code = (part / scale).to(E4M3.dtype).float()
        total = (total + code).to(E4M3.dtype).float()
    found["control"] = total * scale
    rows = {}
    for name, value in found.items():
        of = exact.chunk(world)[rank] if name == "reduce_scatter" else exact
        rows[name] = sorted(sqnr(a, b) for a, b in zip(of, value))
    return rows


def test_blocks_keep_every_row_and_one_rounding_a_leg(ranks):
    """Negative controls: one scale for the tensor loses whole rows; a sum of codes falls below one of FP32."""
    for rows in ranks(4, halves):
        median = {name: found[len(found) // 2] for name, found in rows.items()}
        assert rows["reduce_scatter"][0] > 30  # four ranks, of whose parts three are rounded once: 31 dB plus 1.2
        assert rows["blocks"][0] > 27  # and the sum once more
        assert median["control"] < median["blocks"] - 3
        assert rows["tensor"][0] < 5
        assert rows["bf16"][0] > 50


# --- what travels ---------------------------------------------------------------------------------------------------


def counted_bytes(rank, world, group, rule, dtype):
    counted = CountedGroup(group, "tp")
    x = drawn(rank, 2, 12, 200, dtype=dtype)
    with Spy(world, rank) as spy:
        activations.all_gather(x, -2, rule, counted, "gather")
        activations.reduce_scatter(x, -2, rule, counted, "scatter")
        activations.all_reduce(x[0, :11], rule, counted, "reduce")
    sent = {(entry.collective, entry.label): (entry.calls, entry.sent) for entry in counted.ledger}
    return sent, [(call.name, call.dtype) for call in spy.calls], spy.sent


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_bytes_sent_are_those_of_the_message(ranks, rule):
    world, dtype = 2, torch.bfloat16

    def size(rows: int) -> int:
        return activations.message_bytes(rows, 200, rule, dtype)

    for sent, calls, seen in ranks(world, counted_bytes, rule, dtype):
        assert sent == {
            ("all_gather", "gather"): (1, size(24)),
            ("all_to_all", "scatter"): (1, size(12)),
            ("all_to_all", "reduce"): (1, size(6)),  # 11 rows are padded to 12
            ("all_gather", "reduce"): (1, size(6)),
        }
        assert seen == sum(n for _, n in sent.values())
        # one collective a leg, scales and all, and no reduction ever sees a code
        assert calls == [
            (n, torch.uint8) for n in ("allgather_base", "alltoall_base", "alltoall_base", "allgather_base")
        ]


def test_a_message_in_blocks_is_just_over_half_of_bf16():
    rows, columns = 512, 256
    blocks = activations.message_bytes(rows, columns, BLOCKS, torch.bfloat16)
    assert blocks / activations.message_bytes(rows, columns, O0[Role.PARTIAL_OUTPUT], torch.float32) == 0.515625
    assert activations.message_bytes(rows, columns, RULES["tensor"], torch.bfloat16) == rows * columns + 4


# --- faults ---------------------------------------------------------------------------------------------------------


def faults(rank, world, group):
    counted = CountedGroup(group, "tp")
    flags = {}
    for name, rule in RULES.items():
        for value in (float("inf"), float("nan")):
            x = drawn(rank, 2, 8, 256)
            if rank == 1:
                x[0, 0, 5] = value
            reduced = activations.all_reduce(x, rule, counted, "all_reduce")
            flags[name, str(value)] = bool(torch.isfinite(reduced[0, 0]).all()), bool(torch.isfinite(reduced[1]).all())
    route = Route(group=counted, rule=None, label="blocks.0.out")
    for function in (sequence_parallel.scatter, sequence_parallel.split):
        with pytest.raises(
            ValueError, match="divide by the 2 ranks of axis 'tp', got 7 positions at 'blocks.0.out'; pad"
        ):
            function(torch.zeros(1, 7, 4), route)
    return flags


def test_what_is_not_finite_arrives_so_and_odd_sequences_are_refused(ranks):
    for flags in ranks(2, faults):
        for (name, _), (poisoned_is_finite, others_are) in flags.items():
            assert not poisoned_is_finite, name
            assert others_are or name == "tensor"  # whose one scale is everyone's


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(format=E4M3, history=16), "history=16"),
        (replace(BLOCKS, rounding="stochastic"), "rounding='stochastic'"),
        (Rule(format=E5M2, block=(128, 128)), r"1 row, or -1 .* got \(128, 128\)"),
    ],
)
def test_a_rule_that_no_activation_travels_by_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        activations.check_rule(rule)
    for known in (BLOCKS, Rule(format=E4M3, block=WHOLE), Rule(format=E5M2, block=(1, -1)), RULES["bf16"]):
        activations.check_rule(known)
