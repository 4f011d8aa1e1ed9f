"""Gradients summed over micro-batches: the bits of the definition, in one pass, with nothing made beside the sum."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from msamp_like import amp
from msamp_like.formats import BF16, E4M3, E5M2, FP16, FP32, ROW, WHOLE
from msamp_like.kernels import cpu_fused, fused, reference, reference_fused
from msamp_like.kernels.reference import Operand
from msamp_like.policy import O2, Role
from msamp_like.scaling import quantize
from msamp_like.tensor import real, unscaled
from tests.closeness import same_bits
from tests.operands import needs_native, spread

SHAPES = [(5, 1000), (3, 4, 33), (1,)]
TINY = 2.0**-140


@pytest.fixture
def twin(every_simd):
    """The native kernels under every instruction set that this processor has."""
    return cpu_fused


def operand(values, format, scale_inv=None, block=WHOLE):
    if scale_inv is None:
        return Operand(*reference.quantize_current(values, format, block)[:2], block)
    scales = torch.full((1, 1), scale_inv)
    return Operand(reference.quantize(values, scales, format, block), scales, block)


def sums(shape):
    """(total, addend): formats with and without scales, scales that are no power of two, what overflows, flags."""
    x, y = spread(shape), spread(shape)
    yield operand(x, BF16), operand(y, BF16)
    yield operand(x, BF16, 0.3), operand(y, BF16, 1.7)
    yield operand(x, FP32), operand(y, E4M3)
    yield operand(x * TINY, BF16), operand(y * TINY, FP16)
    yield operand(x, BF16), operand(y, E5M2, block=ROW)
    yield operand(x, E4M3), operand(y, BF16)
    largest = torch.full(shape, BF16.largest)
    yield operand(largest, BF16), operand(largest * 0.002, BF16)  # finite in FP32: clamped
    yield operand(largest, BF16), operand(largest, BF16)
    for number in (torch.inf, torch.nan):
        poisoned = y.clone()
        poisoned.view(-1)[-1] = number
        yield operand(x, BF16), operand(poisoned, BF16)._replace(payload=poisoned.bfloat16())
        yield operand(poisoned, BF16), operand(y, BF16)  # flagged: its payload is 0 and its scale infinite


def copied(stored):
    return stored._replace(payload=stored.payload.clone(), scale_inv=stored.scale_inv.clone())


def assert_sums_agree(accumulate_):
    for shape in SHAPES:
        for total, addend in sums(shape):
            expected, got = copied(total), copied(total)
            reference_fused.accumulate_(expected, addend)
            accumulate_(got, addend)
            assert all(same_bits(*pair) for pair in zip(got[:2], expected[:2], strict=True))


def assert_requantized(requantize):
    for shape in SHAPES:
        x = spread(shape)
        flagged = operand(torch.full(shape, torch.nan), BF16)
        sources = (
            operand(x, BF16),
            operand(x, BF16, 0.3),
            operand(x, FP32),
            operand(x, E5M2),
            operand(x, FP16, block=ROW),
        )
        for source in (*sources, flagged):
            for block in (WHOLE, ROW, (1, 128)):
                for rule in ((0, True), (1, False)):
                    made = (k(source, E4M3, block, *rule) for k in (requantize, reference_fused.requantize))
                    assert all(same_bits(*pair) for pair in zip(*made, strict=True))


@needs_native
def test_the_native_sum_is_the_definition(twin):
    assert_sums_agree(twin.accumulate_)
    assert_requantized(twin.requantize)


def test_ops_are_the_definition():
    assert_sums_agree(fused.accumulate_)
    assert_requantized(fused.requantize)
    torch.library.opcheck(torch.ops.msamp_like.accumulate_, (*operand(torch.ones(4), BF16)[:3],) * 2)
    torch.library.opcheck(
        torch.ops.msamp_like.requantize, (*operand(torch.ones(4), BF16)[:3], E4M3.dtype, WHOLE, 0, True)
    )


def test_the_sum_is_rounded_once():
    """The control: an addend that is rounded to BF16 before is another one."""
    total, addend = torch.randn(64, 64).bfloat16(), torch.randn(64, 64)
    held = Operand(total.clone(), torch.ones(1, 1), WHOLE)
    fused.accumulate_(held, Operand(addend, torch.ones(1, 1), WHOLE))
    assert torch.equal(held.payload, (total.float() + addend).bfloat16())
    assert not torch.equal(held.payload, total + addend.bfloat16())


# --- in training ------------------------------------------------------------------------------------------------------

SHAPE = (96, 64)


def converted():
    model = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0], bias=False))
    return amp.initialize(model, torch.optim.AdamW(model.parameters()), level="O2")[0]


def arrive(weight, *grads):
    for grad in grads:
        torch.autograd.backward([weight.clone()], [grad])


def products(count):
    """What a product gives: BF16 of scale 1; the second was scaled by a hook on its way."""
    made = [unscaled(torch.randn(SHAPE).bfloat16(), torch.float32) for _ in range(count)]
    made[1].mul_(1 / 3)
    return made


def in_plain_operations(grads):
    """What a gradient is by definition after each micro-batch."""
    total = quantize(real(grads[0]), O2[Role.GRAD_WEIGHT])
    yield total
    total = unscaled(real(total, torch.bfloat16), torch.float32)
    for grad in grads[1:]:
        total.store_(real(total) + real(grad))
        yield total


@pytest.mark.parametrize("scaled_first", [False, True])
def test_micro_batches_leave_the_bits_of_plain_operations(scaled_first):
    weight, grads = converted()[0].weight, products(4)
    if scaled_first:
        grads[0], grads[1] = grads[1], grads[0]
    for grad, expected in zip(grads, in_plain_operations(grads), strict=True):
        arrive(weight, grad)
        assert same_bits(weight.grad, expected)


def test_a_sum_that_is_not_finite_is_flagged():
    weight, grads = converted()[0].weight, products(3)
    grads[1].payload[3, 4] = torch.inf
    arrive(weight, *grads)
    assert weight.grad.scale_inv.isinf().all()
    assert same_bits(weight.grad, list(in_plain_operations(grads))[-1])


def test_sums_that_have_no_short_cut():
    """A factor, another shape and a plain tensor are added as ever."""
    for addend, alpha in ((unscaled(torch.ones(8).bfloat16(), torch.float32), 1), (torch.ones(4, 8), 2)):
        held = unscaled(torch.randn(4, 8).bfloat16(), torch.float32)
        expected = (real(held) + alpha).bfloat16().float()
        assert torch.equal(held.add_(addend, alpha=alpha).dequantize(), expected)


def allocated(run, numel):
    """Bytes an element of each allocation that is as large as a weight's payload, or larger."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    sizes = [round(event.self_cpu_memory_usage / numel, 2) for event in seen.events()]
    return sorted(size for size in sizes if size >= 1)  # what an operation freed of it is not in it


@needs_native  # the definition, which runs instead, makes FP32 tensors
def test_nothing_is_made_beside_a_product_and_the_sum():
    """Whole backward passes: the product (2 bytes an element) and what ``.grad`` holds next, which is E4M3 (1), then
    BF16 (2), then the same memory. The control adds as plain operations do."""
    features, numel = 256, 256 * 256
    model = nn.Sequential(nn.Linear(features, features, bias=False))
    model, _ = amp.initialize(model, torch.optim.AdamW(model.parameters()), level="O2")
    made = []
    for _ in range(3):
        output = model(torch.randn(8, features, dtype=torch.bfloat16))
        made.append(allocated(lambda output=output: output.backward(torch.randn_like(output)), numel))
    assert made == [[1.0, 2.0], [2.0, 2.0], [2.0]]
    held = model[0].weight.grad
    assert allocated(lambda: held.store_(real(held) + real(held) * 1.0), numel) == [4.0] * 4
