"""Prints the PTX of grouped products and attention for ``sys.argv[1]``, a compute capability; needs no device."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from msamp_like.kernels import triton_attention, triton_grouped

_PRODUCTS = {"a": "*u8", "a_scale_inv": "*fp32", "b": "*u8", "b_scale_inv": "*fp32", "out": "*bf16", "offsets": "*i32"}
_TILES = {"ROWS": 64, "COLUMNS": 64, "INNER": 64, "A_FORMAT": "e5m2", "B_FORMAT": "e4m3", "WIDE": False}
_STORED = dict.fromkeys("qkvg", "*u8") | {f"{name}_scales": "*fp32" for name in "qkvg"}
_GRADS = {"grad_query": "*bf16", "grad_key": "*bf16", "grad_value": "*bf16"}
_SUMS = {"log_sum": "*fp32", "delta": "*fp32", "scale": "fp32", "out": "*bf16"}
_ATTENTION = {"CAUSAL": True, "Q_STEP": 1, "K_STEP": 1, "V_STEP": 1, "WIDE": False, "DIM": 64, "TILE": 64}
_BACKWARD = {**_ATTENTION, "G_STEP": 1, "G_FORMAT": "e4m3", "S_FORMAT": "e4m3"}


def kernels(units: bool) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Each kernel with its pointers and constants; with FP8 ``units`` scales are shared, as those ask for."""
    shared = {"SHARED_A": units, "SHARED_B": units, "UNITS": units, **_TILES}
    types = _STORED | _GRADS | _SUMS
    return [
        (triton_grouped._rows_kernel, _PRODUCTS, {**shared, "TRANSPOSED": True}),
        (triton_grouped._rows_kernel, _PRODUCTS, {**shared, "TRANSPOSED": False}),
        (triton_grouped._experts_kernel, _PRODUCTS, shared),
        (triton_attention._forward_kernel, types, {**_ATTENTION, "UNITS": units}),
        (triton_attention._keys_kernel, types, {**_BACKWARD, "UNITS": units}),
        (triton_attention._queries_kernel, types, {**_BACKWARD, "UNITS": units}),
    ]


def ptx(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> str:
    kinds = types | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


if __name__ == "__main__":
    target = int(sys.argv[1])
    print(*(ptx(*kernel, target) for units in {False, target >= 89} for kernel in kernels(units)))
