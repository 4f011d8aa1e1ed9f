"""The pages quote the committed results, and every committed result tells what made it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import summary
from benchmarks.rows import ROWS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("page", summary.PAGES)
def test_a_page_shows_the_committed_results(page):
    text = (ROOT / page).read_text()
    assert summary.fresh(page, text, ROOT / "docs" / "results") == text, "run python -m benchmarks.summary"


def test_a_changed_figure_would_be_seen(tmp_path):
    for file in RESULTS:
        result = json.loads(file.read_text())
        if file.name == "state.json":
            result["bytes_per_parameter"]["O2"]["at rest"]["total"] = 5.0
        (tmp_path / file.name).write_text(json.dumps(result))
    readme = (ROOT / "README.md").read_text()
    assert summary.fresh("README.md", readme, tmp_path) != readme


@pytest.mark.parametrize("page", summary.PAGES)
def test_a_result_that_is_missing_is_said_to_be(page, tmp_path):
    text = summary.fresh(page, (ROOT / page).read_text(), tmp_path)
    if page == "docs/results/README.md":
        for name in ROWS:
            assert re.search(rf"unmeasured: .*`python -m benchmarks.{name}`", text), name
    elif page != "README.md":
        assert "Not measured yet" in text


def test_a_missed_target_says_by_how_much(tmp_path):
    result = json.loads((ROOT / "docs" / "results" / "step-cpu.json").read_text())
    result["presets"]["tiny"]["ratio_to_O0"]["O2"] = 1.5
    (tmp_path / "step-cpu.json").write_text(json.dumps(result))
    assert any("| missed by 20.0%, [" in line for line in summary.speed_and_memory(tmp_path))
    assert not any(
        "missed" in line for line in summary.speed_and_memory(ROOT / "docs" / "results") if "CPU step" in line
    )


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_a_result_names_its_command_and_machine(file):
    result = json.loads(file.read_text())
    assert result["command"].startswith("python -m benchmarks.")
    assert result["machine"]["versions"]["torch"]
    assert isinstance(result.get("reached", True), bool)
