"""Grouped products: each expert's rows times its own matrix, ragged and empty groups, from kernel to training step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from msamp_like import amp, kernels
from msamp_like.formats import BF16, E4M3, E5M2, ROW, WHOLE
from msamp_like.kernels import Operand, grouped, reference
from msamp_like.nn import GroupedLinear, grouped_linear
from msamp_like.policy import O0, O2, O3, Role, Rule
from msamp_like.tensor import ScalingTensor, real
from tests.closeness import same_bits, sqnr

EXPERTS, IN, OUT = 4, 48, 32
SPLITS = {
    "even": [8, 16, 24, 32],
    "ragged": [1, 14, 29, 40],
    "empty first and last": [0, 5, 20, 20],
    "empty inside": [7, 7, 7, 33],
    "rows of nobody": [3, 9, 9, 21],
    "no rows": [0, 0, 0, 0],
}
every_split = pytest.mark.parametrize("ends", SPLITS.values(), ids=list(SPLITS))


def offsets_of(ends: list[int]) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def tokens_of(ends: list[int]) -> int:
    return ends[-1] + (4 if ends[-1] == 21 else 0)


def expected(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    made = x.new_zeros(x.shape[0], weight.shape[1])
    for e, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
        made[start:stop] = x[start:stop] @ weight[e].t()
    return made


def stored(x: Tensor, format, block) -> Operand:
    if not format.scaled:
        return Operand(x.to(format.dtype), torch.ones(1, 1), WHOLE)
    return Operand(*reference.quantize_current(x, format, block)[:2], block)


# --- kernel ---------------------------------------------------------------------------------------------------------


@every_split
@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
@pytest.mark.parametrize("blocks", [(WHOLE, (OUT, -1)), (ROW, WHOLE), ((1, 16), (16, 16))], ids=str)
def test_the_product_is_that_of_the_real_values(ends, layout, blocks):
    """The kernel beside FP32 products of the dequantized operands; BF16 products of FP8 values lose nothing."""
    rows, weights = blocks
    count = tokens_of(ends)
    x, grad = torch.randn(count, IN), torch.randn(count, OUT)
    a = stored(x if layout == "nt" else grad, E4M3 if layout == "nt" else E5M2, rows)
    b = stored(x, E4M3, rows) if layout == "tn" else stored(torch.randn(EXPERTS, OUT, IN), E4M3, weights)
    left, right = (reference.dequantize(*t[:3], torch.float32) for t in (a, b))
    got = kernels.grouped_matmul(a, b, offsets_of(ends), layout, torch.float32)
    if layout == "tn":
        spans = list(zip([0, *ends], ends, strict=False))
        exact = torch.stack([left[start:stop].t() @ right[start:stop] for start, stop in spans])
    else:
        exact = expected(left, right if layout == "nt" else right.transpose(1, 2), ends)
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


def test_a_non_finite_row_flags_its_expert_alone():
    x = torch.randn(12, IN)
    x[5, 3] = torch.nan
    a, b = stored(x, E4M3, ROW), stored(torch.randn(EXPERTS, OUT, IN), E4M3, (OUT, -1))
    got = kernels.grouped_matmul(a, b, offsets_of([4, 8, 8, 12]), "nt", torch.bfloat16)
    assert got.isfinite().all(dim=1).tolist() == [row != 5 for row in range(12)]


def test_shapes_without_data():
    with torch._subclasses.FakeTensorMode():
        a = Operand(torch.empty(10, IN, dtype=E4M3.dtype), torch.empty(1, 1), WHOLE)
        b = Operand(torch.empty(EXPERTS, OUT, IN, dtype=E4M3.dtype), torch.empty(EXPERTS, 1), (OUT, -1))
        assert kernels.grouped_matmul(a, b, offsets_of([1, 2, 3, 10]), "nt", torch.bfloat16).shape == (10, OUT)


# --- layer ----------------------------------------------------------------------------------------------------------


@every_split
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_is_a_linear_an_expert(ends, dtype):
    layer = GroupedLinear(EXPERTS, IN, OUT, dtype=dtype)
    x = torch.randn(tokens_of(ends), IN, dtype=dtype, requires_grad=True)
    got = layer(x, offsets_of(ends))
    exact = expected(x.detach().float(), layer.weight.detach().float(), ends)
    torch.testing.assert_close(got.detach().float(), exact, rtol=2**-7, atol=2**-6)
    got.sum().backward()
    assert x.grad[ends[-1] :].count_nonzero() == 0
    assert layer.weight.grad.isfinite().all()


def converted(level, **options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": GroupedLinear(EXPERTS, IN, OUT)})
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = amp.initialize(model, optimizer, level=level, data_parallel=False, **options)
    return plain["experts"], model, optimizer


def losses(policy, ends, scale=None):
    """SQNR of output, grad_input and grad_weight beside FP32, with expert 1's weight ``scale`` times the others'."""
    plain, model, _ = converted(policy)
    if scale is not None:
        with torch.no_grad():
            plain.weight[1] *= scale
            model["experts"].weight.copy_(plain.weight)
    x = torch.randn(tokens_of(ends), IN, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    grad = torch.randn(tokens_of(ends), OUT)
    outputs = plain(x, offsets_of(ends)), model["experts"](y, offsets_of(ends))
    for output in outputs:
        output.backward(grad)
    start, stop = ends[0], ends[1]  # of expert 1
    pairs = [(outputs[0][start:stop], outputs[1][start:stop]), (x.grad, y.grad)]
    pairs += [(plain.weight.grad, real(model["experts"].weight.grad))]
    return [sqnr(*pair) for pair in pairs]


BLOCKS = {role: Rule(format=O2[role].format, block=(1, 16)) for role in (Role.INPUT, Role.WEIGHT, Role.GRAD_OUTPUT)}
ROWWISE = O2.with_rule(Role.INPUT, Rule(format=E4M3, block=ROW)).with_rule(
    Role.GRAD_OUTPUT, Rule(format=E5M2, block=ROW)
)
BLOCKWISE = ROWWISE
for _role, _rule in BLOCKS.items():
    BLOCKWISE = BLOCKWISE.with_rule(_role, _rule)


@pytest.mark.parametrize("policy", [O2, O3, ROWWISE, BLOCKWISE], ids=["O2", "O3", "rowwise", "blockwise"])
@pytest.mark.parametrize("ends", [SPLITS["ragged"], SPLITS["empty inside"]], ids=["ragged", "empty"])
def test_products_keep_what_a_linears_keep(policy, ends):
    """The floors of Fp8Linear: E4M3 costs 31.5 dB a cast, E5M2 25.5; a product has two, the gradient's rounding comes
    on top."""
    ends = [1, *ends[1:]] if ends[0] == ends[1] else ends
    output, grad_input, grad_weight = losses(policy, ends)
    assert output > 27
    assert grad_input > 23.5
    assert grad_weight > 22.5


def test_an_expert_with_small_weights_keeps_its_own_scale():
    """One scale for all experts, the control, loses an expert that is 2^-17 of the others below E4M3's range."""
    ends = SPLITS["ragged"]
    assert losses(O2, ends, scale=2.0**-17)[0] > 27
    plain = GroupedLinear(EXPERTS, IN, OUT)
    with torch.no_grad():
        plain.weight[1] *= 2.0**-17
    weight = stored(plain.weight.detach(), E4M3, WHOLE)
    x = torch.randn(40, IN)
    got = kernels.grouped_matmul(stored(x, E4M3, WHOLE), weight, offsets_of(ends), "nt", torch.float32)
    assert sqnr(plain(x, offsets_of(ends))[1:14], got[1:14]) < 15


def test_a_block_of_several_rows_cannot_take_tokens():
    policy = O2.with_rule(Role.INPUT, Rule(format=E4M3, block=(128, 128)))
    with pytest.raises(ValueError, match=r"would span experts: give \(1, 128\)"):
        converted(policy)


@pytest.mark.parametrize("level", [O0, O2, O3], ids=lambda level: level.name)
def test_conversion_report_training_state_and_way_back(level):
    _, model, optimizer = converted(level)
    layer = model["experts"]
    assert isinstance(layer.weight, ScalingTensor)
    row = amp.fp8_report(model).rows[0]
    assert (row.kind, row.product) == ("GroupedLinear", "bf16" if level is O0 else "fp8")
    assert row.flops == 2 * IN * OUT
    x, offsets = torch.randn(40, IN), offsets_of(SPLITS["ragged"])
    target = torch.randn(40, OUT)
    found = []
    for _ in range(12):
        loss = (layer(x, offsets) - target).square().mean()
        loss.backward()
        amp.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < 0.9 * found[0]
    saved = copy.deepcopy(amp.state_dict(model, optimizer))
    _, other, resumed = converted(level)
    amp.load_state_dict(other, resumed, saved)
    for m, o in ((model, optimizer), (other, resumed)):
        m["experts"](x, offsets).sum().backward()
        o.step()
    assert same_bits(layer.weight.detach(), other["experts"].weight.detach())
    amp.restore(model)
    assert type(layer.weight) is nn.Parameter
    assert layer(x, offsets).dtype == torch.float32


def test_what_does_not_fit_is_refused():
    layer = GroupedLinear(EXPERTS, IN, OUT)
    with pytest.raises(ValueError, match=r"takes rows of 48 and 4 offsets, got \(5, 48\) and \(3,\)"):
        layer(torch.randn(5, IN), offsets_of([1, 2, 5]))
    loose = ScalingTensor(torch.zeros(EXPERTS, OUT, IN, dtype=BF16.dtype), torch.ones(1, 1))
    with pytest.raises(ValueError, match="belongs to a GroupedLinear"):
        grouped_linear(torch.randn(5, IN), loose, offsets_of([1, 2, 3, 5]))


def test_slices_share_memory():
    b = stored(torch.randn(EXPERTS, OUT, IN), E4M3, (16, 16))
    one = grouped.matrix(b, 2)
    assert one.payload.data_ptr() == b.payload[2].data_ptr()
    exact = reference.dequantize(*b[:3], torch.float32)[2]
    assert torch.equal(reference.dequantize(*one[:3], torch.float32), exact)
