"""The Triton twins without a GPU: their logic in Triton's interpreter, their code as compiled for one.

tests/gpu compares them with the reference on a device.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing here would run it")

ROOT = Path(__file__).parents[1]
# Each would change a bit somewhere: contraction, subnormal numbers flushed to zero, approximate division and root.
INEXACT = re.compile(r"\bfma\.|\.ftz\b|\bdiv\.(full|approx)|\bsqrt\.approx|\brcp\.approx")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["triton_interpreted", "triton_interpreted_fused"])
def test_logic_in_the_interpreter(file):
    """A process of their own: whether a kernel is interpreted is settled when it is defined."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{file}.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [pytest.param("80", marks=pytest.mark.nightly), "90"])
def test_compiled_code_is_exact(tmp_path, capability):
    """The kernels compile for devices without and with FP8 units, and every instruction rounds as FP32 does."""
    code = compiled("exact", tmp_path, capability)
    assert code.count(".visible .entry") == 8
    assert not INEXACT.findall(code)
    assert ("e5m2.e4m3" in code) == (capability == "90")  # the product reads FP8 where there are units


@pytest.mark.slow
def test_fused_kernels_compile(tmp_path):
    """Their exponentials are the device's own, so that only their casts could be exact."""
    assert compiled("fused", tmp_path, "80").count(".visible .entry") == 6


def compiled(which, folder, capability):
    command = [sys.executable, "-m", "tests.triton_compiled", capability, which]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-8000:]
    return run.stdout
