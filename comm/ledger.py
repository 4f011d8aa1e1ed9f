"""What a step sends, collective by collective: expected from the plan, and counted as it left.

The plan is the buckets of gradients and the parts of weights, fixed when the model is initialized, and for activations
the shapes and formats of each exchange; the count is kept by the groups (:mod:`.group`). They are made from different
sources, so a collective that nobody planned, or one that sends more than it should, shows as a difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from msamp_like.comm.axes import Axes
from msamp_like.comm.data_parallel import DataParallel
from msamp_like.comm.group import ring_bytes
from msamp_like.comm.hierarchical import NodeSums
from msamp_like.comm.reduction import Bucket
from msamp_like.comm.zero import WEIGHTS, OwnedWeights, Zero

Key = tuple[str, str, str]
"""(axis, collective, label)."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Bytes that this rank sent in one step on one mesh axis; ``expected`` is None for what the plan cannot know."""

    axis: str
    collective: str
    label: str
    calls: int
    sent: int
    expected: int | None

    def __str__(self) -> str:
        planned = "unplanned" if self.expected is None else f"{self.expected:,} expected"
        return (
            f"{self.axis:<9} {self.collective:<11} {self.label:<24} {self.calls:>5} x {self.sent:>13,} sent, {planned}"
        )


def ledger(
    axes: Axes,
    reducer: DataParallel | None,
    placements: Iterable[OwnedWeights | None],
    decisions: Mapping[str, int],
) -> list[Line]:
    """Every collective of the present step, or of the last one after it; ``decisions`` says how many FP32 numbers go
    into each reduction that all ranks decide by, under its label."""
    plan: dict[Key, int] = {}
    for group in axes.groups:
        plan |= {(group.axis, "all_reduce", label): ring_bytes(4 * n, group.world) for label, n in decisions.items()}
    if reducer is not None and axes.tensor is not None:
        plan |= {
            (axes.tensor.axis, "all_reduce", f"{bucket.name}/partial"): ring_bytes(
                4 * (bucket.num_elements + len(bucket.parameters)), axes.tensor.world
            )
            for bucket in reducer.buckets
            if bucket.partial
        }
    if reducer is not None and axes.data is not None:
        plan |= expected(reducer, [p for p in placements if p is not None])
    lines = []
    for group in axes.groups:
        for entry in group.ledger:
            size = plan.get((entry.axis, entry.collective, entry.label))
            known = entry.planned or None
            lines.append(
                Line(
                    axis=entry.axis,
                    collective=entry.collective,
                    label=entry.label,
                    calls=entry.calls,
                    sent=entry.sent,
                    expected=known if size is None else size * entry.calls,
                )
            )
    return lines


def expected(reducer: DataParallel, placements: Sequence[OwnedWeights]) -> dict[Key, int]:
    """Bytes that this rank sends in one call of each collective of a data-parallel step."""
    plan: dict[Key, int] = {}
    for bucket in reducer.buckets:
        plan |= _of_bucket(bucket, reducer)
    for placement in placements:
        for number, size in enumerate(placement.sizes):
            plan[reducer.group.axis, "all_gather", f"{WEIGHTS}{number}"] = size * (reducer.world - 1)
    return plan


def _of_bucket(bucket: Bucket, reducer: DataParallel) -> dict[Key, int]:
    name, axis, world, layout = bucket.name, reducer.group.axis, reducer.world, bucket.layout
    if layout is None:
        elements = bucket.num_elements + len(bucket.parameters)
        return {(axis, "all_reduce", name): ring_bytes(elements * bucket.dtype.itemsize, world)}
    line_bytes = layout.width * bucket.dtype.itemsize
    own_lines = layout.line_splits[reducer.group.rank]
    if bucket.sums is not None:
        to_owners = _of_hops(name, line_bytes, bucket.sums)
    else:
        own_scales = layout.own_scales.stop - layout.own_scales.start
        needed_scales = sum(end - start for start, end in layout.scale_ranges)
        to_owners = {
            (axis, "all_to_all", name): (sum(layout.line_splits) - own_lines) * line_bytes,
            (axis, "all_to_all", f"{name}/scales"): (needed_scales - own_scales) * 4,
        }
    if isinstance(reducer, Zero):
        return to_owners
    return to_owners | {
        (axis, "all_reduce", f"{name}/scales"): ring_bytes(4 * layout.num_scales, world),
        (axis, "all_gather", name): own_lines * line_bytes * (world - 1),
    }


def _of_hops(name: str, line_bytes: int, sums: NodeSums) -> dict[Key, int]:
    """Inside a node every line with its scale; across, of the lines of this rank's place, the sums, and a scale or,
    where sums have none, a byte that says whether there are any."""
    inside, across = sums.group.hops
    columns = [sum(column) for column in zip(*sums.grid)]
    rows = [row[inside.rank] for row in sums.grid]
    lines_inside, lines_across = sum(columns) - columns[inside.rank], sum(rows) - rows[across.rank]
    between = sums.between.format
    return {
        (inside.axis, "all_to_all", name): lines_inside * line_bytes,
        (inside.axis, "all_to_all", f"{name}/scales"): lines_inside * 4,
        (across.axis, "all_to_all", name): lines_across * sums.layout.width * between.bytes,
        (across.axis, "all_to_all", f"{name}/scales"): lines_across * (4 if between.scaled else 1),
    }
