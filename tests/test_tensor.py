"""ScalingTensor: a torch.Tensor wherever torch holds one, exact where it says so, and an error everywhere else."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from msamp_like.formats import BF16, E4M3, E5M2, FORMATS, FP16, FP32, ROW, WHOLE, grid_shape
from msamp_like.kernels import reference
from msamp_like.policy import Rule
from msamp_like.scaling import quantize
from msamp_like.tensor import ScalingTensor, operations, real, unscaled
from tests.closeness import same_bits, sqnr

BLOCKS = [WHOLE, ROW, (1, 128), (128, 128), (1, 32)]
SCALED = [E4M3, E5M2, FP16]


def stored(*shape: int, format=E4M3, block=WHOLE, dtype=torch.float32) -> ScalingTensor:
    return quantize(torch.randn(shape, dtype=dtype), Rule(format=format, block=block))


@pytest.fixture(params=[(f, b) for f in FORMATS.values() for b in BLOCKS], ids=lambda p: f"{p[0]}-{p[1]}")
def tensor(request):
    """One of every format and block, in a shape that is a multiple of none."""
    format, block = request.param
    return stored(9, 200, format=format, block=block, dtype=torch.bfloat16)


class TestAnyFormatAndBlock:
    def test_is_a_tensor_of_the_outer_dtype(self, tensor):
        assert isinstance(tensor, torch.Tensor)
        assert (tensor.shape, tensor.dtype, tensor.device) == ((9, 200), torch.bfloat16, torch.device("cpu"))
        assert tensor.dequantize().dtype == torch.bfloat16
        assert tensor.dequantize(torch.float32).dtype == torch.float32

    def test_real_is_payload_times_scale_inv(self, tensor):
        rows, columns = (n if size == -1 else size for n, size in zip(tensor.shape, tensor.block))
        expanded = tensor.scale_inv.repeat_interleave(rows, 0)[:9].repeat_interleave(columns, 1)[:, :200]
        assert torch.equal(tensor.dequantize(torch.float32), reference.decode(tensor.payload) * expanded)

    def test_stored_bytes_are_those_of_the_parts(self, tensor):
        assert tensor.stored_bytes == 9 * 200 * tensor.format.bytes + 4 * tensor.scale_inv.numel()
        assert tensor.cast_bytes == 0

    def test_copies_hold_the_same_bits_in_other_memory(self, tensor):
        for made in (tensor.clone(), copy.deepcopy(tensor), tensor.to(torch.bfloat16, copy=True)):
            assert same_bits(made, tensor)
            assert made.payload.data_ptr() != tensor.payload.data_ptr()
            assert made.scale_inv.data_ptr() != tensor.scale_inv.data_ptr()

    def test_a_cast_of_the_outer_dtype_leaves_the_storage(self, tensor):
        for made, dtype in ((tensor.float(), torch.float32), (tensor.to(torch.float16), torch.float16)):
            assert made.dtype == dtype
            assert same_bits(made.payload, tensor.payload)
            assert same_bits(made.scale_inv, tensor.scale_inv)

    def test_load_trusts_no_pickled_code(self, tensor):
        buffer = io.BytesIO()
        torch.save({"a": tensor, "p": nn.Parameter(tensor), "f": nn.Parameter(tensor, requires_grad=False)}, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        assert same_bits(loaded["a"], tensor)
        assert same_bits(loaded["p"].detach(), tensor)
        assert isinstance(loaded["p"], nn.Parameter)
        assert [loaded[key].requires_grad for key in "apf"] == [False, True, False]

    def test_scalar_products_touch_the_scale_alone(self, tensor):
        """Behaviour 13: exact for a power of two, in every format."""
        before = tensor.clone()
        tensor.mul_(2.0)
        assert same_bits(tensor.payload, before.payload)
        assert torch.equal(tensor.scale_inv, before.scale_inv * 2)
        tensor.div_(torch.tensor(2.0))
        assert same_bits(tensor, before)
        with pytest.raises(NotImplementedError, match="takes one number"):
            tensor.mul_(torch.ones(200))
        with pytest.raises(NotImplementedError, match="takes one number"):
            tensor.div_(before)
        assert same_bits(tensor, before)

    def test_transpose_is_exact(self, tensor):
        """Behaviour 14; the blocks turn with it."""
        turned = tensor.t()
        assert torch.equal(turned.dequantize(), tensor.dequantize().t())
        assert turned.block == tensor.block[::-1]
        assert same_bits(turned.t(), tensor)

    def test_zero_is_zero_with_a_usable_scale(self, tensor):
        tensor.zero_()
        assert tensor.dequantize().count_nonzero() == 0
        assert torch.equal(tensor.scale_inv, torch.ones_like(tensor.scale_inv))
        assert same_bits(torch.zeros_like(tensor), tensor)

    def test_writing_real_values_rounds_them_once(self, tensor):
        values = torch.randn(9, 200)  # FP32: the outer dtype, BF16 here, must not round them on the way
        values = values if tensor.format.signed else values.abs()
        tensor.copy_(values)
        assert same_bits(tensor, quantize(values, rule_of(tensor)).to(torch.bfloat16))
        assert sqnr(values, tensor) > 6 * tensor.format.mantissa_bits + 10

    def test_norm_is_that_of_the_real_values(self, tensor):
        expected = tensor.dequantize(torch.float32).norm()
        torch.testing.assert_close(tensor.norm().float(), expected, rtol=2**-8, atol=0)  # .norm() is in BF16

    def test_repr_names_format_and_block(self, tensor):
        assert f"format={tensor.format}, block={tensor.block}" in repr(tensor)


def rule_of(tensor: ScalingTensor) -> Rule:
    return Rule(format=tensor.format, block=tensor.block)


# --- construction ---------------------------------------------------------------------------------------------------


def test_scales_must_fit_the_grid():
    with pytest.raises(ValueError, match=r"has scales of shape \(4, 2\), got \(1, 1\); reshape"):
        ScalingTensor(torch.zeros(4, 200, dtype=E4M3.dtype), torch.ones(1, 1), (1, 128))


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0), (2, 3, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_any_shape_is_stored(shape, block):
    tensor = stored(*shape, block=block)
    assert tensor.scale_inv.shape == grid_shape(shape, block)
    assert tensor.dequantize().shape == shape
    assert same_bits(copy.deepcopy(tensor), tensor)


def test_unscaled_values_are_as_they_came():
    """Behaviour 6: 1/512 survives, and the scale is 1."""
    values = torch.full((3, 4), 1 / 512)
    tensor = unscaled(values.bfloat16(), torch.float32)
    assert torch.equal(tensor.dequantize(), values)
    assert tensor.scale_inv.item() == 1.0


def test_casts_are_independent():
    """Behaviour 15: a changed scale reaches the tensor that holds it, not another made from the same values."""
    values = torch.randn(4, 4)
    one, other = (quantize(values, Rule(format=E4M3)) for _ in range(2))
    one.mul_(4.0)
    assert torch.equal(one.dequantize(), other.dequantize() * 4)


# --- the compute copy -----------------------------------------------------------------------------------------------


class TestCast:
    def test_is_made_once_until_the_tensor_is_written(self):
        weight = stored(8, 32, format=FP16, block=(1, 128))
        first = weight.cast(E4M3)
        assert weight.cast(E4M3) is first
        assert weight.cast(E5M2) is not first
        assert weight.cast_bytes == 2 * (8 * 32 + 4)
        assert torch.equal(first.payload, weight.dequantize().mul(1 / first.scale_inv).to(E4M3.dtype))

    @pytest.mark.parametrize(
        "write",
        [
            lambda w: w.mul_(0.5),
            lambda w: w.div_(3.0),
            lambda w: w.zero_(),
            lambda w: w.fill_(2.0),
            lambda w: w.copy_(torch.ones(8, 32)),
            lambda w: w.copy_(stored(8, 32, format=FP16, block=(1, 128))),
            lambda w: w.copy_(stored(8, 32, format=E4M3)),
            lambda w: w.lerp_(torch.zeros(8, 32), 0.5),
            lambda w: w.normal_(),
            lambda w: w.uniform_(-1, 1),
            lambda w: w.store_(torch.ones(8, 32)),
            lambda w: w.add_(torch.ones(8, 32)),
            lambda w: torch._foreach_mul_([w], 0.5),
            lambda w: torch._foreach_zero_([w]),
            lambda w: torch._foreach_copy_([w], [torch.ones(8, 32)]),
            lambda w: torch._foreach_lerp_([w], [torch.zeros(8, 32)], 0.1),
            lambda w: nn.init.kaiming_uniform_(w),
            lambda w: nn.init.constant_(w, 0.25),
            lambda w: w.data.copy_(torch.ones(8, 32)),
            lambda w: w.detach().mul_(3.0),
            lambda w: nn.Parameter(w).data.zero_(),
        ],
    )
    def test_every_write_makes_it_stale(self, write):
        """Also a write through an alias of the same storage: ``weight.data`` is how much user code writes weights."""
        weight = stored(8, 32, format=FP16, block=(1, 128))
        before = weight.cast(E4M3)
        write(weight)
        after = weight.cast(E4M3)
        assert after is not before
        expected = quantize(weight.dequantize(), Rule(format=E4M3))
        assert same_bits(after.payload, expected.payload)
        assert same_bits(after.scale_inv, expected.scale_inv)

    def test_a_write_to_a_copy_leaves_it(self):
        weight = stored(8, 32, format=FP16)
        before = weight.cast(E4M3)
        for other in (weight.clone(), copy.deepcopy(weight), weight.to(torch.float64)):
            other.zero_()
        assert weight.cast(E4M3) is before

    def test_replacing_the_storage_leaves_an_aliass_copy(self):
        weight = stored(8, 32, format=FP16)
        alias = weight.detach()
        before = alias.cast(E4M3)
        weight.replace_(stored(8, 32))
        assert alias.cast(E4M3) is before
        assert weight.cast(E4M3).payload is weight.payload

    def test_made_in_inference_mode_can_be_trained_with(self):
        """Validation under inference_mode comes right after a step, and the copy it makes is the next step's."""
        weight = stored(8, 32, format=FP16)
        with torch.inference_mode():
            made = weight.cast(E4M3)
        assert not made.payload.is_inference()
        assert not made.scale_inv.is_inference()
        assert weight.cast(E4M3) is made

    def test_the_stored_bytes_serve_where_they_fit(self):
        weight = stored(8, 32, format=E4M3)
        assert weight.cast(E4M3).payload is weight.payload
        assert weight.cast_bytes == 0
        assert weight.cast(E4M3, (1, 32)).payload is not weight.payload

    def test_bf16_copy_is_the_real_values(self):
        weight = stored(8, 32, format=FP16, block=(1, 128))
        made = weight.cast(BF16)
        assert torch.equal(made.payload, weight.dequantize(torch.bfloat16))
        assert made.scale_inv.item() == 1.0


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", SCALED, ids=str)
def test_a_new_sum_is_bf16_and_a_sum_in_place_is_stored_in_place(format):
    """``weight.data.add_(noise)`` has to reach the weight, and leave it in its format; behaviour 17."""
    first, second = stored(16, 16, format=format), stored(16, 16, format=format)
    exact = first.dequantize() + second.dequantize()
    total = first + second
    assert total.format is BF16
    assert torch.equal(total.dequantize(), exact.bfloat16().float())
    first += second
    assert same_bits(first, quantize(exact, rule_of(first)))
    for _ in range(10):
        addend, before = torch.randn(16, 16), first.dequantize()
        first.data.add_(addend, alpha=-2)
        assert same_bits(first, quantize(before + addend * -2, rule_of(first)))
    total += second
    assert total.format is BF16


def test_sums_of_plain_and_scaling_tensors():
    """A tied embedding: autograd adds a plain gradient to a stored one, in either order."""
    plain, ours = torch.randn(8, 8), stored(8, 8)
    expected = (plain + ours.dequantize()).bfloat16().float()
    assert torch.equal((plain + ours).dequantize(), expected)
    assert torch.equal((ours + plain).dequantize(), expected)
    torch.testing.assert_close(plain.clone().add_(ours), plain + ours.dequantize())


@pytest.mark.parametrize("held", [False, True], ids=["stolen", "held by a hook"])
def test_accumulates_in_grad(held):
    """Autograd takes a gradient that nobody else holds, and copies one that somebody does. A BF16 one stays BF16."""
    parameter = nn.Parameter(stored(4, 8, format=FP16))
    sent, seen = [stored(4, 8, format=BF16) for _ in range(3)], []
    for gradient in sent:
        if held:
            handle = parameter.register_hook(seen.append)
        torch.autograd.backward([parameter.clone()], [gradient.clone()])
        assert parameter.grad.format is BF16
        if held:
            handle.remove()
    first, second, third = (g.dequantize() for g in sent)
    total = ((first + second).bfloat16() + third.bfloat16()).float()
    assert torch.equal(parameter.grad.dequantize(), total)
    assert parameter.grad.dtype == parameter.dtype
    assert all(same_bits(a, b) for a, b in zip(seen, sent))


# --- lookup ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [WHOLE, ROW, (1, 32), (2, 32), (128, 128)], ids=str)
@pytest.mark.parametrize("format", [E4M3, FP16, BF16], ids=str)
def test_embedding_reads_rows_as_dequantized(format, block):
    table = stored(11, 48, format=format, block=block)
    indices = torch.randint(11, (3, 5))
    assert torch.equal(nn.functional.embedding(indices, table), table.dequantize()[indices])
    parameter = nn.Parameter(table)
    nn.functional.embedding(indices, parameter).sum().backward()
    counts = torch.bincount(indices.flatten(), minlength=11).float()
    assert torch.equal(real(parameter.grad), counts.unsqueeze(1).expand(11, 48))


# --- non-finite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("format", [*SCALED, BF16, FP32], ids=str)
def test_one_bad_element_flags_the_tensor(format, value):
    """Behaviour 12: through the scale where there is one, and every later product keeps the flag."""
    values = torch.randn(4, 6)
    values[2, 3] = value
    tensor = quantize(values, Rule(format=format))
    for _ in range(2):
        seen = tensor.scale_inv if format.scaled else tensor.payload
        assert not torch.isfinite(seen).all()
        assert not torch.isfinite(tensor.norm())
        tensor.mul_(0.0)  # clipping by an infinite norm does this
    assert torch.isfinite(quantize(torch.randn(4, 6), Rule(format=format)).scale_inv).all()


def test_torchs_unscale_sees_the_flag_in_any_mixture():
    """Behaviour 37: GradScaler's kernel over FP8, BF16 and plain gradients together."""
    good = [stored(3, 4), stored(3, 4, format=BF16), torch.randn(3), stored(2, 2, format=FP16)]
    values = [real(t).clone() for t in good]
    found, quarter = torch.zeros(1), torch.tensor([0.25])
    torch._amp_foreach_non_finite_check_and_unscale_(good, found, quarter)
    assert found.item() == 0
    for tensor, value in zip(good, values):
        assert torch.equal(real(tensor), value * 0.25)
    for bad in range(len(good)):
        for spoil in (lambda t: t.copy_(torch.full(t.shape, float("nan"))), lambda t: t.mul_(float("inf"))):
            tensors = [t.clone() for t in good]
            spoil(tensors[bad])
            found.zero_()
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, quarter)
            assert found.item() == 1, bad


# --- what is refused ------------------------------------------------------------------------------------------------

UNDEFINED = {
    "mm": lambda t: torch.mm(t, t),
    "addmm": lambda t: torch.addmm(torch.zeros(8, 8), t, t),
    "bmm": lambda t: torch.bmm(t.unsqueeze(0), t),
    "matmul": lambda t: torch.ones(8, 8) @ t,
    "mul": lambda t: t * 2,
    "sub": lambda t: t - t,
    "abs": lambda t: t.abs(),
    "sum": lambda t: t.sum(),
    "index": lambda t: t[0],
    "isfinite": lambda t: torch.isfinite(t),
    "cat": lambda t: torch.cat([t, t]),
    "item": lambda t: t.max(),
    "where": lambda t: torch.where(torch.ones(8, 8, dtype=torch.bool), t, t),
    "reshape": lambda t: t.reshape(4, 16),
    "linear without products": lambda t: nn.functional.linear(torch.ones(1, 8), t),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_an_undefined_operation_raises_with_the_remedy(name):
    with pytest.raises(NotImplementedError, match=r"dequantize|keeps its shape"):
        UNDEFINED[name](stored(8, 8))


def test_the_error_names_the_operation():
    with pytest.raises(NotImplementedError, match=r"aten\.mm\.default .*\.dequantize\(\).*overrides"):
        torch.mm(stored(8, 8), torch.ones(8, 8))


def test_only_a_leaf_is_deep_copied():
    result = nn.Parameter(stored(4, 4)).clone()
    with pytest.raises(RuntimeError, match="only a leaf .* detach"):
        copy.deepcopy(result)


def test_a_deep_copy_keeps_parameter_gradient_and_ties():
    parameter = nn.Parameter(stored(4, 4), requires_grad=True)
    parameter.grad = stored(4, 4)
    first, second = copy.deepcopy([parameter, parameter])
    assert first is second
    assert isinstance(first, nn.Parameter)
    assert isinstance(first, ScalingTensor)
    assert first.requires_grad
    assert same_bits(first.grad, parameter.grad)
    assert first.grad.payload.data_ptr() != parameter.grad.payload.data_ptr()


def test_the_table_holds_operations_of_torch_alone():
    for operation in operations.OPERATIONS:
        assert str(operation).startswith("aten."), operation


def test_equality_is_of_real_values():
    tensor = stored(4, 4)
    assert torch.equal(tensor, tensor.clone())
    assert torch.equal(tensor, tensor.dequantize())
    assert not torch.equal(tensor, tensor.clone().mul_(2))


def test_a_model_moves_to_shared_memory():
    model = nn.ParameterList([stored(4, 4)])
    before = model[0].detach().clone()
    assert not model[0].is_shared()
    model.share_memory()
    assert model[0].is_shared()
    assert model[0].scale_inv.is_shared()
    assert same_bits(model[0].detach(), before)


def test_to_an_empty_device_and_back_keeps_the_form():
    tensor = stored(4, 200, block=(1, 128)).to("meta")
    assert (tensor.device.type, tensor.payload.dtype, tensor.block) == ("meta", E4M3.dtype, (1, 128))
    empty = torch.empty_like(tensor, device="cpu")
    assert torch.equal(empty.dequantize(), torch.zeros(4, 200))
