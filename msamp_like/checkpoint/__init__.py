"""Checkpoints: nested state as a directory of safetensors and JSON, written whole or not at all, and no pickle."""

from msamp_like.checkpoint.directory import fingerprint, latest, load, read_identity, save, step_directory

__all__ = ["fingerprint", "latest", "load", "read_identity", "save", "step_directory"]
