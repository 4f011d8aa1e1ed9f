"""The pages that show results, made from the JSON under docs/results, so that prose cannot drift from it.

python -m benchmarks.summary            # rewrites them
python -m benchmarks.summary --check    # exits 1 if one shows anything else

README.md has the headlines, docs/results/README.md every result with its machine and command; explanations and how-to
pages have tables of their own (:mod:`benchmarks.tables`). What was not measured yet says so, with the command.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import tables
from benchmarks.row import Result, Row
from benchmarks.rows import ROWS, SPEED_AND_MEMORY, Entry

BEGIN, END = "<!-- results: make with python -m benchmarks.summary -->", "<!-- end of results -->"
HEAD = ["| figure | to reach | measured | |", "|---|---|---|---|"]
Block = Callable[[Path], list[str]]


def headlines(results: Path) -> list[str]:
    """The lines of README's table, each with a link to its JSON; a headline without one stands on the results' page."""
    lines = list(HEAD)
    for name, entry in ROWS.items():
        for file in entry.found(results) if entry.headline else []:
            result = json.loads(file.read_text())
            lines += _lines(result, entry, f"[`{name}`](docs/results/{file.name})")
    return lines


def speed_and_memory(results: Path) -> list[str]:
    """What is looked at first, in one table, measured or not."""
    lines = list(HEAD)
    for name in SPEED_AND_MEMORY:
        entry = ROWS[name]
        for file in entry.found(results):
            lines += _lines(json.loads(file.read_text()), entry, f"[`{name}`](#{name})")
        if not entry.found(results):
            lines += _unmeasured(name, entry)
    return lines


def sections(results: Path) -> list[str]:
    """Every result: the question, the figures, the machine, the versions and the command."""
    lines: list[str] = []
    for name, entry in ROWS.items():
        lines += [f"### {name}", "", _question(name), ""]
        for file in entry.found(results):
            result = json.loads(file.read_text())
            made_by = f"`{result['command']}` on {_machine(result)}"
            lines += [*HEAD, *_lines(result, entry, f"[JSON]({file.name})"), "", made_by, ""]
        if not entry.found(results):
            lines += [*HEAD, *_unmeasured(name, entry), ""]
    return lines[:-1]


def _lines(result: Result, entry: Entry, link: str) -> list[str]:
    rows = entry.rows(result)
    # a result may be short of a target that no line judges
    unsaid = "" if result.get("reached", True) or any(row.missed for row in rows) else "missed, "
    return [_line(row, f"missed {row.missed}, {link}" if row.missed else f"{unsaid}{link}") for row in rows]


def _line(row: Row, verdict: str) -> str:
    return f"| {row.figure} | {row.to_reach or 'reported'} | {row.measured} | {verdict} |"


def _unmeasured(name: str, entry: Entry) -> list[str]:
    why = f"unmeasured: {entry.needs or 'not run yet'}"
    planned = entry.planned or [(_question(name).rstrip("."), "")]
    return [_line(Row(*line, why), f"`python -m benchmarks.{name}`") for line in planned]


def _question(name: str) -> str:
    """The first paragraph of a benchmark's docstring."""
    source = Path(__file__).with_name(f"{name}.py").read_text()
    return " ".join((ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0].split())


def _machine(result: Result) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version != "none")
    return (
        f"{', '.join(machine['devices'])} ({machine['platform']}, {machine['threads']} threads, native kernels "
        f"{machine['native_kernels']}): {versions}"
    )


PAGES: dict[str, Sequence[Block]] = {
    "README.md": (headlines,),
    "docs/results/README.md": (speed_and_memory, sections),
    "docs/explanation/numerics.md": (tables.loss, tables.invariance),
    "docs/how-to/attention.md": (tables.attention,),
    "docs/how-to/experts.md": (tables.experts,),
    "docs/how-to/muon.md": (tables.muon,),
    "docs/how-to/saved-activations.md": (tables.saved_activations,),
}
"""The blocks of every page, in the order in which it has places for them."""


def rewritten(page: str, blocks: Sequence[list[str]]) -> str:
    """The text of a page with fresh lines between each pair of marks."""
    parts = page.split(BEGIN)
    if len(parts) != len(blocks) + 1 or not all(END in part for part in parts[1:]):
        raise ValueError(
            f"a page must hold {BEGIN!r} and then {END!r} for each of its {len(blocks)} blocks, got {len(parts) - 1}; "
            "put them where the tables belong"
        )
    ends = [part.partition(END)[2] for part in parts[1:]]
    return parts[0] + "".join("\n".join([BEGIN, *lines, END]) + end for lines, end in zip(blocks, ends, strict=True))


def fresh(name: str, page: str, results: Path) -> str:
    """What the page ``name``, whose text is ``page``, should say."""
    return rewritten(page, [block(results) for block in PAGES[name]])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = options.parse_args().check
    root = Path(__file__).resolve().parent.parent
    stale = []
    for name in PAGES:
        page = root / name
        before = page.read_text()
        after = fresh(name, before, root / "docs" / "results")
        if before != after:
            stale.append(name)
            if not check:
                page.write_text(after)
    print(f"out of date: {', '.join(stale)}" if stale else "every table is up to date")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
