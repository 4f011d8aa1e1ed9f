"""What this machine can do for FP8 training, and what each level will use of it.

A fallback is never silent: whatever the engine does without here (FP8 units, native kernels, Triton, a back end) stands
in the report with the reason and, where there is one, the remedy. Capabilities are asked of the device, never read from
a product's name.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import msamp_like
from msamp_like.kernels import cpu
from msamp_like.kernels.fp8_units import has_fp8_units
from msamp_like.policy import LEVELS, Policy, Role

_VERSIONED = ("torch", "numpy", "safetensors", "tyro", "triton")
_BACKENDS = ("gloo", "nccl", "mpi", "ucc", "xccl")
# In the order of preference. The names are those of the Linux kernel: the first two of x86, the last of Arm.
_BF16_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16", "bf16": "Arm BF16"}


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device, and whether it multiplies FP8 by itself; ``products`` says how an FP8 product is taken on it."""

    name: str
    description: str
    memory_gib: float
    fp8_units: bool
    products: str


@dataclass(frozen=True, kw_only=True)
class NativeKernels:
    """The compiled CPU twin: in use with its instruction set, or not, with the reason."""

    loaded: bool
    simd: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LevelHere:
    """What one level does on one device of this machine."""

    level: str
    device: str
    products: str
    casts: str
    states: str
    wire: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything the report prints; :meth:`as_dict` is its JSON."""

    versions: Mapping[str, str]
    platform: str
    threads: int
    devices: tuple[Device, ...]
    native_kernels: NativeKernels
    distributed: tuple[str, ...]
    levels: tuple[LevelHere, ...]
    advice: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain dicts, lists, strings and numbers, for ``--json``."""
        return asdict(self)

    def __str__(self) -> str:
        lines = ["  ".join(f"{name} {version}" for name, version in self.versions.items())]
        lines += [f"{self.platform}, {self.threads} torch threads", "", "devices"]
        for device in self.devices:
            lines.append(f"  {device.name:<8}{device.description}, {device.memory_gib:.0f} GiB")
            lines.append(f"  {'':<8}FP8 units: {'yes' if device.fp8_units else 'no'}; FP8 products: {device.products}")
        native = self.native_kernels
        lines += ["", f"native CPU kernels: {native.simd if native.loaded else 'not loaded: ' + native.reason}"]
        lines += [f"distributed back ends: {', '.join(self.distributed) or 'none'}", "", "what each level uses here"]
        header = ("level", "device", "products", "casts and updates", "moments", "gradients travel in")
        lines += _table([header, *((r.level, r.device, r.products, r.casts, r.states, r.wire) for r in self.levels)])
        if self.advice:
            lines += ["", "advice", *(f"  - {text}" for text in self.advice)]
        return "\n".join(lines)


def diagnose() -> Diagnosis:
    """Looks at this machine; starts nothing and allocates nothing on a device."""
    native = NativeKernels(**cpu.status()._asdict())
    devices = (_cpu(), *(_cuda(index) for index in range(torch.cuda.device_count())))
    return Diagnosis(
        versions=_versions(),
        platform=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        threads=torch.get_num_threads(),
        devices=devices,
        native_kernels=native,
        distributed=tuple(name for name in _BACKENDS if dist.is_available() and dist.is_backend_available(name)),
        levels=tuple(_level(policy, device, native) for device in devices for policy in LEVELS.values()),
        advice=tuple(_advice(native, devices)),
    )


def processor() -> str:
    """What the processor calls itself; a label for reports, nothing is decided by it."""
    return _cpu_fields().get("model name", platform.processor() or platform.machine())


def _versions() -> dict[str, str]:
    found = {"msamp_like": msamp_like.__version__, "python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "cuda": torch.version.cuda or "none", **({"hip": torch.version.hip} if torch.version.hip else {})}


def _cpu() -> Device:
    fields = _cpu_fields()
    flags = fields.get("flags", fields.get("Features", "")).split()
    unit = next((name for flag, name in _BF16_UNITS.items() if flag in flags), "")
    how = f"on {unit}" if unit else "without BF16 units, slow"
    return Device(
        name="cpu",
        description=processor(),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        fp8_units=False,
        products=f"exact emulation: decoded to BF16, multiplied {how}",
    )


def _cpu_fields() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none (macOS)."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cuda(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    device = torch.device("cuda", index)
    native = has_fp8_units(device)
    major, minor = torch.cuda.get_device_capability(device)
    return Device(
        name=f"cuda:{index}",
        description=f"{properties.name}, capability {major}.{minor}",
        memory_gib=properties.total_memory / 2**30,
        fp8_units=native,
        products="native, torch._scaled_mm" if native else "exact emulation: decoded to BF16, multiplied in BF16",
    )


def _level(policy: Policy, device: Device, native: NativeKernels) -> LevelHere:
    if not policy.fp8_products:
        products = "BF16"
    elif device.fp8_units:
        products = "FP8, native"
    else:
        products = "FP8, emulated exactly"
    if device.name == "cpu":
        casts = f"native, {native.simd}" if native.loaded else "reference, plain torch"
    else:
        casts = "Triton" if importlib.util.find_spec("triton") else "reference, plain torch"
    return LevelHere(
        level=policy.name,
        device=device.name,
        products=products,
        casts=casts,
        states=f"{policy[Role.FIRST_MOMENT].format} / {policy[Role.SECOND_MOMENT].format}",
        wire=str(policy[Role.GRAD_WEIGHT].format),
    )


def _advice(native: NativeKernels, devices: tuple[Device, ...]) -> list[str]:
    advice = []
    if not native.loaded:
        advice.append(
            "without native CPU kernels results are the same, casts and optimizer steps on the CPU are slower; "
            "install a C++ compiler and run pip install again"
        )
    if len(devices) > 1 and importlib.util.find_spec("triton") is None:
        advice.append("Triton is not installed: results are the same, the GPU's casts are slower; pip install triton")
    for device in devices[1:]:
        if not device.fp8_units:
            advice.append(f"{device.name} has no FP8 units: memory and wire bytes are saved, products are not faster")
    return advice


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
