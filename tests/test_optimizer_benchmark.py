"""The optimizer benchmark measures every case of ours, and says honestly whether its targets are reached."""

from __future__ import annotations

import pytest

from benchmarks import optimizer
from benchmarks.rows import _optimizer


@pytest.mark.parametrize("shapes", [[(2, 4096)], [(768, 2), (768,), (5, 130)]], ids=["blocks", "odd"])
def test_every_case_of_ours_runs(shapes):
    for name, make in optimizer.OURS.items():
        case = make(shapes)
        case.run()
        assert case.bytes > 0, name


def seconds(**changed: float) -> dict[str, list[float]]:
    """Of three rounds, in the second of which something else slows the machine down."""
    times = {"O2 AdamW": 0.6, optimizer.YARDSTICK: 1.0, "DeepSpeed CPUAdam": 0.9, "lean AdamW": 0.5} | changed
    return {name: [time, 9 * time, time] for name, time in times.items()}


def test_targets_are_ratios_within_a_round():
    targets = optimizer.compared(seconds())
    assert [round(target["ratio"], 3) for target in targets] == [0.6, 0.667, 0.833]
    assert optimizer.is_reached(targets)
    for slower in ("O2 AdamW", "lean AdamW"):
        assert not optimizer.is_reached(optimizer.compared(seconds(**{slower: 0.8})))


def test_a_peer_that_is_missing_is_named_and_not_counted():
    found = seconds()
    del found["DeepSpeed CPUAdam"]
    targets = optimizer.compared(found)
    assert targets[1]["ratio"] is None
    assert optimizer.is_reached(targets)
    rows = {name: {"median_ns": 0.75, "ratio": 0.6} for name in (*optimizer.OURS, *optimizer.PEERS)}
    lines = _optimizer({"targets": targets, "rows": rows})
    assert lines[0][2] == "0.60 (0.75 ns a parameter)"
    assert "not measured" in lines[1][2]
