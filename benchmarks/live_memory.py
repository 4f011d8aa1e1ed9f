"""The most bytes that a piece of work has alive at once, and who made them: read from the allocator's own record.

torch's profiler writes down every allocation and release of the CPU allocator, temporaries inside of an operation
included. Their running sum is the memory that the work needs beyond what was there before, and its maximum is the same
on a loaded machine and on a quiet one. What native code takes from ``malloc`` is not seen.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

START = "embedding and layers"
MARK = "mark: "


def mark(name: str) -> None:
    """What is allocated from here on is counted under ``name``; the first mark of a name counts."""
    with record_function(MARK + name):
        pass


@dataclass(frozen=True, kw_only=True)
class Peak:
    """``phase`` is the mark under which the peak was reached; ``made_in`` the bytes alive then by the mark under which
    they were allocated; ``largest`` (operation, tensors, bytes), of the operations that hold most, the outermost each.
    """

    bytes: int
    phase: str
    made_in: Mapping[str, int]
    largest: list[tuple[str, int, int]]


def peak_of(work: Callable[[], object]) -> Peak:
    """Run ``work`` once; what it frees that was there before counts below zero."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return _peak(events)


def _peak(events: list[dict[str, Any]]) -> Peak:
    changes = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: float(e["ts"]))
    total = most = last = 0
    for index, change in enumerate(changes):
        total += change["args"]["Bytes"]
        if total > most:
            most, last = total, index
    alive: dict[int, tuple[float, int]] = {}
    for change in changes[: last + 1]:
        address, size = change["args"]["Addr"], change["args"]["Bytes"]
        if size > 0:
            alive[address] = (change["ts"], size)
        else:
            alive.pop(address, None)
    marks = _marks(events)
    made_in = {name: 0 for _, name in marks}
    for at, size in alive.values():
        made_in[_phase(marks, at)] += size
    return Peak(
        bytes=most,
        phase=_phase(marks, changes[last]["ts"]),
        made_in=made_in,
        largest=_largest(alive.values(), events),
    )


def _marks(events: list[dict[str, Any]]) -> list[tuple[float, str]]:
    found: dict[str, float] = {START: 0.0}
    for event in events:
        if event["name"].startswith(MARK):
            name = event["name"].removeprefix(MARK)
            found[name] = min(event["ts"], found.get(name, event["ts"]))
    return sorted((at, name) for name, at in found.items())


def _phase(marks: list[tuple[float, str]], at: float) -> str:
    return [name for since, name in marks if since <= at][-1]


def _largest(alive: Iterable[tuple[float, int]], events: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """By the outermost operation that was running; eight of them."""
    spans = sorted((e["ts"], -e["dur"], e["name"]) for e in events if e.get("ph") == "X" and e.get("cat") == "cpu_op")
    sums: dict[str, tuple[int, int]] = {}
    position, until, running = 0, 0.0, ""
    for at, size in sorted(alive):
        while position < len(spans) and spans[position][0] <= at:
            start, negative_duration, name = spans[position]
            if start >= until:  # not inside of the one before
                until, running = start - negative_duration, name
            position += 1
        name = _readable(running) if at <= until else "none"
        count, bytes = sums.get(name, (0, 0))
        sums[name] = count + 1, bytes + size
    ordered = sorted(((name, *found) for name, found in sums.items()), key=lambda row: -row[2])
    return ordered[:8]


def _readable(operation: str) -> str:
    engine = "autograd::engine::evaluate_function: "
    if operation.startswith(engine):
        return f"backward of {operation.removeprefix(engine).removesuffix('0').removesuffix('Backward')}"
    return operation.rpartition("::")[2]
