"""What is shipped: the hand-written package map against the tree, the wheel and the sdist, the price of an import."""

from __future__ import annotations

import configparser
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import msamp_like

ROOT = Path(__file__).resolve().parents[1]
TOP_FOLDERS = ("comm", "launchers", "optim")


@pytest.fixture(scope="module")
def config():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def run(*command, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_every_package_is_listed(config):
    listed = set(config["options"]["packages"].split())
    folders = dict(line.split(" = ") for line in config["options"]["package_dir"].strip().splitlines())
    found = {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for package, folder in folders.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == found
    assert set(folders) == {"msamp_like", *(f"msamp_like.{folder}" for folder in TOP_FOLDERS)}


@pytest.mark.parametrize("folder", TOP_FOLDERS)
def test_a_top_folder_refuses_its_short_name(folder):
    status, _, error = run("-c", f"import {folder}", cwd=ROOT)
    assert status == 1
    assert error.splitlines()[-1].startswith("ImportError")
    assert f"msamp_like.{folder}" in error.splitlines()[-1]


def test_installed_under_its_own_names(tmp_path):
    names = ", ".join(f"msamp_like.{folder}" for folder in TOP_FOLDERS)
    status, _, error = run("-c", f"import {names}", cwd=tmp_path)
    assert status == 0, error
    assert importlib.metadata.version("msamp-like") == msamp_like.__version__
    (script,) = (s for s in importlib.metadata.entry_points(group="console_scripts") if s.name == "msamp-like")
    assert script.value == "msamp_like.cli:main"


def test_import_is_cheap_and_pulls_in_no_extra(tmp_path):
    """At most 0.5 s beyond torch, in time of the processor (others may hold the cores), and no optional library."""
    program = (
        "import json, sys, time, torch, numpy; start = time.process_time(); from msamp_like import amp, optim; "
        "print(json.dumps([time.process_time() - start, sorted(sys.modules)]))"
    )
    status, output, error = run("-c", program, cwd=tmp_path)
    assert status == 0, error
    seconds, modules = json.loads(output)
    assert seconds <= 0.5
    extras = {"accelerate", "deepspeed", "matplotlib", "megatron", "tokenizers", "transformers", "tyro", "yaml", "PIL"}
    assert extras.isdisjoint(modules)


@pytest.mark.slow
def test_sdist_gives_a_wheel_that_imports_by_itself(tmp_path):
    """Source tree -> sdist -> wheel -> a folder of its own, imported from elsewhere."""
    build = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"
    status, output, error = run("-c", build.format("sdist"), str(tmp_path), cwd=ROOT)
    assert status == 0, error
    sdist = tmp_path / output.splitlines()[-1]
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "source", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    assert {"LICENSE", "Makefile", "optim/__init__.py", "tests/conftest.py", "docs/design.md"} <= shipped
    assert not [name for name in shipped if name.endswith((".so", ".pyc")) or name.startswith(("runs/", ".venv/"))]

    (unpacked,) = (tmp_path / "source").iterdir()
    status, output, error = run("-c", build.format("wheel"), str(tmp_path), cwd=unpacked)
    assert status == 0, error
    wheel = tmp_path / output.splitlines()[-1]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert {name.split("/")[0] for name in names} == {"msamp_like", f"msamp_like-{msamp_like.__version__}.dist-info"}
    assert {"msamp_like/py.typed", "msamp_like/optim/__init__.py", "msamp_like/kernels/reference.py"} <= set(names)

    program = "import msamp_like.comm, msamp_like.launchers, msamp_like.optim; print(msamp_like.optim.__file__)"
    status, output, error = run("-c", program, cwd=tmp_path / "source", PYTHONPATH=str(tmp_path / "installed"))
    assert status == 0, error
    assert output.startswith(str(tmp_path / "installed"))
