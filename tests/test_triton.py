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


@pytest.fixture(scope="module")
def interpreters(request, tmp_path_factory):
    """A process for each file that was asked for, all at once: they are what the suite waits for longest. None of them
    could be this one: whether a kernel is interpreted is settled when it is defined."""
    environment, running = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, {}
    for item in request.session.items:
        if getattr(item, "function", None) is test_logic_in_the_interpreter:
            file = item.callspec.params["file"]
            said = tmp_path_factory.mktemp("interpreted") / f"{file}.txt"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{file}.py"]
            with said.open("w") as out:
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
            running[file] = process, said
    yield running
    for process, _ in running.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["triton_interpreted", "triton_interpreted_fused", "triton_interpreted_steps"])
def test_logic_in_the_interpreter(file, interpreters):
    process, said = interpreters[file]
    assert process.wait() == 0, said.read_text()[-10000:]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [pytest.param("80", marks=pytest.mark.nightly), "90"])
def test_compiled_code_is_exact(tmp_path, capability):
    """The kernels compile for devices without and with FP8 units, and every instruction rounds as FP32 does."""
    code = compiled("exact", tmp_path, capability)
    assert code.count(".visible .entry") == 7
    assert not INEXACT.findall(code)
    assert ("e5m2.e4m3" in code) == (capability == "90")  # the product reads FP8 where there are units


@pytest.mark.slow
@pytest.mark.parametrize("capability", [pytest.param("80", marks=pytest.mark.nightly), "90"])
def test_compiled_steps_are_exact_and_move_16_bytes(tmp_path, capability):
    """A thread loads and stores whole vectors of every operand: that needs the compiler to see that a row of the table
    holds multiples of 16, and that a mask is the same along a block."""
    code = compiled("steps", tmp_path, capability)
    o2, lean, *_ = code.split(".visible .entry")[1:]
    assert code.count(".visible .entry") == 4
    assert not INEXACT.findall(code)
    for kernel, loads, stores in ((o2, 6, 6), (lean, 5, 4)):  # 16 elements of each operand, 32 bytes of an FP16 one
        assert len(re.findall(r"ld\.global\.v4\.b32", kernel)) == loads
        assert len(re.findall(r"st\.global\.v4\.b32", kernel)) == stores
        assert not re.findall(r"(ld|st)\.global\.b(8|16)\b", kernel)


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
