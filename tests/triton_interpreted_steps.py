"""Checks of the optimizers' fused steps in Triton on CPU tensors; test_triton.py runs this with TRITON_INTERPRET=1.

Bit equality with the reference everywhere: what one program does to its tile, and what a table does to many rows.
"""

from __future__ import annotations

import pytest
import torch

from msamp_like.formats import BF16, E4M3, E5M2, FP16, FP32, UE5M3, WHOLE
from msamp_like.kernels import Operand, reference, reference_updates, triton_optimizers, triton_table
from msamp_like.kernels.reference_updates import AdamScalars, LionScalars, Row, SgdScalars
from msamp_like.kernels.triton_optimizers import adam_steps_
from msamp_like.kernels.triton_table import CHOICE
from tests.operands import NOISE, STORED, adam_operands, around_binades, bits, row_of, same
from tests.test_updates import BLOCK, SCALARS, cloned, lean_row, o2_row, plain_row, stored, tensors_of

SMALL = CHOICE._replace(elements=1024, tiles=2, settle_tiles=2)  # so that a few thousand elements are many programs


def copy_of(row: Row, format, block=WHOLE, factor=1.0) -> Operand:
    """A copy with the scale of what the row holds now, or one that is ``factor`` times too large."""
    made = stored(reference.dequantize(*row.param[:3], torch.float32), format, block)
    return made._replace(scale_inv=made.scale_inv * factor)


def table() -> list[Row]:
    """Rows of every level, of several sizes, each kind twice: full blocks, ragged ones, none."""
    rows = [o2_row((3, 1024), seed=1), o2_row((5, 200), seed=2), o2_row((2, 256), stochastic=False, seed=3)]
    rows += [lean_row((4, 768), seed=4), lean_row((3, 130), seed=5), lean_row((2, 128), stochastic=False, seed=6)]
    rows += [plain_row((1000,), seed=7), plain_row((256,), seed=8)]
    copied = [row._replace(copy=copy_of(row, E4M3, factor=f)) for row in rows[:3] for f in (1.0, 0.5, torch.inf)]
    copied += [rows[6]._replace(copy=copy_of(rows[6], BF16)), rows[7]._replace(copy=copy_of(rows[7], BF16))]
    copied += [rows[0]._replace(copy=copy_of(rows[0], E4M3, (128, 128)))]
    return [cloned(row) for row in (*rows, *copied)]


def agree(rows, scalars=SCALARS, steps=1, choice=SMALL, name="adam_steps_"):
    got, expected = [cloned(row) for row in rows], [cloned(row) for row in rows]
    for step in range(steps):
        getattr(triton_optimizers, name)([row._replace(step=row.step + step) for row in got], scalars, choice=choice)
        getattr(reference_updates, name)([row._replace(step=row.step + step) for row in expected], scalars)
    for a, b in zip(got, expected, strict=True):
        assert all(same(*pair) for pair in zip(tensors_of(a), tensors_of(b), strict=True))
    return got


# --- one row ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("shape", [(3, 256), (5, 200)], ids=str)
@pytest.mark.parametrize("noise", [None, NOISE], ids=["nearest", "stochastic"])
def test_adam_equals_the_reference(stored, shape, noise):
    kinds = [(0.1, True, {}), (0.1, False, {1: torch.nan}), (0.0, True, {0: torch.inf}), (0.1, True, {3: torch.inf})]
    for weight_decay, decoupled, poison in kinds:
        row = row_of(adam_operands(shape, STORED[stored], noise, poison), step=4)
        agree([row], AdamScalars(1e-3, 0.9, 0.999, 1e-8, weight_decay, decoupled), choice=CHOICE)


@pytest.mark.parametrize("format", [E4M3, FP16, E5M2, UE5M3, BF16], ids=str)
def test_scales_and_codes_on_both_sides_of_every_binade(format):
    """With betas of 0 the moments are the gradient and its square: any numbers can be put there."""
    edges = around_binades(FP16 if format is BF16 else format)[0]
    edges = edges[edges.isfinite()][::6]
    values = torch.zeros(len(edges), 128)
    values[:, 3], values[:, 5] = edges, -edges / 3
    values[:, 7] = edges * 2.0**-12  # among the subnormal numbers of the block's scale
    moments = [stored(values * 0, format, BLOCK), stored(values * 0, FP16, BLOCK)]
    first = moments[0] if format.signed else stored(values * 0, E4M3, BLOCK)
    second = moments[1] if format.signed else moments[0]
    row = Row(stored(values * 0, FP32, WHOLE), stored(values, FP32, WHOLE), (first, second), 1)
    agree([row], AdamScalars(1e-3, 0.0, 0.0, 1e-8, 0.0, True), choice=CHOICE)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("build", [lean_row, o2_row, plain_row])
def test_flags_reach_whole_tensors_and_their_copies(build, poison):
    row = build((2, 640))
    if row.residual is None:
        row = row._replace(copy=copy_of(row, E4M3 if build is o2_row else BF16))
    value = torch.full((2, 640), 1e-3)
    value[1, 600] = poison
    row = row._replace(grad=stored(value, FP32, WHOLE)._replace(scale_inv=torch.ones(1, 1)))
    row.grad.payload[1, 600] = poison
    (got,) = agree([row])
    scales = [got.copy.scale_inv if got.copy else got.param.scale_inv]
    assert all(bool(scale.isinf()) for scale in scales)
    agree([got._replace(grad=stored(torch.ones(2, 640), E4M3, WHOLE))])  # what is flagged stays so, as in the reference


def test_a_master_in_two_parts_over_steps():
    """Its scale is a bound's until the next step tightens it; a value that is beyond it saturates."""
    agree([lean_row((3, 384))], steps=6)
    row = lean_row((3, 384))
    row.residual.amax.fill_(1e-3)  # not the truth: most of the weights are larger
    (got,) = agree([row])
    assert (got.param.payload.view(torch.uint8) & 0x7F == 0x7E).sum() > 100
    agree([lean_row((3, 384))], AdamScalars(1e-3, 0.9, 0.5, 0.0, 0.0, False))  # quotients that are clamped, 0 / 0


# --- a table ----------------------------------------------------------------------------------------------------------


def test_a_table_equals_its_rows_one_by_one():
    agree(table(), steps=2)


@pytest.mark.parametrize(
    ("name", "scalars"),
    [
        ("lion_steps_", LionScalars(1e-4, 0.9, 0.99, 0.1)),
        ("sgd_steps_", SgdScalars(1e-3, 0.0, 0.0, 0.1, False)),
        ("sgd_steps_", SgdScalars(1e-3, 0.9, 0.1, 0.0, False)),
        ("sgd_steps_", SgdScalars(1e-3, 0.9, 0.0, 0.1, True)),
    ],
)
def test_other_optimizers_equal_the_reference(name, scalars):
    """One state each; the first row is at its first step, where momentum is the gradient."""
    rows = [row._replace(states=row.states[:1], step=1 + i % 2) for i, row in enumerate(table())]
    rows = [row for i, row in enumerate(rows) if i in (0, 1, 3, 4, 5, 6, 8, 9, 17)]
    poisoned = rows[6]._replace(grad=stored(torch.full((3, 1024), torch.inf), E4M3, WHOLE))
    agree([*rows, cloned(poisoned)], scalars, name=name)


def test_another_key_is_noticed(monkeypatch):
    """The control: noise is of the row's own keys."""
    monkeypatch.setattr(triton_table, "keys", lambda noise: (1, 2))
    with pytest.raises(AssertionError):
        agree([o2_row((2, 256))])
    agree([o2_row((2, 256), stochastic=False)])


def test_a_copy_whose_amax_crossed_a_binade_is_written_again(monkeypatch):
    """The control: without the launch that settles, its scale and codes are those of the wrong binade."""
    row = o2_row((3, 1024))
    right, wrong = (row._replace(copy=copy_of(row, E4M3, factor=factor)) for factor in (1.0, 0.5))
    agree([right, wrong])
    launch = triton_optimizers.launch

    def unsettled(kernel, *arguments, **options):
        if kernel is triton_optimizers.step_kernel:
            launch(kernel, *arguments, **options)

    monkeypatch.setattr(triton_optimizers, "launch", unsettled)
    agree([right])
    with pytest.raises(AssertionError):
        agree([wrong])


def test_as_many_launches_for_many_rows_as_for_one(monkeypatch):
    counts = []
    launch = triton_optimizers.launch
    monkeypatch.setattr(triton_optimizers, "launch", lambda *a, **k: (counts.append(a[0].__name__), launch(*a, **k)))
    for number in (1, 3):
        counts.clear()
        rows = [o2_row((2, 256), seed=i) for i in range(number)]
        adam_steps_(rows, SCALARS, choice=SMALL)
        assert counts == ["step_kernel"]
        adam_steps_([row._replace(copy=copy_of(row, E4M3)) for row in rows], SCALARS, choice=SMALL)
        assert counts[1:] == ["step_kernel", "settle_kernel"]
    one = row_of(adam_operands((2, 256), STORED["one scale a tensor"], None, {}), step=1)
    adam_steps_([one], SCALARS, choice=SMALL)
    assert counts[3:] == ["step_kernel", "step_kernel", "settle_kernel"]


def test_only_numbers_are_uploaded_again(monkeypatch):
    uploads = []
    upload = triton_table._uploaded
    monkeypatch.setattr(triton_table, "_uploaded", lambda t, device: (uploads.append(t.numel()), upload(t, device))[1])
    rows = [o2_row((2, 256), seed=i) for i in range(3)]
    adam_steps_(rows, SCALARS, choice=SMALL)
    uploads.clear()
    adam_steps_([row._replace(step=row.step + 1) for row in rows], SCALARS, choice=SMALL)
    assert uploads == [3 * 12]
    moved = [row._replace(grad=row.grad._replace(payload=row.grad.payload.clone())) for row in rows]
    adam_steps_(moved, SCALARS, choice=SMALL)
    assert uploads[1:] == [3 * 16, 3 * 12]


@pytest.mark.parametrize("bad", [1.0, torch.nan, 0.0])
def test_a_bad_step_writes_nothing(bad):
    rows = table()
    rows.append(row_of(adam_operands((3, 256), STORED["one scale a tensor"], None, {}), step=1))
    before = [[bits(tensor).clone() for tensor in tensors_of(row)] for row in rows]
    adam_steps_(rows, SCALARS, torch.tensor([bad]), SMALL)
    kept = [
        torch.equal(bits(tensor), old)
        for row, tensors in zip(rows, before, strict=True)
        for tensor, old in zip(tensors_of(row), tensors, strict=True)
    ]
    assert all(kept) == (bad != 0)


def test_addresses_that_are_no_multiple_of_16_and_gradients_with_strides():
    def moved(operand):
        room = torch.empty(operand.payload.numel() + 1, dtype=operand.payload.dtype)
        payload = room[1:].view(operand.payload.shape)
        return operand._replace(payload=payload.copy_(operand.payload))

    row = o2_row((4, 256))
    shifted = row._replace(param=moved(row.param), states=tuple(moved(s) for s in row.states))
    assert not triton_table.plan(shifted).combination.EVEN
    assert triton_table.plan(row).combination.EVEN
    agree([shifted])
    strided = row.grad._replace(payload=row.grad.payload.view(256, 4).t())
    agree([row._replace(grad=strided)])


def test_what_the_pass_does_not_take_is_named_once(caplog):
    triton_optimizers._name_fallback.cache_clear()
    formats = [(format, (2, 128)) for format in (FP16, E4M3, E4M3, FP16)]
    for _ in range(2):
        agree([row_of(adam_operands((4, 256), formats, None, {}), step=1)])
    assert len(caplog.records) == 1
    assert "blocks must be one row of at most 4096" in caplog.text
