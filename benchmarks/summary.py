"""The pages that show results, made from the JSON under docs/results, so that prose cannot drift from it.

python -m benchmarks.summary            # rewrites them
python -m benchmarks.summary --check    # exits 1 if one shows anything else

README.md has the headlines, docs/results/README.md every result with its machine and command.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.rows import ROWS, Entry, Result

BEGIN, END = "<!-- results: make with python -m benchmarks.summary -->", "<!-- end of results -->"
HEAD = ["| figure | to reach | measured | |", "|---|---|---|---|"]


def table(results: Path) -> list[str]:
    """The lines of README's table: the headlines, each with a link to its JSON."""
    lines = list(HEAD)
    for name, entry in ROWS.items():
        if entry.headline:
            result = json.loads((results / entry.file).read_text())
            lines += _lines(result, entry, f"[`{name}`](docs/results/{entry.file})")
    return lines


def sections(results: Path) -> list[str]:
    """Every result: the question, the figures, the machine, the versions and the command."""
    lines: list[str] = []
    for name, entry in ROWS.items():
        result = json.loads((results / entry.file).read_text())
        lines += [f"## {name}", "", _question(result["command"]), "", *HEAD]
        lines += [
            *_lines(result, entry, f"[JSON]({entry.file})"),
            "",
            f"`{result['command']}` on {_machine(result)}",
            "",
        ]
    return lines[:-1]


def _lines(result: Result, entry: Entry, link: str) -> list[str]:
    missed = "" if result.get("reached", True) else "missed, "
    return [f"| {figure} | {target} | {measured} | {missed}{link} |" for figure, target, measured in entry.rows(result)]


def _question(command: str) -> str:
    """The first sentence of the benchmark that a command names, from its source."""
    source = Path(__file__).with_name(f"{command.split()[2].partition('.')[2]}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _machine(result: Result) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version != "none")
    return (
        f"{', '.join(machine['devices'])} ({machine['platform']}, {machine['threads']} threads, native kernels "
        f"{machine['native_kernels']}): {versions}"
    )


def variants(results: Path) -> list[str]:
    """What the level costs in loss: the runs of loss_gap beside O0's of the same seeds."""
    result = json.loads((results / "loss_gap.json").read_text())
    lines = ["| policy | seeds | validation loss minus O0's, nats | mean |", "|---|---|---|---|"]
    for name, row in result["summary"].items():
        gaps = ", ".join(f"{gap:+.4f}" for gap in row["gaps_nats"])
        lines.append(f"| {name} | {len(row['gaps_nats'])} | {gaps} | {row['mean_gap_nats']:+.4f} |")
    return lines


PAGES: dict[str, Callable[[Path], list[str]]] = {
    "README.md": table,
    "docs/results/README.md": sections,
    "docs/explanation/numerics.md": variants,
}


def rewritten(page: str, lines: list[str]) -> str:
    """The text of a page with fresh lines between the two marks."""
    head, _, rest = page.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise ValueError(f"a page must hold {BEGIN!r} and then {END!r}; put them where the table belongs")
    return "\n".join([head + BEGIN, *lines, END]) + tail


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = options.parse_args().check
    root = Path(__file__).resolve().parent.parent
    stale = []
    for name, lines in PAGES.items():
        page = root / name
        before = page.read_text()
        after = rewritten(before, lines(root / "docs" / "results"))
        if before != after:
            stale.append(name)
            if not check:
                page.write_text(after)
    print(f"out of date: {', '.join(stale)}" if stale else "every table is up to date")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
