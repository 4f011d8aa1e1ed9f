"""Fused steps of a table of parameters: the definition's properties, then the native twin against it, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from msamp_like import kernels
from msamp_like.formats import BF16, E4M3, E5M2, FP16, FP32, UE5M3, WHOLE, Block, Format
from msamp_like.kernels import AdamScalars, Noise, Operand, Residual, Row, reference, reference_updates
from msamp_like.kernels.reference_updates import bounds, corrected, largest_ratio
from tests.operands import same, spread

SCALARS = AdamScalars(1e-3, 0.9, 0.99, 1e-8, 0.1, True)
BLOCK: Block = (1, 128)


def noise(stochastic: bool, role: int) -> Noise | None:
    return Noise(7, 3, 5, role) if stochastic else None


def stored(x: Tensor, format: Format, block: Block, noise: Noise | None = None) -> Operand:
    return Operand(*reference.quantize_current(x, format, block)[:2], block, noise)


def split(x: Tensor, stochastic: bool) -> tuple[Operand, Residual]:
    payload, scale_inv, rest, amax = kernels.quantize_with_residual(x, kernels.amax(x, WHOLE), E4M3)
    return Operand(payload, scale_inv, WHOLE, noise(stochastic, 4)), Residual(rest, amax)


def values_of(shape) -> list[Tensor]:
    """Of the size that a model's weights, gradients and moments have."""
    return [torch.randn(shape) * 0.02, torch.randn(shape) * 1e-3, torch.randn(shape) * 1e-4, torch.rand(shape) * 1e-7]


def lean_row(shape, stochastic=True, seed=0, second: Format = UE5M3) -> Row:
    torch.manual_seed(seed)
    w, g, m, v = values_of(shape)
    param, residual = split(w, stochastic)
    states = (stored(m, E4M3, BLOCK), stored(v, second, BLOCK, noise(stochastic, 6)))
    return Row(param, stored(g, E4M3, WHOLE), states, 5, None, residual)


def o2_row(shape, stochastic=True, seed=0, copy: Operand | None = None, grad: Format = E4M3) -> Row:
    torch.manual_seed(seed)
    w, g, m, v = values_of(shape)
    states = (stored(m, E4M3, BLOCK), stored(v, FP16, BLOCK, noise(stochastic, 6)))
    return Row(stored(w, FP16, BLOCK, noise(stochastic, 4)), stored(g, grad, WHOLE), states, 5, copy)


def plain_row(shape, seed=0) -> Row:
    torch.manual_seed(seed)
    tensors = [
        stored(x, FP32, WHOLE) for x in (torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.rand(shape))
    ]
    return Row(tensors[0], tensors[1], tuple(tensors[2:]), 9)


def tensors_of(row: Row) -> list[Tensor]:
    operands = [row.param, *row.states, *([row.copy] if row.copy else [])]
    return [t for o in operands for t in o[:2]] + (list(row.residual) if row.residual else [])


def cloned(row: Row) -> Row:
    def clone(operand: Operand) -> Operand:
        return operand._replace(payload=operand.payload.clone(), scale_inv=operand.scale_inv.clone())

    return Row(
        clone(row.param),
        row.grad,
        tuple(clone(s) for s in row.states),
        row.step,
        row.copy and clone(row.copy),
        row.residual and Residual(*(t.clone() for t in row.residual)),
    )


def assert_equal(rows: list[Row], scalars: AdamScalars = SCALARS) -> list[Row]:
    """The op on all rows at once gives the bits of the definition on each alone; returns the rows after the step."""
    actual, expected = [cloned(r) for r in rows], [cloned(r) for r in rows]
    kernels.adam_steps_(actual, scalars)
    for row in expected:
        reference_updates.adam_steps_([row], scalars)
    for one, other in zip(actual, expected, strict=True):
        assert all(same(a, b) for a, b in zip(tensors_of(one), tensors_of(other), strict=True))
    return actual


# --- the update -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [True, False])
def test_update_is_that_of_torch(decoupled):
    """FP32 on both sides, a division less here: a few units of the last place of the update after ten steps."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(1000))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([weight], lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    w, m, v = weight.detach().clone(), torch.zeros(1000), torch.zeros(1000)
    for step in range(1, 11):
        weight.grad = torch.randn(1000) * 10.0 ** torch.randint(-6, 3, (1000,))
        w, m, v = reference_updates.adam_update(w, weight.grad, m, v, SCALARS._replace(decoupled=decoupled), step)
        optimizer.step()
    assert (w - weight).abs().max() < 4e-7
    late = reference_updates.adam_update(w, weight.grad, m, v, SCALARS, 1)[0]
    assert (late - w).abs().max() > 1e-3  # control: the step's number matters to this comparison


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.9), (0.95, 0.9025), (0.9, 0.5), (0.5, 0.0)])
def test_no_moments_exceed_the_bound(betas):
    """Worst case of Cauchy and Schwarz: g_i proportional to (beta1 / beta2)^(t - i) attains it."""
    scalars = AdamScalars(1e-3, *betas, 0.0, 0.0, True)
    for steps in (1, 2, 5, 20):
        ratio = (betas[0] / betas[1]) if betas[1] else 0.0
        m = v = 0.0
        for i in range(steps):
            g = ratio ** (steps - 1 - i)
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        bound = largest_ratio(scalars, steps)
        if bound < reference_updates.MAX_RATIO:
            assert m / math.sqrt(v) == pytest.approx(bound, rel=1e-9)


# --- a master in two parts ------------------------------------------------------------------------------------------


def joined(x: Tensor, format: Format = E4M3, noise: Noise | None = None) -> Tensor:
    payload, scale_inv, rest, _ = kernels.quantize_with_residual(x, kernels.amax(x, WHOLE), format, noise)
    return kernels.dequantize_with_residual(Operand(payload, scale_inv, WHOLE), rest)


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=str)
def test_two_parts_round_to_eight_bits_more(format):
    x = spread((200, 100))
    scale_inv = reference.scale_inv_from_amax(reference.amax(x, WHOLE), format)
    normal = x.abs() >= format.smallest_normal * scale_inv
    error = (joined(x, format).double() - x).abs()
    assert (error / x.abs())[normal].max() <= 2.0 ** -(format.mantissa_bits + 8 + 1)
    step = 2.0 ** -(format.mantissa_bits + 8) * format.smallest_normal * scale_inv
    assert (error[~normal] <= step * (0.5 + 2.0**-12)).all()  # rounded twice, to 12 bits more first
    payload = reference.quantize(x, scale_inv, format, WHOLE)
    alone = reference.dequantize(payload, scale_inv, WHOLE, torch.float32)
    assert ((alone - x).abs() / x.abs())[normal].max() > 2.0 ** -(format.mantissa_bits + 2)  # control: without it


def test_the_weight_is_its_master_rounded_to_nearest():
    x = spread((200, 100))
    payload, scale_inv, rest, amax = kernels.quantize_with_residual(x, kernels.amax(x, WHOLE), E4M3, noise(True, 4))
    master = kernels.dequantize_with_residual(Operand(payload, scale_inv, WHOLE), rest)
    nearest = reference.quantize(master, scale_inv, E4M3, WHOLE)
    tie = rest == -128  # away from zero here, to even there
    assert torch.equal(payload.view(torch.uint8)[~tie], nearest.view(torch.uint8)[~tie])
    assert float(amax) == x.abs().max()
    assert (
        payload.view(torch.uint8) != reference.quantize(x, scale_inv, E4M3, WHOLE).view(torch.uint8)
    ).float().mean() < 0.01


def test_what_is_stored_is_written_back_unchanged():
    once = joined(spread((50, 100)), noise=noise(True, 4))
    assert torch.equal(joined(once, noise=noise(True, 4)), once)


def test_rounding_of_two_parts_keeps_the_mean():
    """The mean of n draws is within 5 steps / (2 sqrt(n)) of the value, in binades and below the normal numbers."""
    for value in (1.03, -0.0003, 3e-7):
        x = torch.full((2**14,), value)
        x[0] = 448.0  # scale 1
        draws = joined(x, noise=noise(True, 4))[1:].double()
        step = 2.0 ** (max(math.floor(math.log2(abs(value))), -6) - 11)
        bound = 5 * step / (2 * math.sqrt(len(draws)))
        exact = float(torch.tensor(value))
        assert abs(draws.mean() - exact) < bound
        assert abs(joined(x)[1] - exact) > 0.1 * bound  # control: nearest has one answer, off by more than the mean


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_value_that_is_not_finite_flags_both_parts(poison):
    x = torch.randn(4, 128)
    x[2, 3] = poison
    payload, scale_inv, rest, amax = kernels.quantize_with_residual(x, kernels.amax(x, WHOLE), E4M3, noise(True, 4))
    assert scale_inv.isinf().all()
    assert not amax.isfinite().any()
    assert not rest.any()
    assert not payload.view(torch.uint8).any()


def test_steps_stay_within_the_scale_that_was_foreseen():
    """Gradients that push all values one way, from a second moment that rounding made 0: the worst there is."""
    row = lean_row((4, 256), seed=3)
    row.states[1].payload.zero_()
    for step in range(1, 30):
        grad = stored(torch.full((4, 256), -1.0), E4M3, WHOLE)
        before = float(row.residual.amax)
        growth, increase = bounds(SCALARS, step, largest_ratio(SCALARS, step))
        reference_updates.adam_steps_([row._replace(grad=grad, step=step)], SCALARS)
        assert float(row.residual.amax) <= before * growth + increase
    free = reference_updates.adam_update(torch.zeros(1), torch.ones(1), torch.ones(1), torch.zeros(1), SCALARS, 5)[0]
    assert free.abs() < 0.1 < abs(corrected(SCALARS, 5)[0] / corrected(SCALARS, 5)[1])  # control: 0 / eps is far beyond


# --- the native twin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("shape", [(3, 256), (5, 130), (200,)], ids=str)
def test_lean_steps_equal_the_definition(every_simd, shape, stochastic):
    rows = [lean_row(shape, stochastic, seed) for seed in range(3)]
    after = assert_equal(rows)
    assert not torch.equal(after[0].residual.payload, rows[0].residual.payload)
    assert_equal([r._replace(states=(r.states[0], stored(torch.rand(shape), FP16, BLOCK))) for r in rows])


def test_a_second_pass_keeps_the_scale_that_was_foreseen(every_simd):
    """A moment with one scale needs the pass; the master's scale is that of the bound all the same."""
    for factor in (1.0, 4.0):
        row = lean_row((3, 256))
        row.residual.amax.mul_(factor)
        states = (row.states[0], stored(torch.rand(3, 256) * 1e-7, FP16, WHOLE))
        assert_equal([row._replace(states=states)])


def test_lean_steps_saturate_alike_when_the_largest_value_is_wrong(every_simd):
    for shape in ((3, 256), (3, 130)):
        row = lean_row(shape)
        row.residual.amax.fill_(1e-3)
        after = assert_equal([row], SCALARS._replace(lr=1e-5))[0]
        assert (after.param.payload.view(torch.uint8) & 0x7F == 0x7E).any()


@pytest.mark.parametrize("shape", [(3, 256), (3, 130)], ids=str)
def test_lean_steps_flag_alike(shape):
    row = lean_row(shape)
    values = torch.zeros(shape)
    values[1, 100] = math.inf
    assert assert_equal([row._replace(grad=stored(values, FP32, WHOLE))])[0].param.scale_inv.isinf().all()


COPIES = {"E4M3": (E4M3, WHOLE), "BF16": (BF16, WHOLE), "blocks": (E4M3, (1, 16)), "E5M2": (E5M2, WHOLE)}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("shape", [(3, 256), (5, 130)], ids=str)
def test_copies_are_those_of_a_cast_whatever_was_there(every_simd, kind, shape):
    """With the right scale of the last step, one too large, too small, or none: the same bytes."""
    format, block = COPIES[kind]
    rows = []
    for factor in (1.0, 0.25, 64.0, math.inf, 2.0**-100):
        copy = stored(torch.randn(shape) * 0.02, format, block)
        if format.scaled:
            copy.scale_inv.mul_(factor)
        rows.append(o2_row(shape, copy=copy))
    after = assert_equal(rows)
    for row in after:
        master = reference.dequantize(*row.param[:3], torch.float32)
        payload, scale_inv, _ = reference.quantize_current(master, format, block)
        assert same(row.copy.payload, payload)
        assert same(row.copy.scale_inv, scale_inv)


def test_copies_of_zeros_small_numbers_and_flagged_masters(every_simd):
    for fill in ("zero", "small", "nan"):
        copy = stored(torch.ones(2, 256) * 0.02, E4M3, WHOLE)
        row = o2_row((2, 256), copy=copy)
        values = torch.randn(2, 256) * 0.02
        values[0] *= {"zero": 0.0, "small": 1e-6, "nan": 1.0}[fill]
        if fill == "nan":
            values[0, 3] = math.nan
        assert_equal([row._replace(param=stored(values, FP16, BLOCK, row.param.noise))])
        assert_equal([row._replace(param=stored(values, FP16, BLOCK, row.param.noise))], SCALARS._replace(lr=0.0))


@pytest.mark.parametrize("grad", [E4M3, BF16, FP32], ids=str)
def test_small_second_moments_round_alike(every_simd, grad):
    """Numbers below the normals of FP16 and UE5M3 beside large ones, zeros among them."""
    second = torch.rand(2, 256) * 10.0 ** torch.randint(-22, 1, (2, 256))
    second[:, ::5] = 0
    row = o2_row((2, 256), grad=grad)
    zero = stored(torch.zeros(2, 256), grad, WHOLE)
    for format in (FP16, UE5M3):
        states = (row.states[0], stored(second, format, BLOCK, noise(True, 6)))
        assert_equal([row._replace(states=states), row._replace(states=states, grad=zero)])
    lean = lean_row((2, 256))
    assert_equal([lean._replace(states=states, grad=stored(torch.zeros(2, 256), E4M3, WHOLE))])


def test_roles_of_noise_that_share_nothing_are_told_apart(every_simd):
    """All three states stochastic; keys that differ; and halves the other way round, which has no fast path."""
    base = o2_row((3, 256))
    first = base.states[0]._replace(noise=noise(True, 5))
    swapped = base.param._replace(noise=noise(True, 6))
    other = base.param._replace(noise=Noise(8, 3, 5, 4))
    rows = [base._replace(states=(first, base.states[1])), base._replace(param=swapped), base._replace(param=other)]
    assert_equal(rows)
    lean = lean_row((3, 256))
    assert_equal([lean._replace(param=lean.param._replace(noise=noise(True, 2)))])


def test_a_table_of_everything_with_two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = [
            plain_row((300,)),
            o2_row((600, 256)),
            lean_row((300, 384)),
            o2_row((7, 128), copy=stored(torch.ones(7, 128), E4M3, WHOLE)),
        ]
        rows += [plain_row((128,), seed=2), lean_row((0, 128)), o2_row((900, 130), stochastic=False)]
        rows.append(o2_row((2, 64))._replace(param=stored(torch.randn(2, 64), FP16, WHOLE)))  # two passes
        assert_equal(rows)
    finally:
        torch.set_num_threads(threads)
