"""A frozen dataclass of settings is a launcher's command line, its ``--config`` file and its record of the run.

A field is an option, the comment behind it is its help. A file gives values by field name, the command line overrides
it:

    @dataclass(frozen=True, kw_only=True)
    class Settings(Configurable):
        \"\"\"What the program does.\"\"\"

        steps: int = 300  # Optimizer steps.

    settings = parse(Settings, ["--config", "run.yaml", "--steps", "10"], program="train")

Fields are bool, int, float, str, a Literal of strings, or a tuple of one of these: both notations can spell them.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class Configurable:
    """The two options that every launcher has; neither is part of what ``dump`` writes."""

    config: str = ""  # YAML or TOML file of settings; options given on the command line override it.
    print_config: bool = False  # Print the resolved settings as YAML and stop.


S = TypeVar("S", bound=Configurable)


def parse(cls: type[S], arguments: Sequence[str], *, program: str) -> S:
    """Settings from defaults, then the ``--config`` file, then ``arguments``.

    Raises ValueError or FileNotFoundError for a bad file, SystemExit for bad arguments, ``--help``, ``--print-config``.
    """
    file = _config_option(arguments)
    default = cls(**load(cls, file)) if file else cls()
    settings = tyro.cli(cls, default=default, args=list(arguments), prog=program)
    if settings.print_config:
        print(dump(settings), end="")
        raise SystemExit(0)
    return settings


def load(cls: type[Configurable], file: str) -> dict[str, Any]:
    """Values by field name from a YAML or TOML file, each checked against its field."""
    path = Path(file)
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise ValueError(f"a config file must end in .yaml, .yml or .toml, got {file!r}; rename it")
    if not path.is_file():
        raise FileNotFoundError(f"--config must be a file, {file} is none; give its path")
    text = path.read_text(encoding="utf-8")
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file} must be valid {path.suffix[1:].upper()}: {error}; correct it") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must give settings by name, got {type(values).__name__}; write `steps: 300`")
    kinds = {name: kind for name, kind in get_type_hints(cls).items() if name not in _names(Configurable)}
    found = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name in found:
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(sorted(kinds))}"
            raise ValueError(f"every key of {file} must be a setting, got {name!r}; {remedy}")
    return {name: _typed(value, kinds[name], f"{name} in {file}") for name, value in found.items()}


def dump(settings: Configurable) -> str:
    """The settings as YAML that ``--config`` takes."""
    return yaml.safe_dump(as_dict(settings), sort_keys=False)


def as_dict(settings: Configurable) -> dict[str, Any]:
    """The settings as JSON has them: tuples are lists, and the two options of every launcher are left out."""
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k not in _names(Configurable)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _names(cls: type[Configurable]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _config_option(arguments: Sequence[str]) -> str:
    """The file of the last ``--config FILE`` or ``--config=FILE``."""
    file = ""
    for option, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if option == "--config":
            file = following
        elif option.startswith("--config="):
            file = option.partition("=")[2]
    return file


def _typed(value: Any, kind: Any, where: str) -> Any:
    """``value`` from a file as the field's type has it; raises ValueError for another type."""
    if get_origin(kind) is tuple:
        if isinstance(value, list):
            element, *more = get_args(kind)
            if Ellipsis in more or len(value) == 1 + len(more):
                return tuple(_typed(v, element, where) for v in value)
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ValueError(f"{where} must be one of {', '.join(map(repr, get_args(kind)))}, got {value!r}; choose one")
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 3e-4, which has no dot, as text
        except ValueError:
            pass
    elif type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else str(kind)
    raise ValueError(f"{where} must be {name}, got {value!r}; correct the file")
