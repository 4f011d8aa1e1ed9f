"""Prints the PTX of the main kernels for ``sys.argv[1]``, a compute capability such as 90; needs no device.

``sys.argv[2]`` is "exact" (casts and products), "steps" (of the optimizers) or "fused" (norms, activations, softmax).

A process of its own, because the compiler takes a device where it finds one.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from msamp_like.kernels import (
    triton_both,
    triton_casts,
    triton_fused,
    triton_products,
    triton_softmax,
    triton_steps,
    triton_sums,
)
from msamp_like.kernels.triton_table import CHOICE, Combination

_TILE = {"PADDED": 128, "ELEMENTS": 128, "GROUP": 16, "TILES": 1}
_CURRENT = {"X_FORMAT": "bf16", "SCALED": True, "FORMAT": "e4m3", "MARGIN": 0, "POWER_OF_TWO": False}
_NOISY = {"X_FORMAT": "fp32", "FORMAT": "fp16", "NOISY": True, "LOWER_HALF": True, "WITH_AMAX": True, "SINGLE": True}
_DEQUANTIZE = {"FORMAT": "e4m3", "X_FORMAT": "bf16", "SINGLE": False}
_SCALES = {"scale_inv": "*fp32", "amax": "*i32"}
_SOURCE = {"x_scale_inv": "*fp32"}
_SUM = {"FORMAT": "bf16", "ELEMENTS": 4096}
_SUM_POINTERS = {"total": "*i16", "total_scale_inv": "*fp32", "addend": "*i16", "addend_scale_inv": "*fp32"}
_BOTH = {"X_FORMAT": "bf16", "FORMAT": "e4m3", "MARGIN": 0, "POWER_OF_TWO": True, "RUN": 32, "SQUARE": 128}
_BOTH_POINTERS = {"x": "*i16", "payload": "*u8", "scale_inv": "*fp32", "crossed": "*u8", "crossed_scale_inv": "*fp32"}
_PRODUCT = {"A_FORMAT": "e5m2", "B_FORMAT": "e4m3", "FORMAT": "bf16", "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}
_PRODUCT_POINTERS = {"a": "*u8", "a_scale_inv": "*fp32", "b": "*u8", "b_scale_inv": "*fp32", "product": "*i16"}
_KERNELS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (triton_casts._quantize_current_kernel, {"x": "*i16", "payload": "*u8", **_SCALES, **_SOURCE}, _CURRENT | _TILE),
    (triton_casts._quantize_kernel, {"x": "*i32", "payload": "*i16", **_SCALES}, _NOISY | _TILE),
    (triton_casts._dequantize_kernel, {"payload": "*u8", "scale_inv": "*fp32", "x": "*i16"}, _DEQUANTIZE | _TILE),
    (triton_both._both_kernel, _BOTH_POINTERS, _BOTH),
    (triton_sums._accumulate_kernel, {**_SUM_POINTERS, "amax": "*i32"}, {**_SUM, "ADDEND_FORMAT": "bf16"}),
    (triton_sums._settle_kernel, {**_SUM_POINTERS, "amax": "*i32"}, _SUM),
    (triton_products._product_kernel, _PRODUCT_POINTERS, _PRODUCT),
]
_ROW = {"GROUPS": 8, "BLOCK": 128}
_KEPT = {"KEPT_FORMAT": "e4m3", **_ROW}
_OUT = {"OUT_FORMAT": "e4m3", "HOW": "groups"}
_NORM = {"CENTERED": True, "WEIGHTED": True, "X_FORMAT": "bf16", "BIASED": True, **_OUT, **_KEPT}
_NORM_BACKWARD = {"CENTERED": True, "WEIGHTED": True, "GRAD_FORMAT": "bf16", "OUT_FORMAT": "bf16", **_KEPT}
_GATED = {"KIND": "silu", "GATED": True, "GATE_FORMAT": "bf16", "VALUE_FORMAT": "bf16", **_OUT, **_KEPT}
_GELU = {"KIND": "gelu", "GATED": False, "GRAD_FORMAT": "bf16", **_OUT, **_KEPT}
_WRITTEN = {"payload": "*u8", **_SCALES, "kept": "*u8", "kept_scale_inv": "*fp32"}
_VECTORS = {"weight": "*fp32", "bias": "*fp32", "inverse": "*fp32"}
_FUSED: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (triton_fused._norm_kernel, {"x": "*i16", **_VECTORS, **_WRITTEN}, _NORM),
    (
        triton_fused._norm_backward_kernel,
        {"grad": "*i16", **_VECTORS, **_WRITTEN, "grad_input": "*i16", "grad_weight": "*fp32", "grad_bias": "*fp32"},
        _NORM_BACKWARD,
    ),
    (
        triton_fused._activation_kernel,
        {
            "gate": "*i16",
            "value": "*i16",
            "kept_gate": "*u8",
            "gate_scale_inv": "*fp32",
            **_WRITTEN,
            "kept_value": "*u8",
            "value_scale_inv": "*fp32",
        },
        _GATED,
    ),
    (
        triton_fused._activation_backward_kernel,
        {
            "grad": "*i16",
            "kept_gate": "*u8",
            "gate_scale_inv": "*fp32",
            "kept_value": "*u8",
            "value_scale_inv": "*fp32",
            "grad_gate": "*u8",
            "grad_value": "*u8",
            "grad_value_amax": "*i32",
            "grad_value_scale_inv": "*fp32",
            **_SCALES,
        },
        _GELU,
    ),
    (
        triton_softmax._softmax_kernel,
        {"logits": "*i32", "sums": "*fp32", **_WRITTEN},
        {"X_FORMAT": "fp32", **_KEPT},
    ),
    (
        triton_softmax._softmax_backward_kernel,
        {**_WRITTEN, "targets": "*i64", "grad": "*fp32", "result": "*i32"},
        {"OUT_FORMAT": "fp32", **_KEPT},
    ),
]
_O2 = Combination(
    PARAM="fp16", PARAM_MODE="blocks", PARAM_NOISY=True, PARAM_LOWER_HALF=False,
    FIRST="e4m3", FIRST_MODE="blocks", FIRST_NOISY=False, FIRST_LOWER_HALF=False,
    SECOND="fp16", SECOND_MODE="blocks", SECOND_NOISY=True, SECOND_LOWER_HALF=True,
    GRAD="e4m3", GRAD_MODE="none", COPY="e4m3", SPLIT=False, SHARED=True, EVEN=True, BLOCK=128,
)  # fmt: skip
_LEAN = _O2._replace(PARAM="e4m3", PARAM_MODE="none", SECOND="ue5m3", COPY="none", SPLIT=True)
_TABLES = {"addresses": "*i64", "numbers": "*i32", "found": "*i32", "programs": "*i32", "bad": "*fp32"}


def _step(kernel: Any, combination: Combination, **given: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    constants = {**combination._asdict(), "KIND": "adam", "DECAY": "decoupled", "MEASURES": False, "CONVERTS": False}
    constants |= {"TILES": CHOICE.tiles, "GROUP": combination.group(CHOICE), **given}
    return kernel, _TABLES, {name: value for name, value in constants.items() if name in kernel.arg_names}


_STEPS = [
    _step(triton_steps.step_kernel, _O2),
    _step(triton_steps.step_kernel, _LEAN),
    _step(triton_steps.settle_kernel, _O2),
    _step(triton_steps.settle_kernel, _LEAN),
]
_FLOATS = ("keep", "weight_decay", "beta1", "rest1", "beta2", "rest2")
_SETS = {"exact": _KERNELS, "steps": _STEPS, "fused": _FUSED}


def ptx(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int) -> str:
    """PTX of ``kernel`` with the launch options that the twins use."""
    if "UNITS" in kernel.arg_names:
        constants = constants | {"UNITS": capability >= 89}
    kinds = pointers | dict.fromkeys(_FLOATS, "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


if __name__ == "__main__":
    print(*(ptx(*kernel, int(sys.argv[1])) for kernel in _SETS[sys.argv[2]]))
