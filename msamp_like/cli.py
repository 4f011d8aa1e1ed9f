"""The ``msamp-like`` command. A sub-command is one row of ``COMMANDS``: its help, its arguments, what it does."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msamp_like
from msamp_like import doctor
from msamp_like.policy import LEVELS


class Command(NamedTuple):
    """One sub-command; ``run`` returns the exit status."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``msamp-like``; ``argv`` is what follows the program's name, by default that of the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="msamp-like", description=msamp_like.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"msamp-like {msamp_like.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.help, description=command.help, allow_abbrev=False))
    if not words:
        parser.print_help()
        return 0
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        parser.error(f"a command must be one of {', '.join(COMMANDS)}, got {words[0]!r}{_nearest(words[0])}")
    arguments = parser.parse_args(words)
    return COMMANDS[arguments.command].run(arguments)


def _nearest(word: str) -> str:
    close = difflib.get_close_matches(word, COMMANDS, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _doctor(arguments: argparse.Namespace) -> int:
    diagnosis = doctor.diagnose()
    print(json.dumps(diagnosis.as_dict(), indent=2) if arguments.json else diagnosis)
    return 0


def _policy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("level", choices=list(LEVELS), help="a level of FP8-LM")


def _policy(arguments: argparse.Namespace) -> int:
    print(LEVELS[arguments.level])
    return 0


COMMANDS = {
    "doctor": Command("what this machine can do, and what each level uses of it", _doctor_arguments, _doctor),
    "policy": Command("the format and scaling of every role at a level", _policy_arguments, _policy),
}

if __name__ == "__main__":
    sys.exit(main())
