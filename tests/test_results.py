"""The pages quote the committed results, and every committed result tells what made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("page", summary.PAGES)
def test_a_page_shows_the_committed_results(page):
    text = (ROOT / page).read_text()
    lines = summary.PAGES[page](ROOT / "docs" / "results")
    assert summary.rewritten(text, lines) == text, "run python -m benchmarks.summary"


def test_a_changed_figure_would_be_seen(tmp_path):
    for file in RESULTS:
        result = json.loads(file.read_text())
        if file.name == "state.json":
            result["bytes_per_parameter"]["O2"]["at rest"]["total"] = 5.0
        (tmp_path / file.name).write_text(json.dumps(result))
    readme = (ROOT / "README.md").read_text()
    assert summary.rewritten(readme, summary.table(tmp_path)) != readme


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_a_result_names_its_command_and_machine(file):
    result = json.loads(file.read_text())
    assert result["command"].startswith("python -m benchmarks.")
    assert result["machine"]["versions"]["torch"]
    assert isinstance(result.get("reached", True), bool)
