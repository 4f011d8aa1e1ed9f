"""FP8 training in one line: ``model, optimizer = amp.initialize(model, optimizer, level="O2")``.

This package wires the parts together and holds no arithmetic of its own: conversion (:mod:`msamp_like.nn`), optimizer
(:mod:`msamp_like.optim`), the ranks (:mod:`msamp_like.comm`), and the state that a resume needs.
"""

from msamp_like.amp.initialization import initialize, restore
from msamp_like.amp.state import (
    clip_grad_norm_,
    fp8_report,
    load_state_dict,
    set_precision,
    state_bytes,
    state_dict,
    wire_bytes,
    wire_ledger,
)
from msamp_like.amp.wiring import Converted, policy_of, release

__all__ = [
    "Converted",
    "clip_grad_norm_",
    "fp8_report",
    "initialize",
    "load_state_dict",
    "policy_of",
    "release",
    "restore",
    "set_precision",
    "state_bytes",
    "state_dict",
    "wire_bytes",
    "wire_ledger",
]
