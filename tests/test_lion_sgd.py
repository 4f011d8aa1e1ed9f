"""Fused steps of Lion and SGD: the definition is what the optimizers computed parameter by parameter, and the native
twin gives its bits."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from msamp_like import kernels, optim
from msamp_like.formats import BF16, E4M3, E4M3FNUZ, E5M2, FP16, FP32, WHOLE, Format
from msamp_like.kernels import LionScalars, Operand, Row, SgdScalars, reference, reference_updates
from msamp_like.policy import LEAN, O2
from msamp_like.tensor import ScalingTensor
from tests.operands import needs_native, same
from tests.test_updates import BLOCK, cloned, noise, split, stored, tensors_of

pytestmark = needs_native

LION = LionScalars(1e-3, 0.9, 0.99, 0.1)
SGD = SgdScalars(1e-2, 0.9, 0.1, 0.01, False)
UPDATES = {
    "Lion": LION,
    "Lion without decay": LION._replace(weight_decay=0.0, beta1=0.0),
    "SGD": SGD,
    "SGD, nesterov": SGD._replace(dampening=0.0, nesterov=True),
    "SGD without momentum": SGD._replace(momentum=0.0, weight_decay=0.0),
}
Scalars = LionScalars | SgdScalars


def run(rows: list[Row], scalars: Scalars, bad: Tensor | None = None, *, where=kernels) -> None:
    if isinstance(scalars, LionScalars):
        where.lion_steps_(rows, scalars, bad)
    else:
        where.sgd_steps_(rows, scalars, bad)


def one_by_one(row: Row, scalars: Scalars) -> None:
    """The generic step of optim/base.py: casts of the row's tensors around the pure update."""
    lion = isinstance(scalars, LionScalars)
    optimizer = (optim.Lion if lion else optim.SGD)([torch.nn.Parameter(torch.zeros(1))])
    optimizer._scalars = lambda group: scalars
    kernels.steps_([row], functools.partial(optimizer._updated, {}))


def row_of(kind: str, shape, stochastic: bool = True, seed: int = 0, step: int = 5, grad: Format = E4M3) -> Row:
    """As the levels store a parameter: O2 with its compute copy, lean, O0, and a vector in FP32."""
    torch.manual_seed(seed)
    w, g, m = torch.randn(shape) * 0.02, torch.randn(shape) * 1e-3, torch.randn(shape) * 1e-4
    average = stored(m, E4M3, BLOCK, noise(stochastic, 5))
    if kind == "lean":
        param, residual = split(w, stochastic)
        return Row(param, stored(g, grad, WHOLE), (average,), step, None, residual)
    if kind == "O2":
        copy = stored(w, E4M3, WHOLE)
        return Row(stored(w, FP16, BLOCK, noise(stochastic, 4)), stored(g, grad, WHOLE), (average,), step, copy)
    if kind == "O1":
        master = stored(w, FP16, BLOCK, noise(stochastic, 4))
        return Row(master, stored(g, grad, WHOLE), (stored(m, FP32, WHOLE),), step)
    plain = Row(stored(w, FP32, WHOLE), stored(g, FP32, WHOLE), (stored(m, FP32, WHOLE),), step)
    return plain if kind == "FP32" else plain._replace(grad=stored(g, BF16, WHOLE), copy=stored(w, BF16, WHOLE))


KINDS = ("O2", "lean", "O1", "O0", "FP32")


def all_tensors(rows: list[Row]) -> list[Tensor]:
    return [tensor for row in rows for tensor in tensors_of(row)]


def assert_equal(rows: list[Row], scalars: Scalars) -> list[Row]:
    """One call for all rows gives the bits of the definition, and of the generic step, on each; returns the rows."""
    actual = [cloned(r) for r in rows]
    run(actual, scalars)
    for row, after in zip(rows, actual, strict=True):
        for step in (lambda r: run([r], scalars, where=reference_updates), lambda r: one_by_one(r, scalars)):
            expected = cloned(row)
            step(expected)
            assert all(same(a, b) for a, b in zip(tensors_of(after), tensors_of(expected), strict=True))
    return actual


# --- the native twin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
def test_steps_equal_the_definition_and_the_generic_step(every_simd, name, stochastic):
    """Blocks that the levels have and shapes that end in the middle of one, in one table."""
    shapes = ((3, 256), (5, 130), (2, 128, 3), (200,))
    rows = [row_of(kind, shape, stochastic, seed) for kind in KINDS for seed, shape in enumerate(shapes)]
    after = assert_equal(rows, UPDATES[name])
    assert not any(torch.equal(a.param.payload.view(torch.uint8), b.param.payload.view(torch.uint8))
                   for a, b in zip(after, rows, strict=True) if a.residual is None)  # fmt: skip


@pytest.mark.parametrize("grad", [BF16, FP32, E5M2], ids=str)
def test_gradients_of_any_format(every_simd, grad):
    rows = [row_of(kind, shape, grad=grad) for kind in ("O2", "lean") for shape in ((3, 256), (3, 130))]
    for scalars in (LION, SGD):
        assert_equal(rows, scalars)


def test_a_buffer_starts_at_the_first_gradient(every_simd):
    """Zeros of both signs among it: 0 * buffer + gradient would turn one of them."""
    row = row_of("FP32", (2, 128), step=1)
    row.grad.payload[:, ::3] = -0.0
    row.states[0].payload.fill_(7.0)
    after = assert_equal([row, row._replace(step=2)], SGD._replace(weight_decay=0.0))
    assert same(after[0].states[0].payload, row.grad.payload)
    assert not same(after[1].states[0].payload, row.grad.payload)  # control


def test_a_sum_of_zero_has_no_direction(every_simd):
    for sign in (0.0, -0.0):
        row = row_of("FP32", (2, 128))
        row.grad.payload.fill_(sign)
        row.states[0].payload.fill_(sign)
        row.param.payload[0] = sign
        after = assert_equal([row], LION._replace(weight_decay=0.0))[0]
        assert same(after.param.payload, row.param.payload)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["grad", "param"])
def test_what_is_not_finite_is_flagged_alike(every_simd, kind, where):
    for shape in ((3, 256), (3, 130)):
        row = row_of(kind, shape)
        values = torch.randn(shape)
        values[1, 100] = math.nan
        if where == "grad":
            row = row._replace(grad=stored(values, FP32, WHOLE))
        else:
            row.param.scale_inv[0, 0] = math.inf
        for scalars in (LION, SGD, SGD._replace(momentum=0.0)):
            assert_equal([row], scalars)


def test_momenta_below_the_normal_numbers(every_simd):
    """Twelve decades in a block, zeros among them, which the quick way of rounding does not take."""
    torch.manual_seed(1)
    small = torch.randn(2, 256) * 10.0 ** torch.randint(-12, 1, (2, 256))
    small[:, ::5] = 0
    momentum = stored(small, E4M3, BLOCK, noise(True, 5))
    rows = [row_of(kind, (2, 256))._replace(states=(momentum,)) for kind in ("O2", "lean")]
    for scalars in (LION, SGD):
        assert_equal([*rows, *(row._replace(grad=stored(torch.zeros(2, 256), E4M3, WHOLE)) for row in rows)], scalars)


def test_a_lean_scale_is_that_of_the_largest_new_value(every_simd):
    """Whatever the last write's largest value was on record, and where a step crosses a binade."""
    for recorded in (1e-6, 0.02, 100.0):
        row = row_of("lean", (3, 256))
        row.residual.amax.fill_(recorded)
        assert_equal([row], LION)
    row = row_of("lean", (3, 256))
    wide = assert_equal([row], SGD._replace(lr=1e4))[0]
    assert wide.param.scale_inv > 8 * row.param.scale_inv
    assert (wide.param.payload.view(torch.uint8) & 0x7F).max() >= 0x76  # 224 of 448: the scale fits


@pytest.mark.parametrize("scalars", [LION, SGD], ids=["Lion", "SGD"])
def test_rows_that_one_pass_cannot_take(every_simd, scalars):
    """Not contiguous, empty, one scale a tensor, other blocks, AMD's formats, a role's other half of the words."""
    base = row_of("O2", (4, 256))
    turned = torch.randn(256, 4).to(E4M3.dtype).t()
    rows = [
        base._replace(grad=Operand(turned, torch.ones(1, 1), WHOLE)),
        base._replace(states=(Operand(turned.clone(memory_format=torch.preserve_format), torch.ones(4, 2), BLOCK),)),
        row_of("O2", (0, 128)),
        row_of("lean", (0, 128)),
        base._replace(param=stored(torch.randn(4, 256), FP16, WHOLE, noise(True, 4))),
        base._replace(states=(stored(torch.randn(4, 256), E4M3, (1, 64)),)),
        base._replace(states=(stored(torch.randn(4, 256), E4M3FNUZ, BLOCK),)),
        base._replace(param=base.param._replace(noise=noise(True, 6))),
        base._replace(copy=stored(torch.randn(4, 256), BF16, WHOLE)),
        row_of("lean", (4, 256))._replace(states=(stored(torch.randn(4, 256), BF16, WHOLE),)),
    ]
    assert not rows[1].states[0].payload.is_contiguous()
    assert_equal(rows, scalars)


@pytest.mark.parametrize("where", [kernels, reference_updates], ids=["native", "definition"])
def test_a_bad_step_writes_nothing(where):
    for scalars in (LION, SGD):
        before = [row_of(kind, (2, 256)) for kind in KINDS]
        after = [cloned(r) for r in before]
        run(after, scalars, torch.ones(1), where=where)
        pairs = list(zip(all_tensors(after), all_tensors(before), strict=True))
        assert all(same(a, b) for a, b in pairs)
        run(after, scalars, torch.zeros(1), where=where)
        assert not same(*pairs[0])  # control: the same tensors


@pytest.mark.parametrize("scalars", [LION, SGD], ids=["Lion", "SGD"])
def test_a_table_with_two_threads(scalars):
    rows = [row_of("lean", (300, 256)), *(row_of(kind, (150, 256)) for kind in KINDS), row_of("O2", (300, 130))]
    after, expected = [cloned(r) for r in rows], [cloned(r) for r in rows]
    threads = torch.get_num_threads()
    try:
        for num, table, where in ((2, after, kernels), (1, expected, reference_updates)):
            torch.set_num_threads(num)
            run(table, scalars, where=where)
    finally:
        torch.set_num_threads(threads)
    assert all(same(a, b) for a, b in zip(all_tensors(after), all_tensors(expected), strict=True))


def test_the_comparison_notices_what_it_should():
    """Control of all of the above: the last bit of a scalar, and another seed of the noise, show."""
    plain, noisy = row_of("FP32", (3, 256)), row_of("O2", (3, 256))
    seeded = noisy._replace(param=noisy.param._replace(noise=noise(True, 4)._replace(seed=8)))
    for scalars in (LION, SGD):
        beside = scalars._replace(lr=scalars.lr * (1 + 2.0**-23))
        for (one, with_one), (other, with_other) in (
            ((plain, scalars), (plain, beside)),
            ((noisy, scalars), (seeded, scalars)),
        ):
            one, other = cloned(one), cloned(other)
            run([one], with_one)
            run([other], with_other)
            assert not same(one.param.payload, other.param.payload)


def test_rows_of_the_levels_take_the_native_step(monkeypatch):
    """The comparisons above are of two things: the definition is not what ran."""
    called = []
    monkeypatch.setattr(reference_updates, "lion_steps_", lambda rows, scalars: called.extend(rows))
    run([row_of(kind, shape) for kind in KINDS for shape in ((3, 256), (5, 130))], LION)
    assert not called
    run([row_of("O2", (0, 128))], LION)
    assert len(called) == 1  # control


# --- the optimizers -------------------------------------------------------------------------------------------------


def stepped(cls, policy, options, *, fused: bool, shape=(6, 256)) -> list[Tensor]:
    """Bits of two parameters and their states after three steps."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.02
    format = FP16 if policy is O2 else E4M3
    block = BLOCK if policy is O2 else WHOLE
    matrix = ScalingTensor(*reference.quantize_current(weight, format, block)[:2], block)
    params = [torch.nn.Parameter(matrix), torch.nn.Parameter(torch.randn(300))]
    optimizer = cls(params, policy=policy, seed=3, **options)
    if not fused:
        optimizer.fused_update = lambda rows, group, bad: False
    for step in range(3):
        torch.manual_seed(10 + step)
        params[0].grad = ScalingTensor(*reference.quantize_current(torch.randn(shape), E4M3, WHOLE)[:2])
        params[1].grad = torch.randn(300)
        optimizer.step()
    states = [value for p in params for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    found = [t.operand[:2] if isinstance(t, ScalingTensor) else [t.detach()] for t in (*params, *states)]
    return [part for parts in found for part in parts]


OPTIMIZERS = {
    "Lion": (optim.Lion, {"lr": 1e-3, "weight_decay": 0.1}),
    "SGD": (optim.SGD, {"lr": 1e-2, "momentum": 0.99, "dampening": 0.5, "weight_decay": 0.01}),
    "nesterov": (optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "plain SGD": (optim.SGD, {"lr": 1e-2}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("policy", [O2, LEAN], ids=["O2", "lean"])
def test_an_optimizer_steps_to_the_same_bits_fused_or_not(name, policy):
    cls, options = OPTIMIZERS[name]
    run = functools.partial(stepped, cls, policy)
    fused, generic = run(options, fused=True), run(options, fused=False)
    assert all(same(a, b) for a, b in zip(fused, generic, strict=True))
    other = run({**options, "lr": options["lr"] * 1.01}, fused=True)
    assert not all(same(a, b) for a, b in zip(fused, other, strict=True))  # control


@pytest.mark.parametrize("bad", [None, torch.zeros(1)], ids=["", "bad"])
def test_the_ops_obey_their_schemas(bad):
    """Without 8-bit inputs: opcheck multiplies what it is given, which torch does not define for them."""
    for name, scalars in (("lion_steps_", LION), ("sgd_steps_", SGD)):
        flat = kernels.table.flatten([row_of("O0", (2, 256)), row_of("O0", (5, 130))])
        torch.library.opcheck(getattr(torch.ops.msamp_like, name).default, (*flat, *scalars, bad))
