"""Settings: one dataclass, three notations (command line, YAML, TOML), the same values and clear errors."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from msamp_like.launchers.pretrain_settings import Settings as PretrainSettings
from msamp_like.launchers.settings import Configurable, as_dict, dump, parse


@dataclass(frozen=True, kw_only=True)
class Settings(Configurable):
    """A program with one option of each kind."""

    steps: int = 300  # Optimizer steps.
    lr: float = 0.1  # Learning rate.
    name: str = ""  # Any text.
    compile: bool = False  # Whether to compile.
    level: Literal["O0", "O2"] = "O2"  # Precision.
    betas: tuple[float, float] = (0.9, 0.95)  # Averaging factors.
    patterns: tuple[str, ...] = ()  # Any number of patterns.


YAML = "steps: 5\nlr: 3e-4\nname: a\ncompile: true\nlevel: O0\nbetas: [0.8, 1]\npatterns: [x=y, z]\n"
TOML = 'steps = 5\nlr = 3e-4\nname = "a"\ncompile = true\nlevel = "O0"\nbetas = [0.8, 1]\npatterns = ["x=y", "z"]\n'
ARGUMENTS = "--steps 5 --lr 3e-4 --name a --compile --level O0 --betas 0.8 1 --patterns x=y z"
VALUES = Settings(
    steps=5, lr=3e-4, name="a", compile=True, level="O0", betas=(0.8, 1.0), patterns=("x=y", "z"), config=""
)


def parsed(*arguments: str) -> Settings:
    return parse(Settings, arguments, program="program")


def test_three_notations_one_meaning(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(YAML)
    (tmp_path / "c.toml").write_text(TOML)
    assert parsed(*ARGUMENTS.split()) == VALUES
    for arguments in (["--config", f"{tmp_path}/c.yaml"], [f"--config={tmp_path}/c.toml"]):
        assert dataclasses.replace(parsed(*arguments), config="") == VALUES


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(YAML)
    settings = parsed("--steps", "7", "--config", f"{tmp_path}/c.yaml", "--no-compile", "--patterns", "q")
    assert (settings.steps, settings.compile, settings.patterns, settings.name) == (7, False, ("q",), "a")


def test_defaults_stay_where_the_file_is_silent(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("steps: 1")
    assert dataclasses.replace(parsed("--config", f"{tmp_path}/c.yaml"), config="") == Settings(steps=1)


def test_what_is_dumped_reads_back(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(dump(VALUES))
    assert dataclasses.replace(parsed("--config", f"{tmp_path}/c.yaml"), config="") == VALUES
    assert yaml.safe_load(dump(VALUES)) == as_dict(VALUES)


def test_print_config_shows_the_resolved_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed("--steps", "7", "--print-config")
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out) == as_dict(Settings(steps=7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes: 5", r"must be a setting, got 'stpes'; did you mean 'steps'\?"),
        ("zzz: 5", r"got 'zzz'; choose from betas, compile, level"),
        ("config: other.yaml", "must be a setting, got 'config'"),
        ("steps: 1.5", r"steps in .*c\.yaml must be int, got 1\.5"),
        ("steps: true", "must be int, got True"),
        ("lr: fast", "lr in .* must be float, got 'fast'"),
        ("lr: true", "must be float, got True"),
        ("compile: 1", "must be bool, got 1"),
        ("level: O9", "must be one of 'O0', 'O2', got 'O9'"),
        ("betas: [0.9]", r"must be tuple\[float, float\], got \[0\.9\]"),
        ("patterns: x", "must be tuple.*, got 'x'"),
        ("patterns: [1]", "must be str, got 1"),
        ("- 1", "must give settings by name, got list"),
        ("a: [", "must be valid YAML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parsed("--config", f"{tmp_path}/c.yaml")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end in \.yaml, \.yml or \.toml"):
        parsed("--config", "c.json")
    with pytest.raises(FileNotFoundError, match="give its path"):
        parsed("--config", f"{tmp_path}/none.yaml")
    (tmp_path / "c.toml").write_text("a = = 1")
    with pytest.raises(ValueError, match="must be valid TOML"):
        parsed("--config", f"{tmp_path}/c.toml")


def test_a_misspelt_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed("--stpes", "5")
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_every_option_of_the_launcher_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(PretrainSettings, ["--help"], program="pretrain")
    shown = "".join(capsys.readouterr().out.replace("│", "").split())  # wrapped anywhere
    source = inspect.getsource(Configurable) + inspect.getsource(PretrainSettings)
    texts = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, flags=re.MULTILINE))
    assert set(texts) == {field.name for field in dataclasses.fields(PretrainSettings)}
    for name, text in texts.items():
        assert "".join(text.split()) in shown, f"--{name} does not show its help text"
