"""The CPU twin: loads ``cpu.cpp``'s library and calls it on tensors, with the signatures of :mod:`.reference`.

The library is optional. Where it was not built or cannot be loaded, :func:`status` says why and the reference runs. It
uses OpenMP without bringing a runtime: torch's own is made visible before loading, so both share one pool of threads.

Where a case has no fast path (float64 input, AMD's fnuz formats) the functions here call the reference themselves: the
result is the same, bit for bit.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.machinery
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from msamp_like.formats import FP8_DTYPES, Block, Format, block_extent, format_of, grid_shape, matrix_shape
from msamp_like.kernels import reference
from msamp_like.kernels.reference import Noise, Operand

TYPES = {  # the order of enum Type in cpu.cpp
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
    torch.uint8: 5,
}
REAL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SIMD_NAMES = ("baseline", "AVX2", "AVX-512")


class NativeStatus(NamedTuple):
    """Whether the native kernels run, else why not; and which instruction set they use."""

    loaded: bool
    reason: str
    simd: str


class _Noise(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("key0", "key1", "lower_half")]


# --- the library ----------------------------------------------------------------------------------------------------


class _Native:
    """The loaded library; ``simd`` is the instruction set its kernels use, at most what the processor has."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        shape, how = (size, size, size, size), (integer, integer)
        signatures: dict[str, tuple[type, ...]] = {
            "msamp_amax": (pointer, integer, pointer, *shape, *how),
            "msamp_scale_inv": (pointer, pointer, size, integer, integer, integer),
            "msamp_powers_of_two": (pointer, size),
            "msamp_quantize": (pointer, integer, pointer, pointer, integer, pointer, pointer, *shape, *how),
            "msamp_quantize_current": (
                *(pointer, integer, pointer, pointer, integer, pointer, pointer, integer, integer),
                *(*shape, *how),
            ),
            "msamp_dequantize": (pointer, integer, pointer, pointer, integer, *shape, *how),
            **dict.fromkeys(("msamp_adam", "msamp_lion", "msamp_sgd"), (pointer, size, pointer, *how)),
        }
        for name, arguments in signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        library.msamp_powers_of_two.restype = integer
        self.amax = library.msamp_amax
        self.scale_inv = library.msamp_scale_inv
        self.powers_of_two = library.msamp_powers_of_two
        self.quantize = library.msamp_quantize
        self.quantize_current = library.msamp_quantize_current
        self.dequantize = library.msamp_dequantize
        self.library = library  # cpu_fused.py has functions of its own in it
        self.adam = library.msamp_adam
        self.lion = library.msamp_lion
        self.sgd = library.msamp_sgd
        self.simd: int = library.msamp_simd()


def status() -> NativeStatus:
    """What :func:`native` found; loads the library on the first call."""
    native, reason = _load()
    return NativeStatus(native is not None, reason, _SIMD_NAMES[native.simd] if native else "none")


def available() -> bool:
    """Whether the functions below may be called."""
    return _load()[0] is not None


@functools.cache
def _load() -> tuple[_Native | None, str]:
    folder = Path(__file__).parent
    paths = [folder / f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None, f"{folder} holds no _cpu library: it was installed without a C++ compiler; install again with one"
    try:
        for runtime in _openmp_runtimes():
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(path))
        sources = [folder / "cpu.cpp", *sorted(folder.glob("cpu_*.h"))]  # an installed wheel has none beside it
        if sources[0].exists() and library.msamp_digest() & 0xFFFFFFFF != _digest(sources):
            return None, f"{path} was built from other sources; install again: pip install -e ."
        return _Native(library), str(path)
    except (OSError, AttributeError) as error:  # AttributeError: a library built from other sources
        return None, f"{path} cannot be loaded ({error}); install again with the compiler of this machine"


def _digest(sources: list[Path]) -> int:
    """What setup.py compiles into the library; functions of another version would be called with wrong arguments."""
    return functools.reduce(lambda found, file: zlib.crc32(file.read_bytes(), found), sources, 0)


def _openmp_runtimes() -> list[str]:
    """The OpenMP runtime that this process, hence torch, has loaded; else the system's."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    files = {line.split(maxsplit=5)[5] for line in lines if line.count("/") > 0}
    loaded = sorted(file for file in files if Path(file).name.startswith(("libgomp", "libiomp5", "libomp")))
    beside_torch = sorted(str(file) for file in (Path(torch.__file__).parent / "lib").glob("libgomp*"))
    system = ctypes.util.find_library("gomp") if not (loaded or beside_torch) else None
    return loaded[:1] or beside_torch[:1] or ([system] if system else [])


def native() -> _Native:
    native, reason = _load()
    if native is None:
        raise RuntimeError(f"the native kernels are not loaded: {reason}; call kernels.reference instead")
    return native


# --- casts ----------------------------------------------------------------------------------------------------------


def _geometry(shape: torch.Size, block: Block) -> tuple[int, int, int, int]:
    return (*matrix_shape(shape), *block_extent(shape, block))


def _noise(noise: Noise | None) -> _Noise | None:
    return None if noise is None else _Noise(*reference.noise_keys(noise), noise.role & 2)


def _has_fast_path(x: Tensor, stored: torch.dtype = torch.float32) -> bool:
    return x.dtype in REAL_DTYPES and x.numel() > 0 and stored in TYPES


def checked_scales(scale_inv: Tensor, shape: torch.Size, block: Block) -> Tensor:
    """``scale_inv`` as the library reads it: FP32, contiguous, one entry a block."""
    if scale_inv.shape != grid_shape(shape, block) or scale_inv.dtype != torch.float32:
        raise ValueError(
            f"scale_inv of a tensor of shape {tuple(shape)} in blocks {block} must be FP32 of shape "
            f"{grid_shape(shape, block)}, got {scale_inv.dtype} of shape {tuple(scale_inv.shape)}"
        )
    return scale_inv.contiguous()


def amax(x: Tensor, block: Block) -> Tensor:
    """See :func:`.reference.amax`."""
    if not _has_fast_path(x):
        return reference.amax(x, block)
    library, x = native(), x.contiguous()
    largest = torch.empty(grid_shape(x.shape, block), dtype=torch.float32)
    library.amax(x.data_ptr(), TYPES[x.dtype], largest.data_ptr(), *_geometry(x.shape, block), library.simd, threads())
    return largest


def scale_inv_from_amax(amax: Tensor, format: Format, margin: int = 0, power_of_two: bool = True) -> Tensor:
    """See :func:`.reference.scale_inv_from_amax`."""
    if amax.dtype != torch.float32 or format.dtype not in TYPES:
        return reference.scale_inv_from_amax(amax, format, margin, power_of_two)
    amax = amax.contiguous()
    scale_inv = torch.empty_like(amax)
    native().scale_inv(amax.data_ptr(), scale_inv.data_ptr(), amax.numel(), TYPES[format.dtype], margin, power_of_two)
    return scale_inv


def quantize(x: Tensor, scale_inv: Tensor, format: Format, block: Block, noise: Noise | None = None) -> Tensor:
    """See :func:`.reference.quantize`."""
    if not _has_fast_path(x, format.dtype):
        return reference.quantize(x, scale_inv, format, block, noise)
    payload = torch.empty(x.shape, dtype=format.dtype)
    quantize_into(payload, x, scale_inv, block, noise)
    return payload


def quantize_amax(x: Tensor, scale_inv: Tensor, format: Format, block: Block) -> tuple[Tensor, Tensor]:
    """See :func:`.reference.quantize_amax`; reads ``x`` once."""
    if not _has_fast_path(x, format.dtype):
        return reference.quantize_amax(x, scale_inv, format, block)
    payload = torch.empty(x.shape, dtype=format.dtype)
    largest = torch.empty(grid_shape(x.shape, block), dtype=torch.float32)
    quantize_into(payload, x, scale_inv, block, None, largest)
    return payload, largest


def quantize_into(
    payload: Tensor,
    x: Tensor,
    scale_inv: Tensor,
    block: Block,
    noise: Noise | None = None,
    largest: Tensor | None = None,
) -> None:
    """:func:`quantize` FP32, BF16 or FP16 into memory at hand; ``largest``, without noise, takes the amaxes."""
    library, x, scale_inv = native(), x.contiguous(), checked_scales(scale_inv, x.shape, block)
    library.quantize(
        *(x.data_ptr(), TYPES[x.dtype], scale_inv.data_ptr(), payload.data_ptr(), TYPES[payload.dtype]),
        *(None if largest is None else largest.data_ptr(), _address(_noise(noise))),
        *(*_geometry(x.shape, block), library.simd, threads()),
    )


def quantize_current(
    x: Tensor, format: Format, block: Block, margin: int = 0, power_of_two: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`.reference.quantize_current`; reads ``x`` once where a block is a run of at most 4096 elements."""
    if not _has_fast_path(x, format.dtype):
        return reference.quantize_current(x, format, block, margin, power_of_two)
    payload = torch.empty(x.shape, dtype=format.dtype)
    scale_inv = torch.empty(grid_shape(x.shape, block), dtype=torch.float32)
    return payload, scale_inv, _quantize_current(payload, scale_inv, block, None, x, format, margin, power_of_two)


def quantize_both(
    x: Tensor, format: Format, block: Block, margin: int = 0, power_of_two: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`.reference.quantize_both`; two passes and a transposed copy between them."""
    payload, scale_inv, _ = quantize_current(x, format, block, margin, power_of_two)
    crossed, crossed_scale_inv, _ = quantize_current(x.t().contiguous(), format, block, margin, power_of_two)
    return payload, scale_inv, crossed, crossed_scale_inv


def store_(target: Operand, value: Tensor) -> None:
    """See :func:`.reference.store_`; writes in place."""
    contiguous = target.payload.is_contiguous() and target.scale_inv.is_contiguous()
    if not _has_fast_path(value, target.payload.dtype) or not contiguous:
        return reference.store_(target, value)
    checked_scales(target.scale_inv, value.shape, target.block)
    format = format_of(target.payload.dtype)
    _quantize_current(target.payload, target.scale_inv, target.block, target.noise, value, format, 0, True)
    return None


def _quantize_current(
    payload: Tensor,
    scale_inv: Tensor,
    block: Block,
    noise: Noise | None,
    x: Tensor,
    format: Format,
    margin: int,
    power_of_two: bool,
) -> Tensor:
    library, x = native(), x.contiguous()
    largest = torch.empty_like(scale_inv)
    library.quantize_current(
        *(x.data_ptr(), TYPES[x.dtype], scale_inv.data_ptr(), payload.data_ptr(), TYPES[format.dtype]),
        *(largest.data_ptr(), _address(_noise(noise)), margin, power_of_two),
        *(*_geometry(x.shape, block), library.simd, threads()),
    )
    return largest


def dequantize(payload: Tensor, scale_inv: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """See :func:`.reference.dequantize`."""
    if payload.numel() == 0 or dtype not in REAL_DTYPES or payload.dtype not in TYPES:
        return reference.dequantize(payload, scale_inv, block, dtype)
    real = torch.empty(payload.shape, dtype=dtype)
    dequantize_into(real, payload, scale_inv, block)
    return real


def dequantize_into(real: Tensor, payload: Tensor, scale_inv: Tensor, block: Block) -> None:
    """:func:`dequantize` into memory at hand, to its dtype: FP32, BF16 or FP16."""
    library, payload, scale_inv = native(), payload.contiguous(), checked_scales(scale_inv, payload.shape, block)
    library.dequantize(
        *(payload.data_ptr(), TYPES[payload.dtype], scale_inv.data_ptr(), real.data_ptr(), TYPES[real.dtype]),
        *(*_geometry(payload.shape, block), library.simd, threads()),
    )


def _address(noise: _Noise | None) -> ctypes.c_void_p | None:
    return None if noise is None else ctypes.cast(ctypes.pointer(noise), ctypes.c_void_p)


def threads() -> int:
    return torch.get_num_threads()


# --- products -------------------------------------------------------------------------------------------------------


def scaled_matmul(a: Operand, b: Operand, layout: str, dtype: torch.dtype) -> Tensor:
    """See :func:`.reference.scaled_matmul`; multiplies in BF16 with FP32 accumulation where that loses nothing.

    An 8-bit value has at most 4 significant bits and a power of two none, so payload * scale_inv is exact in BF16 (down
    to 2^-133, the end of BF16). Operands of any other kind, and a product that is to be returned in another dtype than
    BF16, which is what torch on CPU rounds a product of BF16 operands to, are multiplied in FP32.
    """
    exact = dtype == torch.bfloat16 and _multiplies_bf16() and _exact_in_bf16(a) and _exact_in_bf16(b)
    read_as = torch.bfloat16 if exact else torch.float32
    left, right = _read(a, read_as), _read(b, read_as)
    return (reference.transposed(left, layout[0]) @ reference.transposed(right, layout[1])).to(dtype)


def _read(operand: Operand, dtype: torch.dtype) -> Tensor:
    """The real values; the payload itself where it holds them already, as O0's operands do."""
    if operand.payload.dtype == dtype and operand.scale_inv.numel() == 1 and float(operand.scale_inv) == 1.0:
        return operand.payload
    return dequantize(operand.payload, operand.scale_inv, operand.block, dtype)


def _exact_in_bf16(operand: Operand) -> bool:
    scale_inv = operand.scale_inv.contiguous()
    return operand.payload.dtype in (*FP8_DTYPES, torch.bfloat16) and bool(
        native().powers_of_two(scale_inv.data_ptr(), scale_inv.numel())
    )


@functools.cache
def _multiplies_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
