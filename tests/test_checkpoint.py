"""Checkpoints: what goes in comes out exactly, whole or not at all, and not into another model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msamp_like import checkpoint
from msamp_like.formats import E4M3, FORMATS, grid_shape
from msamp_like.tensor import ScalingTensor

IDENTITY = {"level": "O2", "model": "abc"}


def round_trip(directory: Path, state: dict[str, object]) -> dict[str, object]:
    return checkpoint.load(checkpoint.save(directory / "step-000001", state, identity=IDENTITY))


def same(a: object, b: object) -> bool:
    """Equal in value and type, tensors to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, ScalingTensor) and isinstance(b, ScalingTensor):
        inner = same(a.payload, b.payload) and same(a.scale_inv, b.scale_inv)
        return inner and (a.block, a.dtype) == (b.block, b.dtype)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (a, b)]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dtype",
    [*(f.dtype for f in FORMATS.values()), torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 7), (2, 3, 4)], ids=str)
def test_tensors_keep_dtype_shape_and_bits(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 4).to(dtype)
    assert same(round_trip(tmp_path, {"x": tensor})["x"], tensor)


@pytest.mark.parametrize("block", [(-1, -1), (1, -1), (1, 128), (128, 128), (1, 32)])
def test_scaling_tensors_keep_payload_scales_block_and_outer_dtype(tmp_path: Path, block: tuple[int, int]) -> None:
    payload = torch.randn(130, 200).to(E4M3.dtype)
    scale_inv = torch.rand(grid_shape(payload.shape, block))
    tensor = ScalingTensor(payload, scale_inv, block, torch.bfloat16)
    assert same(round_trip(tmp_path, {"weight": tensor})["weight"], tensor)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from([torch.float32, E4M3.dtype])
)
KEYS = st.one_of(st.text(), st.integers(), st.booleans())
NESTED = st.recursive(
    SCALARS | st.lists(st.floats(width=32), max_size=3).map(torch.tensor),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(state=st.dictionaries(st.text(), NESTED, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_nesting_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, state: dict[str, object]) -> None:
    assert same(round_trip(tmp_path_factory.mktemp("any"), state), state)


def test_aliases_and_views(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    state = {"embed": base, "head": base, "column": base[:, 1], "t": base.t(), "a.b": base + 1, "a": {"b": base + 2}}
    back = round_trip(tmp_path, state)
    assert all(same(back[k], v) for k, v in state.items())
    assert back["embed"] is back["head"]
    stored = (tmp_path / "step-000001" / "state.safetensors").stat().st_size
    assert stored < 4 * (12 * 4 + 3) + 1000  # the alias is stored once, the view without its base


def test_an_optimizer_state_dict_survives(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    back = round_trip(tmp_path, {"optimizer": optimizer.state_dict()})["optimizer"]
    assert same(back, optimizer.state_dict())


@pytest.mark.parametrize(
    "value", [{1, 2}, object(), b"bytes", 1j, torch.nn.Linear(1, 1)], ids=lambda v: type(v).__name__
)
def test_what_cannot_be_stored_is_named_and_leaves_nothing(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=r"state\.here\.0"):
        round_trip(tmp_path, {"here": [value]})
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint_is_overwritten(tmp_path: Path) -> None:
    round_trip(tmp_path, {"x": 1})
    with pytest.raises(FileExistsError, match="new directory each time"):
        round_trip(tmp_path, {"x": 2})
    assert checkpoint.load(tmp_path / "step-000001") == {"x": 1}


def test_a_writer_that_dies_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    round_trip(tmp_path, {"x": 1})

    def dies(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.directory, "_flush", dies)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(checkpoint.step_directory(tmp_path, 2), {"x": torch.ones(3)}, identity=IDENTITY)
    assert not checkpoint.step_directory(tmp_path, 2).exists()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000001"


# --- parts ----------------------------------------------------------------------------------------------------------


def save_parts(directory: Path, parts: int = 2) -> None:
    for part in range(parts):
        checkpoint.save(checkpoint.part_directory(directory, part), {"x": torch.tensor(part)}, identity=IDENTITY)


def test_parts_become_one_checkpoint_at_once(tmp_path: Path) -> None:
    directory = checkpoint.step_directory(tmp_path, 3)
    save_parts(directory)
    assert checkpoint.complete(tmp_path) == []
    assert checkpoint.join(directory, parts=2, identity=IDENTITY) == directory
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
    assert checkpoint.latest(tmp_path) == directory
    assert checkpoint.read_identity(directory) == IDENTITY
    for part in range(2):
        assert checkpoint.load(directory, expect=IDENTITY, part=part, parts=2) == {"x": torch.tensor(part)}
    with pytest.raises(ValueError, match="level 'O2', this run has 'O1'"):
        checkpoint.load(directory, expect={"level": "O1"}, parts=2)
    for parts in (1, 4):
        with pytest.raises(ValueError, match=rf"has 2, this run has {parts}; run with tensor-parallel 2"):
            checkpoint.load(directory, parts=parts)
    with pytest.raises(FileExistsError, match="new directory each time"):
        checkpoint.join(directory, parts=2, identity=IDENTITY)


def test_a_checkpoint_without_parts_is_of_one(tmp_path: Path) -> None:
    directory = checkpoint.save(tmp_path / "step-000001", {"x": 1}, identity=IDENTITY)
    with pytest.raises(ValueError, match="has 1, this run has 2; run with tensor-parallel 1"):
        checkpoint.load(directory, parts=2)


def test_parts_that_are_not_all_there_are_no_checkpoint(tmp_path: Path) -> None:
    older, newer = (checkpoint.step_directory(tmp_path, step) for step in (3, 6))
    save_parts(older)
    checkpoint.join(older, parts=2, identity=IDENTITY)
    save_parts(newer, parts=1)
    with pytest.raises(FileNotFoundError, match="lacks part 1"):
        checkpoint.join(newer, parts=2, identity=IDENTITY)
    assert checkpoint.latest(tmp_path) == older


def test_latest_is_by_step_not_by_name_or_date(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="complete checkpoint"):
        checkpoint.latest(tmp_path)
    for step in (1_000_000, 999_999, 20):
        checkpoint.save(checkpoint.step_directory(tmp_path, step), {}, identity=IDENTITY)
    (tmp_path / "step-2000000").mkdir()  # no manifest
    (tmp_path / "step-3000000.tmp-00ff").mkdir()
    assert checkpoint.latest(tmp_path).name == "step-1000000"


@pytest.mark.parametrize(("name", "value"), [("level", "O1"), ("model", "other")])
def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path, name: str, value: str) -> None:
    directory = checkpoint.save(tmp_path / "step-000001", {"x": 1}, identity=IDENTITY)
    assert checkpoint.load(directory, expect=IDENTITY) == {"x": 1}
    with pytest.raises(ValueError, match=rf"{name} '{IDENTITY[name]}', this run has '{value}'; run with the saved"):
        checkpoint.load(directory, expect={**IDENTITY, name: value})


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    directory = checkpoint.save(tmp_path / "step-000001", {"x": torch.ones(100)}, identity=IDENTITY)
    tensors, manifest = directory / "state.safetensors", directory / "checkpoint.json"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="complete safetensors file"):
        checkpoint.load(directory)
    tensors.write_bytes(whole)
    text = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**text, "schema": 99}))
    with pytest.raises(ValueError, match="schema 1 or 2, got 99"):
        checkpoint.load(directory)
    manifest.write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        checkpoint.load(directory)
    with pytest.raises(FileNotFoundError, match="give the directory's path"):
        checkpoint.load(tmp_path)


def test_fingerprint_sees_names_and_shapes_alone() -> None:
    def of(model: torch.nn.Module) -> str:
        return checkpoint.fingerprint(model.named_parameters())

    assert of(torch.nn.Linear(3, 4)) == of(torch.nn.Linear(3, 4).bfloat16())
    assert of(torch.nn.Linear(3, 4)) != of(torch.nn.Linear(4, 3))
    assert of(torch.nn.Linear(3, 4)) != of(torch.nn.Linear(3, 4, bias=False))
