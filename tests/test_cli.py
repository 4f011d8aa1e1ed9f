"""The msamp-like command: what doctor says, in text and JSON, and what a wrong word gets."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import msamp_like
from msamp_like import cli, doctor
from msamp_like.kernels.fp8_units import has_fp8_units
from msamp_like.policy import LEVELS


def test_doctor_prints_every_level(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"msamp_like {msamp_like.__version__}" in text
    assert f"torch {torch.__version__}" in text
    for word in (*LEVELS, "FP8 units: no", "native CPU kernels", "gloo"):
        assert word in text


def test_doctor_json_holds_the_same(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["name"] == "cpu"
    assert {row["level"] for row in found["levels"]} == set(LEVELS)
    assert set(found["native_kernels"]) == {"loaded", "simd", "reason"}


def test_doctor_says_why_native_kernels_are_missing(monkeypatch):
    missing = doctor.cpu.status()._replace(loaded=False, simd="", reason="no C++ compiler when installed")
    monkeypatch.setattr(doctor.cpu, "status", lambda: missing)
    diagnosis = doctor.diagnose()
    assert "not loaded: no C++ compiler when installed" in str(diagnosis)
    assert any("install a C++ compiler" in text for text in diagnosis.advice)
    assert all(row.casts == "reference, plain torch" for row in diagnosis.levels)


@pytest.mark.parametrize(
    ("hip", "capability", "expected"),
    [
        (None, (8, 0), False),
        (None, (8, 9), True),
        (None, (9, 0), True),
        (None, (12, 0), True),
        ("7.0", (9, 4), False),  # gfx942: FP8 of another format
        ("7.0", (9, 5), True),
        ("7.0", (11, 0), False),
        ("7.0", (12, 0), True),
    ],
)
def test_fp8_units_are_read_from_the_capability(monkeypatch, hip, capability, expected):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_fp8_units.__wrapped__(torch.device("cuda", 0)) is expected


@pytest.mark.parametrize(("capability", "fp8"), [((9, 0), True), ((8, 0), False)])
def test_doctor_describes_a_gpu(monkeypatch, capability, fp8):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(name="a GPU of any name", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    has_fp8_units.cache_clear()
    diagnosis = doctor.diagnose()
    has_fp8_units.cache_clear()
    gpu = diagnosis.devices[1]
    assert (gpu.name, gpu.fp8_units, gpu.memory_gib) == ("cuda:0", fp8, 80)
    products = {row.level: row.products for row in diagnosis.levels if row.device == "cuda:0"}
    assert products["O2"] == ("FP8, native" if fp8 else "FP8, emulated exactly")
    assert any("no FP8 units" in text for text in diagnosis.advice) is not fp8


def test_policy_prints_the_table_of_roles(capsys):
    assert cli.main(["policy", "O2"]) == 0
    assert "second_moment" in capsys.readouterr().out


def test_no_word_prints_help_and_version_prints_the_version(capsys):
    assert cli.main([]) == 0
    assert "doctor" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"msamp-like {msamp_like.__version__}"


def test_an_unknown_command_is_named_with_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["docter"])
    assert "got 'docter'; did you mean 'doctor'?" in capsys.readouterr().err
