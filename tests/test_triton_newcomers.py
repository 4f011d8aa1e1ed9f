"""The Triton twins of grouped products and attention without a GPU: interpreted, compiled for two kinds of units."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing here would run it")

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_logic_in_the_interpreter():
    """One process for all: whether a kernel is interpreted is settled when it is defined."""
    files = ["tests/triton_grouped_interpreted.py", "tests/triton_attention_interpreted.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.nightly
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_code_multiplies_in_tensor_cores(tmp_path, capability):
    """BF16 ones everywhere, and where a device has them FP8 ones too (of Hopper: warp-group instructions)."""
    command = [sys.executable, "-m", "tests.triton_newcomers_compiled", str(capability)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-8000:]
    assert run.stdout.count(".visible .entry") == (6 if capability == 80 else 12)
    assert "bf16" in run.stdout
    assert ("e5m2.e4m3" in run.stdout and "e4m3.e4m3" in run.stdout) == (capability == 90)
