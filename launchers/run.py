"""A run's directory and its line on the terminal.

config.yaml      the resolved settings; ``--config`` takes it back
metrics.jsonl    one line a step, written as the step ends: an interrupted run leaves a readable file
summary.json     the results, once the run is complete
loss.png         the loss curves, where matplotlib is installed
step-NNNNNN/     checkpoints
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy
import torch
import tqdm

import msamp_like
from msamp_like import checkpoint
from msamp_like.comm.ledger import Line

CONFIG, METRICS, SUMMARY, FIGURE = "config.yaml", "metrics.jsonl", "summary.json", "loss.png"


class Run:
    """Where one run writes. :meth:`check` comes first and touches nothing, :meth:`start` makes the directory."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.lines: list[Mapping[str, Any]] = []  # of the steps of this process
        self._metrics: TextIO | None = None

    def check(self, *, resumes_from: Path | None, overwrite: bool) -> None:
        """Raises ValueError unless the directory is free, is the one resumed, or may be overwritten."""
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"--out must be a directory, {self.directory} is a file; give another")
        taken = [name for name in (CONFIG, METRICS, SUMMARY) if (self.directory / name).exists()]
        if resumes_from is not None and resumes_from.resolve().parent == self.directory.resolve():
            taken = [path.name for path in checkpoint.complete(self.directory) if path.name > resumes_from.name]
        if taken and not overwrite:
            raise ValueError(
                f"--out must not hold what this run would replace, {self.directory} has {taken[0]}; give another "
                "directory, --resume latest to continue the run that is there, or --overwrite to delete it"
            )

    def start(self, config: str, *, first_step: int) -> None:
        """Make the directory, and delete what an older run has there beyond ``first_step``."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self._checkpoints():
            if not first_step or path.name > checkpoint.step_directory("", first_step).name:
                shutil.rmtree(path)
        for name in (SUMMARY, FIGURE):
            (self.directory / name).unlink(missing_ok=True)
        (self.directory / CONFIG).write_text(config, encoding="utf-8")
        kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= first_step]
        (self.directory / METRICS).write_text("".join(kept), encoding="utf-8")
        # line buffering: each step's line reaches the file whole, whatever happens next
        self._metrics = (self.directory / METRICS).open("a", buffering=1, encoding="utf-8")

    def _checkpoints(self) -> list[Path]:
        """Complete and unfinished checkpoints; their names sort by step."""
        return sorted(self.directory.glob("step-*"))

    def log(self, line: Mapping[str, Any]) -> None:
        """One step's figures, kept on every rank, written by the one that called :meth:`start`.

        A value that is not finite becomes null in the file: JSON has no word for it.
        """
        self.lines.append(line)
        if self._metrics is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._metrics.write(json.dumps(finite) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines written so far, those of an earlier part of the run included."""
        path = self.directory / METRICS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the results."""
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        (self.directory / SUMMARY).write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Close the file of metrics; nothing if it was never opened."""
        if self._metrics is not None:
            self._metrics.close()


class Progress:
    """A bar on a terminal; elsewhere a line every few seconds, so that a log shows that the run goes on."""

    def __init__(self, *, first_step: int, steps: int, shown: bool, every_s: float = 10.0) -> None:
        self._bar = None
        # a terminal without a width, as some build servers have, would show an empty bar
        if shown and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns:
            self._bar = tqdm.tqdm(initial=first_step, total=steps, unit="step", dynamic_ncols=True)
        self._shown, self._steps, self._first, self._every_s = shown, steps, first_step, every_s
        self._started = time.monotonic()
        self._next = self._started

    def update(self, line: Mapping[str, Any]) -> None:
        """Show one step's figures."""
        if not self._shown:
            return
        figures = (
            f"loss {line['loss']:.4f}, {line['tokens_per_s']:,.0f} tokens/s, {line['memory_bytes'] / 2**30:.2f} GiB"
        )
        if "validation_loss" in line:
            figures += f", validation {line['validation_loss']:.4f}"
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update()
        elif time.monotonic() >= self._next or "validation_loss" in line:
            self._next = time.monotonic() + self._every_s
            done = line["step"] - self._first
            left_s = (time.monotonic() - self._started) / done * (self._steps - line["step"])
            print(f"step {line['step']}/{self._steps}: {figures}, {left_s:.0f} s left", flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def wire_table(ledger: Sequence[Line]) -> list[dict[str, Any]]:
    """A row for each kind of collective on each mesh axis, as JSON: calls and bytes of one step, sent and expected.

    What no plan knows the size of, since activations depend on the batch, has rows of its own, ``expected`` None.
    """
    kinds: dict[tuple[str, str, bool], list[Line]] = {}
    for line in ledger:
        kinds.setdefault((line.axis, line.collective, line.expected is None), []).append(line)
    return [
        {
            "axis": axis,
            "collective": collective,
            "calls": sum(line.calls for line in kinds[axis, collective, unplanned]),
            "sent": sum(line.sent for line in kinds[axis, collective, unplanned]),
            "expected": None if unplanned else sum(line.expected or 0 for line in kinds[axis, collective, unplanned]),
        }
        for axis, collective, unplanned in sorted(kinds)
    ]


def wire_text(row: Mapping[str, Any]) -> str:
    """A row of :func:`wire_table` as a line for the terminal."""
    expected = "no plan" if row["expected"] is None else f"{row['expected']:,} expected"
    return f"wire {row['axis']} {row['collective']:<10} {row['calls']:>5} x {row['sent']:>13,} bytes sent, {expected}"


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held on its device; on a CPU its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and source commit, as JSON."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "msamp_like": msamp_like.__version__,
        },
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
    }


def git_commit() -> str | None:
    """Commit of the work tree that this package runs from, with "+changes" if it has any; None outside of one."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        inside = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        if inside.returncode:
            return None  # installed below somebody else's work tree
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changes.strip() else commit
