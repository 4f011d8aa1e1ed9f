"""One form for every result: what was measured, on what, by which command."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from msamp_like.doctor import diagnose


def parser(description: str | None, default_out: str) -> argparse.ArgumentParser:
    """A parser with ``--out``, which every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--out", type=Path, default=Path(default_out), help="the JSON file to write (default: %(default)s)"
    )
    return made


def machine() -> dict[str, Any]:
    """What ran: enough to tell two results apart, nothing that names a place."""
    found = diagnose()
    return {
        "platform": found.platform,
        "threads": found.threads,
        "devices": [device.description for device in found.devices],
        "native_kernels": found.native_kernels.simd if found.native_kernels.loaded else "none",
        "versions": dict(found.versions),
    }


def source() -> str:
    """Digest of the code that trains: Python and C++ of the package, not of tests, benchmarks or pages."""
    root = Path(__file__).resolve().parent.parent
    files = [f for folder in ("msamp_like", "optim", "comm") for f in (root / folder).rglob("*")]
    digest = hashlib.sha256()
    for file in sorted(f for f in files if f.suffix in (".py", ".cpp", ".h")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def write(out: Path, figures: dict[str, Any]) -> None:
    """Write a result with the machine and the command that made it, whole or not at all."""
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": command, "machine": machine(), **figures}, indent=1)
    partial = out.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(out)
    print(f"wrote {out}")
