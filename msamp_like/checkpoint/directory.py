"""A checkpoint is a directory: ``state.safetensors`` holds the tensors, ``checkpoint.json`` says what they are.

It is written under another name, flushed to the disk, and renamed into place when complete. So a directory called
``step-000300`` is whole, whatever happened to the process that wrote it, and an older one is never touched. Nothing in
it is code: reading one runs none.

``identity`` is what the writer says of itself (level, fingerprint of the model, world size, ...). ``load(expect=...)``
compares the entries that the reader cares about before it reads a tensor.

One process writes: the state of data-parallel training is the same on every rank. Left out: sharded state, and hashes
of the tensor file.
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
TENSORS = "state.safetensors"
MANIFEST = "checkpoint.json"

_COMPLETE = re.compile(r"step-(\d{6,})")


def step_directory(run_directory: Path | str, step: int) -> Path:
    """Where the checkpoint taken after ``step`` steps stands."""
    return Path(run_directory, f"step-{step:06d}")


def save(directory: Path | str, state: Mapping[str, Any], *, identity: Mapping[str, Any]) -> Path:
    """Write ``state`` (see :mod:`msamp_like.checkpoint.tree` for what it may hold) as a new directory.

    Raises FileExistsError if the directory is there already: a checkpoint is never overwritten.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(
            f"a checkpoint is a new directory each time, {directory} exists; remove it or save elsewhere"
        )
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


def load(
    directory: Path | str, *, expect: Mapping[str, Any] | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The state that :func:`save` wrote, its tensors on ``device``.

    Raises ValueError if an entry of ``expect`` is not the checkpoint's own, FileNotFoundError if there is none.
    """
    manifest = _read_manifest(Path(directory))
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
    complete = []
    for path in Path(run_directory).glob("step-*"):
        match = _COMPLETE.fullmatch(path.name)
        if match and (path / MANIFEST).is_file():
            complete.append((int(match[1]), path))
    if not complete:
        raise FileNotFoundError(
            f"{run_directory} must hold a complete checkpoint (step-NNNNNN) to resume from, found none; start anew"
        )
    return max(complete)[1]


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
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        raise ValueError(f"{path} must have schema {SCHEMA}, got {schema!r}; read it with the version that wrote it")
    return manifest


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
