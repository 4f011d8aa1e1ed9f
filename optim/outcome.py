"""Whether a step counts: found where the gradients are, obeyed by the kernels there, learned by the host later.

One gradient that is not finite, on any rank, leaves the whole step out. If the host decided that, it would have to wait
in every step until the device has done all that it was given. So the kernels read the flag, and write nothing where it
is set, and the host, which counts steps and tells the user, reads it when the next step begins, or when it is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from msamp_like.host_copy import HostCopy

logger = logging.getLogger(__name__)


class Outcome:
    """Of one step. ``bad``, FP32 (1,), is not zero where the step is left out; ``released`` counts the gradients that
    were not finite when they were released, a scalar, and all that were."""

    def __init__(self, bad: Tensor, released: tuple[Tensor, int] | None = None) -> None:
        count, self._released = released or (bad.new_zeros(()), 0)
        self._counted: list[dict[str, Any]] = []
        self._bad = bad
        self._on: dict[torch.device, Tensor] = {}
        self._copy = HostCopy(torch.stack([bad[0], count.to(bad)]))

    def on(self, device: torch.device) -> Tensor:
        """``bad`` on a device that steps; the host's own kernels cannot but wait for it."""
        if device not in self._on:
            self._on[device] = self._bad.to(device)
        return self._on[device]

    def counts(self, state: dict[str, Any]) -> None:
        """A parameter whose state has counted this step."""
        self._counted.append(state)

    @property
    def arrived(self) -> bool:
        """Whether :meth:`read` would wait for nobody."""
        return self._copy.arrived

    def read(self) -> tuple[bool, bool]:
        """Whether the step was left out, whose counts are then taken back, and whether a released gradient was bad."""
        bad, released = self._copy.tolist()
        if released:
            logger.warning(
                "%d of %d gradients are not finite: each counted as zero for its parameter", released, self._released
            )
        for state in self._counted if bad else ():
            state["step"] -= 1
        return bool(bad), bool(released)


class Outcomes:
    """Of an optimizer's steps, one after the other."""

    def __init__(self) -> None:
        self._skipped = self._in_a_row = 0
        self._last: Outcome | None = None

    def begin(self, bad: Tensor, released: tuple[Tensor, int] | None) -> Outcome:
        """A step begins; the one before is settled."""
        self.settle()
        self._last = Outcome(bad, released)
        return self._last

    def end(self) -> None:
        """The step is given to the device."""
        if self._last is not None and self._last.arrived:
            self.settle()

    def settle(self) -> None:
        """Learn how the last step ended; waits for it."""
        if self._last is None:
            return
        last, self._last = self._last, None
        bad, released = last.read()
        self._skipped += bad + released
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if bad:
            logger.warning(
                "a gradient is not finite: step skipped (%d skipped so far, %d in a row)", self._skipped, self._in_a_row
            )

    @property
    def skipped(self) -> int:
        """Steps left out, or with a released gradient that counted as zero."""
        self.settle()
        return self._skipped

    def restart(self, skipped: int) -> None:
        """Count on from a saved number; the last step is of no interest any more."""
        self._skipped, self._in_a_row, self._last = skipped, 0, None


def judged(flags: Sequence[Tensor], agree_max: Callable[[Tensor], None] | None, device: torch.device) -> Tensor:
    """``bad`` of gradients that are finite where every flag, a bool scalar, is set, on this rank and on the others."""
    bad = torch.zeros(1, device=device)  # ranks without gradients take part too
    if flags:
        bad = (~torch.stack([flag.to(device) for flag in flags]).all()).float().view(1)
    if agree_max is not None:
        agree_max(bad)
    return bad
