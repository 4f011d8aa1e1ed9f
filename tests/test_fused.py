"""Fused norms, activations and softmax: the definition against torch's own, the CPU twins against the definition.

Payloads and scales of what is kept are asked for to the bit where the value before them is the input itself
(activations); behind a sum or a library function FP32 may end in other bits, and then a few payloads in a hundred
thousand round to the other side.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from msamp_like.formats import E4M3, E5M2, WHOLE
from msamp_like.kernels import cpu_fused, fused, reference, reference_fused
from msamp_like.kernels.fused import KINDS, Grouped, Target
from msamp_like.kernels.reference import Operand
from tests.closeness import same_bits, sqnr
from tests.operands import needs_native

GROUP = (1, 128)
KEPT = Grouped(E4M3, GROUP)
TARGETS = {
    "plain": lambda dtype: Target(dtype),
    "groups": lambda dtype: Target(E4M3.dtype, GROUP),
    "delayed": lambda dtype: Target(E5M2.dtype, WHOLE, torch.full((1, 1), 2.0**-6)),
    "current": lambda dtype: Target(E4M3.dtype, WHOLE),
}
_TORCH = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@pytest.fixture
def twin(every_simd):
    """The native kernels under every instruction set that this processor has."""
    return cpu_fused


def data(*shape, dtype=torch.float32):
    return (torch.randn(*shape) * 2 + 0.5).to(dtype)


def kept(x, grouped=KEPT):
    return Operand(*reference_fused.keep(x.float(), grouped), grouped.block)


def floor(dtype):
    """dB that results of a dtype keep where FP32 may end in other bits before they are rounded to it."""
    return 120 if dtype == torch.float32 else 55


def close(got, expected, db):
    """All tensors of nested tuples: real ones to ``db``, codes but for the few that round to the other side."""
    if isinstance(got, tuple):
        return all(close(*pair, db) for pair in zip(got, expected, strict=True))
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    return got.numel() == 0 or sqnr(expected.float(), got.float()) > (60 if got.dtype.itemsize == 1 else db)


# --- the definition against torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("centered", [True, False], ids=["layer norm", "rms norm"])
@pytest.mark.parametrize("shape", [(3, 16, 256), (5, 200)], ids=str)
def test_norm_is_torch_s(centered, shape):
    x, weight, bias = data(*shape).requires_grad_(), data(shape[-1]).requires_grad_(), data(shape[-1]).requires_grad_()
    call = F.layer_norm if centered else F.rms_norm
    expected = call(x, shape[-1:], weight, bias, 1e-5) if centered else call(x, shape[-1:], weight, 1e-5)
    made, held, inverse = reference_fused.norm_quantize(
        x.detach(), weight.detach(), bias.detach() if centered else None, 1e-5, centered, Target(torch.float32), KEPT
    )
    assert sqnr(expected, made.payload) > 120  # FP32, another order of the sums
    grad = torch.randn(shape)
    grads = torch.autograd.grad(expected, (x, weight, bias) if centered else (x, weight), grad)
    got = reference_fused.norm_backward(grad, Operand(*held, GROUP), inverse, weight.detach(), centered, torch.float32)
    # one rounding of the normalized input, 31 dB; grad_input has it in its smaller part only, grad_bias not at all
    floors = (36, 29, 120)
    assert all(sqnr(*pair) > floor for *pair, floor in zip(grads, got, floors, strict=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True], ids=["alone", "gated"])
def test_activations_are_torch_s(kind, gated):
    gate, value = data(4, 256).requires_grad_(), data(4, 256).requires_grad_()
    expected = _TORCH[kind](gate) * (value if gated else 1)
    made, held, held_value = reference_fused.activation_quantize(
        gate.detach(), value.detach() if gated else None, kind, Target(torch.float32), KEPT
    )
    assert sqnr(expected, made.payload) > 120
    grad = torch.randn(4, 256)
    grads = torch.autograd.grad(expected, (gate, value) if gated else (gate,), grad)
    value_kept = Operand(*held_value, GROUP) if gated else None
    got = reference_fused.activation_backward(grad, Operand(*held, GROUP), value_kept, kind, Target(torch.float32))
    # one rounding behind a function of slope at most 1.1; a gate's gradient has the value's rounding too
    assert all(sqnr(a, b.payload) > 28 for a, b in zip(grads, got, strict=False))
    assert got[1].payload.numel() == (got[0].payload.numel() if gated else 0)


def test_softmax_is_torch_s():
    logits = (data(64, 300) * 3).requires_grad_()
    targets = torch.randint(0, 300, (64,))
    sums, held = reference_fused.softmax_quantize(logits.detach(), KEPT)
    torch.testing.assert_close(sums, torch.logsumexp(logits.detach(), -1))
    grads = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="none"), logits, torch.ones(64))[0]
    got = reference_fused.softmax_backward(Operand(*held, GROUP), targets, torch.ones(64), torch.float32)
    assert sqnr(grads, got) > 31


@pytest.mark.parametrize(
    "grouped,passes",
    [
        (KEPT, True),
        (Grouped(E4M3, (1, 16)), True),
        (Grouped(E4M3, WHOLE), False),
        (Grouped(E5M2, GROUP), False),
        (Grouped(E5M2, WHOLE), False),
    ],
    ids=str,
)
def test_what_outliers_do(grouped, passes):
    """The gradient at tokens beside others that are 100,000 times larger: one rounding in three bits, 31 dB and a
    little for SiLU's slope, in groups; the negative controls, one scale for the tensor or two bits, are below."""
    x = data(64, 256)
    x[::8] *= 1e5
    x, grad = x.requires_grad_(), torch.randn(64, 256)
    exact = torch.autograd.grad(F.silu(x), x, grad)[0]
    small = torch.arange(64) % 8 != 0
    got = reference_fused.activation_backward(grad, kept(x.detach(), grouped), None, "silu", Target(torch.float32))
    assert (sqnr(exact[small], got[0].payload[small]) > 40) == passes


def test_a_value_that_is_not_finite_flags_its_group_alone():
    x = data(4, 256)
    x[1, 130] = torch.inf
    held = kept(x)
    grads = fused.activation_backward(torch.ones(4, 256), held, None, "gelu", Target(torch.float32))[0].payload
    assert grads[1, 128:].isnan().all()
    assert grads.isfinite().sum() == 4 * 256 - 128


# --- the twins ------------------------------------------------------------------------------------------------------


@needs_native
class TestNative:
    @pytest.mark.parametrize("out", TARGETS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("columns", [256, 200], ids=str)
    def test_norms(self, twin, columns, dtype, out):
        x, weight, bias = data(2, 37, columns, dtype=dtype), data(columns), data(columns)
        for centered in (True, False):
            arguments = x, weight, bias if centered else None, 1e-5, centered, TARGETS[out](dtype), KEPT
            made, expected = twin.norm_quantize(*arguments), reference_fused.norm_quantize(*arguments)
            assert close(made, expected, floor(dtype))
            grad = data(2, 37, columns, dtype=dtype)
            rest = grad, Operand(*expected[1], GROUP), expected[2], weight, centered, dtype
            assert close(twin.norm_backward(*rest), reference_fused.norm_backward(*rest), floor(dtype))

    @pytest.mark.parametrize("out", TARGETS)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(3, 5, 256), (5, 2200)], ids=str)
    def test_activations(self, twin, kind, shape, out):
        for dtype in (torch.float32, torch.bfloat16):
            gate, value, grad = (data(*shape, dtype=dtype) for _ in range(3))
            target = TARGETS[out](dtype)
            for factor in (None, value):
                made, expected = (
                    k.activation_quantize(gate, factor, kind, target, KEPT) for k in (twin, reference_fused)
                )
                assert all(same_bits(*pair) for i in (1, 2) for pair in zip(made[i], expected[i], strict=True))
                assert close(made[0], expected[0], floor(dtype))
                value_kept = None if factor is None else kept(value)
                rest = grad, kept(gate), value_kept, kind, target
                grads, exact = twin.activation_backward(*rest), reference_fused.activation_backward(*rest)
                assert close(grads, exact, floor(dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_softmax(self, twin, dtype):
        logits, targets, grad = data(33, 300, dtype=dtype) * 4, torch.randint(0, 300, (33,)), torch.rand(33)
        targets[5], logits[7, 20:] = -1, -torch.inf
        (sums, held), (exact_sums, exact) = (k.softmax_quantize(logits, KEPT) for k in (twin, reference_fused))
        torch.testing.assert_close(sums, exact_sums)
        assert close(tuple(held)[:1], tuple(exact)[:1], 0)
        rest = Operand(*exact, GROUP), targets, grad, dtype
        assert close(twin.softmax_backward(*rest), reference_fused.softmax_backward(*rest), 55)

    def test_sums_do_not_depend_on_threads(self, twin):
        x, weight, grad = data(4096, 256), data(256), data(4096, 256)
        _, held, inverse = twin.norm_quantize(x, weight, None, 1e-5, True, Target(torch.float32), KEPT)
        threads, made = torch.get_num_threads(), []
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                made.append(twin.norm_backward(grad, Operand(*held, GROUP), inverse, weight, True, torch.float32))
        finally:
            torch.set_num_threads(threads)
        assert all(same_bits(a, b) for other in made[1:] for a, b in zip(other, made[0], strict=True))

    def test_extreme_inputs(self, twin):
        x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 200.0, -200.0, 3e4, -3e4, torch.nan, 1, 1, 1, 1, 1])
        x, target, both = x.repeat(1, 8), Target(torch.float32), (twin, reference_fused)
        held = Operand(x.nan_to_num().to(E5M2.dtype), torch.ones(1, 1), GROUP)
        for kind in KINDS:
            made, expected = (k.activation_quantize(x, None, kind, target, KEPT)[0].payload for k in both)
            torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
            made, expected = (k.activation_backward(x * 0 + 1, held, None, kind, target)[0].payload for k in both)
            torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_cases_without_a_fast_path():
    x, odd = data(4, 96).double(), Grouped(E4M3, (1, 48))
    for dtype, grouped in ((torch.float64, KEPT), (torch.float32, odd)):
        made, held, inverse = fused.norm_quantize(x.to(dtype), None, None, 1e-5, True, Target(dtype), grouped)
        grads = fused.norm_backward(x.to(dtype), Operand(*held, grouped.block), inverse, None, True, dtype)
        assert made.payload.dtype == grads[0].dtype == dtype
        assert sqnr(F.layer_norm(x, (96,)), made.payload) > 100


# --- the ops --------------------------------------------------------------------------------------------------------


def test_ops_tell_their_shapes():
    ops, x = torch.ops.msamp_like, data(3, 4, 256)
    held = kept(x)
    target = torch.bfloat16, None, None
    groups, delayed = (E4M3.dtype, list(GROUP), None), (E5M2.dtype, list(WHOLE), torch.ones(1, 1))
    grouped = E4M3.dtype, list(GROUP)
    rows = held.payload.view(12, 256), held.scale_inv
    calls = [
        *((ops.norm_quantize, (x, x[0, 0], None, 1e-5, True, *out, *grouped)) for out in (target, groups, delayed)),
        (ops.norm_backward, (x, *held[:3], torch.ones(12), None, False, torch.float32)),
        *((ops.activation_quantize, (x, v, "silu", *out, *grouped)) for v in (None, x) for out in (target, groups)),
        (ops.activation_backward, (x, *held[:2], None, None, list(GROUP), "gelu", *delayed)),
        (ops.activation_backward, (x, *held[:2], *held[:2], list(GROUP), "gelu", *groups)),
        (ops.softmax_quantize, (x.view(12, 256), *grouped)),
        (
            ops.softmax_backward,
            (*rows, list(GROUP), torch.zeros(12, dtype=torch.int64), torch.ones(12), torch.bfloat16),
        ),
    ]
    for op, arguments in calls:
        arguments = tuple(list(a) if isinstance(a, tuple) else a for a in arguments)
        stored = any(isinstance(a, torch.Tensor) and a.dtype == E4M3.dtype for a in arguments)  # has no `*`
        checks = ("test_faketensor",) if stored else ("test_schema", "test_faketensor")
        torch.library.opcheck(op.default, arguments, test_utils=checks)


def test_scales_are_those_of_the_casts():
    x = data(4, 256)
    assert all(
        same_bits(*pair) for pair in zip(kept(x)[:2], reference.quantize_current(x, E4M3, GROUP)[:2], strict=True)
    )
