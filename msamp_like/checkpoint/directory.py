"""A checkpoint is a directory: ``state.safetensors`` holds the tensors, ``checkpoint.json`` says what they are.

It is written under another name, flushed to the disk, and renamed into place when complete. So a directory called
``step-000300`` is whole, whatever happened to the process that wrote it, and an older one is never touched. Nothing in
it is code: reading one runs none.

``identity`` is what the writer says of itself (level, fingerprint of the model, world size, ...). ``load(expect=...)``
compares the entries that the reader cares about before it reads a tensor.

One process writes: the state of data-parallel training is the same on every rank. Where a model is split over ranks,
one process a part writes:

    step-000300.parts/part-0000    a checkpoint by itself, and so are its siblings, each of another process
    step-000300/part-0000          all parts renamed at once by :func:`join`, behind a ``checkpoint.json`` of the whole

Left out: reading at another number of parts, and hashes of the tensor file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from msamp_like.checkpoint import tree

SCHEMA = 1
SCHEMA_OF_PARTS = 2
"""Of the manifest that stands beside parts and has no state of its own."""

TENSORS = "state.safetensors"
MANIFEST = "checkpoint.json"

_COMPLETE = re.compile(r"step-(\d{6,})")


def step_directory(run_directory: Path | str, step: int) -> Path:
    """Where the checkpoint taken after ``step`` steps stands."""
    return Path(run_directory, f"step-{step:06d}")


def part_directory(directory: Path | str, part: int) -> Path:
    """Where the writer of part number ``part`` saves it before :func:`join`."""
    return _unfinished_parts(Path(directory)) / _part_name(part)


def save(directory: Path | str, state: Mapping[str, Any], *, identity: Mapping[str, Any]) -> Path:
    """Write ``state`` (see :mod:`msamp_like.checkpoint.tree` for what it may hold) as a new directory.

    Raises FileExistsError if the directory is there already: a checkpoint is never overwritten.
    """
    directory = Path(directory)
    _check_new(directory)
    flattener = tree.Flattener()
    described = flattener.describe(dict(state), "state")
    manifest = {"schema": SCHEMA, "identity": dict(identity), "state": described}
    text = json.dumps(manifest, allow_nan=False)  # before any file: what cannot be written leaves nothing behind
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = directory.with_name(f"{directory.name}.tmp-{secrets.token_hex(4)}")
    unfinished.mkdir()
    safetensors.torch.save_file({k: _compact(t) for k, t in flattener.tensors.items()}, unfinished / TENSORS)
    (unfinished / MANIFEST).write_text(text, encoding="utf-8")
    for path in (unfinished / TENSORS, unfinished / MANIFEST, unfinished):
        _flush(path)
    unfinished.rename(directory)
    _flush(directory.parent)
    return directory


def join(directory: Path | str, *, parts: int, identity: Mapping[str, Any]) -> Path:
    """Make a checkpoint of the ``parts`` that as many processes have saved at :func:`part_directory`.

    One process calls it when all have. Raises FileNotFoundError for a part that is not there, FileExistsError if the
    directory is.
    """
    directory = Path(directory)
    _check_new(directory)
    unfinished = _unfinished_parts(directory)
    missing = [part for part in range(parts) if not (unfinished / _part_name(part) / MANIFEST).is_file()]
    if missing:
        raise FileNotFoundError(
            f"parts are joined when all {parts} are written, {unfinished} lacks part {missing[0]}; save it first, on "
            "storage that all writers see"
        )
    manifest = {"schema": SCHEMA_OF_PARTS, "identity": dict(identity), "parts": parts}
    (unfinished / MANIFEST).write_text(json.dumps(manifest, allow_nan=False), encoding="utf-8")
    for path in (unfinished / MANIFEST, unfinished):
        _flush(path)
    unfinished.rename(directory)
    _flush(directory.parent)
    return directory


def load(
    directory: Path | str,
    *,
    expect: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    part: int = 0,
    parts: int = 1,
) -> dict[str, Any]:
    """The state that :func:`save` wrote, its tensors on ``device``; of a checkpoint of ``parts``, part ``part``.

    Raises ValueError if an entry of ``expect`` is not the checkpoint's own or it has another number of parts,
    FileNotFoundError if there is none.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    saved_parts = manifest.get("parts", 1)
    if saved_parts != parts:
        raise ValueError(
            f"a checkpoint resumes at the tensor-parallel size it was saved at: {directory} has {saved_parts}, this "
            f"run has {parts}; run with tensor-parallel {saved_parts}, or start anew without resuming"
        )
    if manifest["schema"] == SCHEMA_OF_PARTS:
        directory = directory / _part_name(part)
        manifest = _read_manifest(directory)
    for name, wanted in (expect or {}).items():
        found = manifest["identity"].get(name)
        if found != wanted:
            raise ValueError(
                f"a checkpoint resumes the {name} it was saved with: {directory} has {name} {found!r}, this run has "
                f"{wanted!r}; run with the saved {name}, or start anew without resuming"
            )
    path = Path(directory, TENSORS)
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} must be a complete safetensors file: {error}; resume from an older checkpoint"
        ) from error
    state = tree.rebuild(manifest["state"], tensors, device)
    return dict(state)


def read_identity(directory: Path | str) -> dict[str, Any]:
    """What the writer of a checkpoint said of itself."""
    return dict(_read_manifest(Path(directory))["identity"])


def latest(run_directory: Path | str) -> Path:
    """The complete checkpoint of the highest step in a run's directory; raises FileNotFoundError if there is none."""
    found = complete(run_directory)
    if not found:
        raise FileNotFoundError(
            f"{run_directory} must hold a complete checkpoint (step-NNNNNN) to resume from, found none; start anew"
        )
    return found[-1]


def complete(run_directory: Path | str) -> list[Path]:
    """The complete checkpoints of a run's directory by step, without what a writer that died has left there."""
    found = []
    for path in Path(run_directory).glob("step-*"):
        match = _COMPLETE.fullmatch(path.name)
        if match and (path / MANIFEST).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits of the names and shapes of ``model.named_parameters()``: equal for the same architecture.

    Neither values nor dtypes enter, so a model has the same fingerprint before and after conversion.
    """
    lines = sorted(f"{name} {tuple(parameter.shape)}" for name, parameter in parameters)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"a checkpoint is a directory with {MANIFEST}, {directory} is not; give the directory's path"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}; resume from an older checkpoint") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema not in (SCHEMA, SCHEMA_OF_PARTS):
        raise ValueError(
            f"{path} must have schema {SCHEMA} or {SCHEMA_OF_PARTS}, got {schema!r}; read it with the version that "
            "wrote it"
        )
    return dict(manifest)


def _check_new(directory: Path) -> None:
    if directory.exists():
        raise FileExistsError(
            f"a checkpoint is a new directory each time, {directory} exists; remove it or save elsewhere"
        )


def _part_name(part: int) -> str:
    return f"part-{part:04d}"


def _unfinished_parts(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.parts")


def _compact(tensor: Tensor) -> Tensor:
    """The tensor alone in its storage: a view would drag its whole storage along, or be refused as shared."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
