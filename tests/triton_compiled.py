"""Prints the PTX of the main kernels for ``sys.argv[1]``, a compute capability such as 90; needs no device.

A process of its own, because the compiler takes a device where it finds one.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from msamp_like.kernels import triton_adam, triton_both, triton_casts, triton_products

_TILE = {"PADDED": 128, "ELEMENTS": 128, "GROUP": 16, "TILES": 1}
_CURRENT = {"X_FORMAT": "bf16", "FORMAT": "e4m3", "MARGIN": 0, "POWER_OF_TWO": False}
_NOISY = {"X_FORMAT": "fp32", "FORMAT": "fp16", "NOISY": True, "LOWER_HALF": True, "WITH_AMAX": True, "SINGLE": True}
_DEQUANTIZE = {"FORMAT": "e4m3", "X_FORMAT": "bf16", "SINGLE": False}
_STORED = {"PARAM": "fp16", "FIRST": "e4m3", "SECOND": "fp16", "GRAD": "e4m3"}
_ADAM = {
    **_STORED,
    **{f"{name}_BLOCKED": name != "GRAD" for name in _STORED},
    **{f"{name}_NOISY": name != "FIRST" for name in ("PARAM", "FIRST", "SECOND")},
    **{f"{name}_LOWER_HALF": name == "SECOND" for name in ("PARAM", "FIRST", "SECOND")},
    "DECAY": "decoupled",
}
_SCALES = {"scale_inv": "*fp32", "amax": "*i32"}
_STATES = {f"{name}_scale_inv": "*fp32" for name in ("param", "grad", "first", "second")}
_BOTH = {"X_FORMAT": "bf16", "FORMAT": "e4m3", "MARGIN": 0, "POWER_OF_TWO": True, "RUN": 32, "SQUARE": 128}
_BOTH_POINTERS = {"x": "*i16", "payload": "*u8", "scale_inv": "*fp32", "crossed": "*u8", "crossed_scale_inv": "*fp32"}
_PRODUCT = {"A_FORMAT": "e5m2", "B_FORMAT": "e4m3", "FORMAT": "bf16", "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}
_PRODUCT_POINTERS = {"a": "*u8", "a_scale_inv": "*fp32", "b": "*u8", "b_scale_inv": "*fp32", "product": "*i16"}
_KERNELS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (triton_casts._quantize_current_kernel, {"x": "*i16", "payload": "*u8", **_SCALES}, _CURRENT | _TILE),
    (triton_casts._quantize_kernel, {"x": "*i32", "payload": "*i16", **_SCALES}, _NOISY | _TILE),
    (triton_casts._dequantize_kernel, {"payload": "*u8", "scale_inv": "*fp32", "x": "*i16"}, _DEQUANTIZE | _TILE),
    (
        triton_adam._adam_kernel,
        {"param": "*i16", "grad": "*u8", "first": "*u8", "second": "*i16", "flags": "*i32", **_STATES},
        _ADAM | _TILE,
    ),
    (triton_both._both_kernel, _BOTH_POINTERS, _BOTH),
    (triton_products._product_kernel, _PRODUCT_POINTERS, _PRODUCT),
]
_FLOATS = ("keep", "weight_decay", "beta1", "rest1", "beta2", "rest2", "rate", "eps")


def ptx(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int) -> str:
    """PTX of ``kernel`` with the launch options that the twins use."""
    if kernel is triton_products._product_kernel:
        constants = constants | {"UNITS": capability >= 89}
    kinds = pointers | dict.fromkeys(_FLOATS, "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


if __name__ == "__main__":
    print(*(ptx(*kernel, int(sys.argv[1])) for kernel in _KERNELS))
