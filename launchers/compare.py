"""Put finished runs side by side: a table of what each cost, and a figure of their losses.

    python -m msamp_like.launchers.compare runs/O2 runs/O0 --out loss.png

The last run is the yardstick that the others are compared with. Runs of one seed see the same batches, so the
difference of their training losses, step by step, is the difference of their arithmetic.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from msamp_like.launchers.run import METRICS, SUMMARY

# Blue, vermilion, green, purple: told apart by every kind of colour vision (Okabe and Ito, "Color Universal Design").
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Compare finished runs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]  # Directories of runs; the last is the yardstick.
    out: str = "loss.png"  # Figure to write (needs matplotlib, extra `report`).


def read(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary, one dict a step) of a finished run; raises FileNotFoundError for one that is not."""
    if not (directory / SUMMARY).is_file():
        raise FileNotFoundError(f"a finished run has a {SUMMARY}, {directory} has none; finish it with --resume latest")
    lines = (directory / METRICS).read_text(encoding="utf-8").splitlines()
    return json.loads((directory / SUMMARY).read_text(encoding="utf-8")), [json.loads(line) for line in lines]


# --- the table ------------------------------------------------------------------------------------------------------


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a run and, under more than one, how each differs from the last."""
    header = ("run", "level", "validation loss", "bytes/parameter", "wire bytes/step", "step")
    rows = [header, *(_row(name, summary) for name, summary in runs.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(_aligned(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths))) for row in rows]
    *others, (base_name, base) = runs.items()
    for name, summary in others:
        gap = summary["validation_loss"] - base["validation_loss"]
        times = summary["median_step_ms"] / base["median_step_ms"]
        share = summary["bytes_per_parameter"] / base["bytes_per_parameter"]
        wire, base_wire = _sent(summary), _sent(base)
        sent = f", {wire / base_wire:.2f} of the wire bytes" if wire and base_wire else ""
        lines.append(
            f"{name} against {base_name}: validation loss {gap:+.4f} nats, {share:.2f} of the bytes a parameter{sent}, "
            f"{times:.2f} times the step"
        )
    lines.append(
        "bytes/parameter: weight, gradient and optimizer states, measured; FP8 levels hold one byte more while the "
        "compute copy is cached, every level one more while gradients accumulate"
    )
    return "\n".join(lines)


def _row(name: str, summary: Mapping[str, Any]) -> tuple[str, ...]:
    sent = _sent(summary)
    return (
        name,
        summary["level"],
        f"{summary['validation_loss']:.4f}",
        f"{summary['bytes_per_parameter']:.2f}",
        f"{sent:,}" if sent else "-",
        f"{summary['median_step_ms']:,.0f} ms",
    )


def _sent(summary: Mapping[str, Any]) -> int:
    return int((summary["wire_bytes"] or {}).get("sent", 0))


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


# --- the figure -----------------------------------------------------------------------------------------------------


def draw(directories: Sequence[Path], out: Path) -> None:
    """Training loss thin, validation loss bold; under two runs or more, the differences from the last.

    Needs matplotlib; raises ModuleNotFoundError without it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = [read(directory) for directory in directories]
    compared = len(runs) > 1
    figure = Figure(figsize=(8, 6.4 if compared else 4.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # no window, no global state
    grid = figure.subplots(2 if compared else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + compared])
    top = grid[0, 0]
    for number, ((summary, lines), colour) in enumerate(zip(runs, COLOURS * len(runs)), start=1):
        name = f"{summary['level']}, seed {summary['seed']}"
        top.plot(*_curve(lines, "loss"), color=colour, linewidth=0.7, alpha=0.45, label=f"{name}: training")
        # curves that agree would hide each other: the yardstick lies wide and below
        below = {"linewidth": 5, "alpha": 0.5, "zorder": 2} if compared and number == len(runs) else {"linewidth": 2}
        label = f"{name}: validation, {summary['validation_loss']:.4f}"
        top.plot(
            *_curve(lines, "validation_loss"), "o-", color=colour, label=label, markersize=4, **{"zorder": 3, **below}
        )
    summary = runs[-1][0]
    top.set_title(
        f"GPT {summary['preset']}, {summary['parameters'] / 1e6:.1f} M parameters, "
        f"{summary['tokens_per_step']:,} tokens a step, {summary['world_size']} rank(s)",
        fontsize=11,
    )
    top.set_ylabel("loss (nats per token)")
    top.legend(frameon=False, fontsize=9)
    if compared:
        _draw_differences(grid[1, 0], runs)
    grid[-1, 0].set_xlabel("optimizer step")
    for axes in grid[:, 0]:
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def _draw_differences(axes: Any, runs: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]]) -> None:
    base_summary, base_lines = runs[-1]
    everything = [0.02, 0.02]
    for (_, lines), colour in zip(runs[:-1], COLOURS * len(runs)):
        for key, style in (("loss", {"linewidth": 0.7, "alpha": 0.45}), ("validation_loss", {"linewidth": 2.2})):
            base = dict(zip(*_curve(base_lines, key)))
            steps = [step for step in _curve(lines, key)[0] if step in base]
            differences = [loss - base[step] for step, loss in zip(*_curve(lines, key)) if step in base]
            axes.plot(steps, differences, color=colour, **style)
            everything += [abs(difference) for difference in differences]
    axes.axhline(0, color="#444444", linewidth=0.8)
    limit = 1.5 * statistics.quantiles(everything, n=20)[-1]  # one spike of a young model would flatten all the rest
    axes.set_ylim(-limit, limit)
    axes.set_ylabel(f"minus {base_summary['level']} (nats)")


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the steps that have a finite value."""
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def draw_if_possible(directories: Sequence[Path], out: Path) -> str:
    """Draw, and say in one line where the figure is or why there is none."""
    try:
        draw(directories, out)
    except ModuleNotFoundError as error:
        return f"no figure: the package {error.name!r} is missing; pip install 'msamp-like[report]'"
    return f"loss curves: {out}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    settings = tyro.cli(Settings, args=arguments, prog="python -m msamp_like.launchers.compare")
    directories = [Path(run) for run in settings.runs]
    try:
        if not directories:
            raise ValueError("compare needs at least one run, got none; give directories of finished runs")
        summaries = {str(directory): read(directory)[0] for directory in directories}
        said = draw_if_possible(directories, Path(settings.out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(said)
    print(table(summaries))


if __name__ == "__main__":
    main()
