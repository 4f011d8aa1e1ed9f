"""Checkpoints: nested state as a directory of safetensors and JSON, written whole or not at all, and no pickle."""

from msamp_like.checkpoint.directory import (
    complete,
    fingerprint,
    join,
    latest,
    load,
    part_directory,
    read_identity,
    save,
    step_directory,
)

__all__ = [
    "complete",
    "fingerprint",
    "join",
    "latest",
    "load",
    "part_directory",
    "read_identity",
    "save",
    "step_directory",
]
