"""The optimizers' fused steps of a table on the device against the reference on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

from msamp_like import kernels
from msamp_like.kernels import LionScalars, Operand, Residual, Row, SgdScalars, reference_updates
from tests.gpu import NEEDS_GPU
from tests.operands import bits
from tests.test_updates import SCALARS, cloned, lean_row, tensors_of

pytestmark = NEEDS_GPU

UPDATES = [
    ("adam_steps_", SCALARS),
    ("lion_steps_", LionScalars(1e-4, 0.9, 0.99, 0.1)),
    ("sgd_steps_", SgdScalars(1e-3, 0.9, 0.1, 0.1, True)),
]


def moved(row: Row) -> Row:
    def operand(stored: Operand) -> Operand:
        return stored._replace(payload=stored.payload.cuda(), scale_inv=stored.scale_inv.cuda())

    return row._replace(
        param=operand(row.param),
        grad=operand(row.grad),
        states=tuple(operand(state) for state in row.states),
        copy=row.copy and operand(row.copy),
        residual=row.residual and Residual(*(tensor.cuda() for tensor in row.residual)),
    )


def rows_for(name: str) -> list[Row]:
    table = pytest.importorskip("tests.triton_interpreted_steps").table
    rows = [*table(), lean_row((300, 4096), seed=9)]
    return rows if name == "adam_steps_" else [row._replace(states=row.states[:1]) for row in rows]


def assert_equal(got: list[Row], expected: list[Row]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert all(torch.equal(bits(a).cpu(), bits(b)) for a, b in zip(tensors_of(one), tensors_of(other), strict=True))


@pytest.mark.parametrize(("name", "scalars"), UPDATES)
def test_a_table_equals_the_reference(name, scalars):
    rows = rows_for(name)
    got, expected = [moved(row) for row in rows], [cloned(row) for row in rows]
    for step in range(1, 4):
        getattr(kernels, name)([row._replace(step=step) for row in got], scalars)
        getattr(reference_updates, name)([row._replace(step=step) for row in expected], scalars)
    assert_equal(got, expected)


@pytest.mark.parametrize("choice", [{"converts": True}, {"elements": 4096, "warps": 8}, {"tiles": 1}], ids=str)
def test_no_choice_changes_a_bit(choice):
    """With ``converts`` that is the device's own rounding to E4M3 against ours."""
    triton_optimizers = pytest.importorskip("msamp_like.kernels.triton_optimizers")
    rows = rows_for("adam_steps_")
    got, expected = [moved(row) for row in rows], [cloned(row) for row in rows]
    triton_optimizers.adam_steps_(got, SCALARS, None, triton_optimizers.CHOICE._replace(**choice))
    reference_updates.adam_steps_(expected, SCALARS)
    assert_equal(got, expected)


@pytest.mark.parametrize(("name", "scalars"), UPDATES)
def test_a_bad_step_writes_nothing(name, scalars):
    rows = rows_for(name)
    got = [moved(row) for row in rows]
    getattr(kernels, name)(got, scalars, torch.ones(1, device="cuda"))
    assert_equal(got, rows)


def test_no_step_waits_for_the_device():
    got = [moved(row) for row in rows_for("adam_steps_")]
    kernels.adam_steps_(got, SCALARS)
    bad = torch.zeros(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.adam_steps_(got, SCALARS, bad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
