"""The documentation is true: its Python runs, its links lead somewhere, its commands exist, its tables are complete."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from msamp_like.tensor.scaling_tensor import HOST_OPERATIONS, OPERATIONS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=name_of)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of one page run in order, in one namespace, in an empty folder."""
    if page.name == "design.md":
        pytest.skip("shapes of the interface, not programs")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    text = page.read_text()
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)[` ]", text)) | set(re.findall(r"^make ([a-z-]+)", text, re.M)) <= targets
    for module in re.findall(r"-m (msamp_like[.\w]+)", text):
        assert importlib.util.find_spec(module), module


def test_every_operation_of_a_scaling_tensor_is_documented():
    text = (ROOT / "docs" / "reference" / "tensor.md").read_text()
    documented = set(re.findall(r"`([A-Za-z_0-9.]+)`", text))
    defined = {operation._schema.name.removeprefix("aten::") for operation in OPERATIONS}
    defined |= {name.removesuffix(".default") for name in HOST_OPERATIONS}
    assert defined - documented == set()
