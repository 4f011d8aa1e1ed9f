"""What the optimizers' steps are made of on a GPU, without one: the machine code of each level's step, counted.

    python -m benchmarks.gpu_code                      # for capability 9.0, into docs/results/gpu_code.json
    python -m benchmarks.gpu_code --capability 100

Triton brings the assembler and the disassembler. Counted are registers of a thread, spilled bytes, instructions an
element (those of a tile over its elements; the rare paths of root and quotient are in it, so it is from above), and how
many of them the integer and logic units take, which are half as many as a multiprocessor's lanes. Beside them stands
the time that 1e9 elements would take if instructions were all that counts, and if bytes were: on H200, by NVIDIA's
figures. That is a calculation; ``benchmarks/gpu.py`` measures.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu import COPIES, LEVELS, level_row, moved_bytes
from benchmarks.result import parser, write
from msamp_like.kernels.triton_steps import step_kernel
from msamp_like.kernels.triton_table import CHOICE, Choice, Planned, plan

SIZE = 256
MULTIPROCESSORS, GHZ, LANES, BYTES_PER_S = 132, 1.755, 128, 4.8e12  # H200: data sheet and white paper
INTEGER = re.compile(r"^(LOP3|SHF|IADD3|VIADD|I?MNMX|VIMNMX3?|PRMT|SEL|FSEL|ISETP|FSETP|FMNMX|LEA|PLOP3|MOV|SGXT)\b")
_TABLES = {"addresses": "*i64", "numbers": "*i32", "found": "*i32", "programs": "*i32", "bad": "*fp32"}
_FLOATS = ("keep", "weight_decay", "beta1", "rest1", "beta2", "rest2")


def compiled(row: Planned, choice: Choice, capability: int) -> str:
    """PTX of the step that takes a row."""
    combination = row.combination
    constants = {
        **combination._asdict(),
        "KIND": "adam",
        "DECAY": "decoupled",
        "MEASURES": False,
        "UNITS": capability >= 89,
        "CONVERTS": choice.converts,
        "TILES": choice.tiles,
        "GROUP": combination.group(choice),
    }
    kinds = _TABLES | dict.fromkeys(_FLOATS, "fp32") | dict.fromkeys(constants, "constexpr")
    names = step_kernel.arg_names
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(step_kernel, {name: kinds[name] for name in names}, places)
    options = {"num_warps": choice.warps, "enable_fp_fusion": False}
    ptx: str = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    return ptx


def counted(ptx: str, elements_per_thread: float) -> dict[str, Any]:
    """Registers and instructions of the machine code."""
    architecture = re.findall(r"\.target (\w+)", ptx)[0]
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "step.ptx", Path(folder) / "step.cubin"
        source.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, f"-arch={architecture}", "-v", str(source), "-o", str(binary)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(binary)]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+[^;]*);", code, re.MULTILINE)
    integer = sum(1 for line in lines if INTEGER.match(line))
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled bytes": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "loads of 16 bytes": sum(1 for line in lines if line.startswith("LDG.E.128")),
        "instructions an element": round(len(lines) / elements_per_thread, 1),
        "integer ones": round(integer / elements_per_thread, 1),
    }


def bounds(row: dict[str, Any], bytes_per_element: float) -> dict[str, float]:
    """Milliseconds of 1e9 elements that each resource asks for by itself."""
    per_ms = MULTIPROCESSORS * GHZ * 1e6
    return {
        "ms by instructions": round(1e9 * row["instructions an element"] / (per_ms * LANES), 2),
        "ms by integer ones": round(1e9 * row["integer ones"] / (per_ms * LANES / 2), 2),
        "ms by bytes": round(1e12 * bytes_per_element / BYTES_PER_S, 2),
    }


def main() -> None:
    arguments = parser(__doc__, "docs/results/gpu_code.json")
    arguments.add_argument("--capability", type=int, default=90, help="of the device (default: %(default)s)")
    given = arguments.parse_args()
    rows: dict[str, Any] = {}
    for level in LEVELS:
        for copied in sorted({False, level in COPIES}):
            for converts in (False, True):
                row = level_row(level, 0, copied, SIZE, "cpu")
                planned, choice = plan(row), CHOICE._replace(converts=converts)
                if isinstance(planned, str):
                    raise RuntimeError(f"a level's row must be one that a pass takes, got: {planned}")
                found = counted(compiled(planned, choice, given.capability), choice.elements / (32 * choice.warps))
                name = f"{level}{', copy' if copied else ''}{', converts' if converts else ''}"
                rows[name] = {**found, **bounds(found, moved_bytes([row]) / SIZE**2)}
                print(name, rows[name], flush=True)
    write(given.out, {"capability": given.capability, "choice": CHOICE._asdict(), "rows": rows})


if __name__ == "__main__":
    main()
