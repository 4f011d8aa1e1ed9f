"""Accuracy of Fp8Linear against FP32, N(0, 1), 1024 cubed, in dB of SQNR: output, grad_input, grad_weight as stored.

    python -m benchmarks.products

Whole-tensor scaling as the levels have it, then blocks of (1, 128). Floors: an E4M3 cast of N(0, 1) keeps 31.5 dB, an
E5M2 cast 25.5; a product adds the noise of its two operands, and the gradient's own rounding comes on top.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.result import parser, write
from msamp_like import amp
from msamp_like.policy import GEMM_ROLES, O2, Policy, Role
from msamp_like.tensor import real

TARGETS = {"output": 28.0, "grad_input": 24.0, "grad_weight": 23.5}


def sqnr_db(exact: Tensor, measured: Tensor) -> float:
    """Signal over error, in dB."""
    exact, measured = exact.double(), measured.double()
    return float(10 * torch.log10(exact.square().sum() / (exact - measured).square().sum()))


def measure(policy: Policy, size: int = 1024, seed: int = 0) -> dict[str, float]:
    """One forward and backward of a converted layer beside FP32's."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, grad_output = (torch.randn(size, size, generator=generator) for _ in range(3))
    layer = nn.Sequential(nn.Linear(size, size, bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(weight)
    layer, _ = amp.initialize(layer, None, level=policy, data_parallel=False)
    x_fp8 = x.clone().requires_grad_()
    output = layer(x_fp8)
    output.backward(grad_output)
    exact = {"output": x @ weight.t(), "grad_input": grad_output @ weight, "grad_weight": grad_output.t() @ x}
    found = {"output": output, "grad_input": x_fp8.grad, "grad_weight": real(layer[0].weight.grad)}
    return {name: round(sqnr_db(exact[name], found[name].detach()), 3) for name in TARGETS}


def main() -> None:
    arguments = parser(__doc__, "docs/results/products.json").parse_args()
    blocks = {role: replace(O2[role], block=(1, 128), history=0) for role in (*GEMM_ROLES, Role.GRAD_WEIGHT)}
    policies = {"whole tensor": O2, "blocks of (1, 128)": replace(O2, rules={**O2.rules, **blocks})}
    rows = {name: measure(policy) for name, policy in policies.items()}
    control = measure(O2.with_rule(Role.INPUT, "e5m2"))
    passed = all(rows["whole tensor"][name] >= floor for name, floor in TARGETS.items())
    for name, row in {**rows, "control: E5M2 input": control}.items():
        print(f"{name:<22}" + "  ".join(f"{key} {value:6.2f} dB" for key, value in row.items()))
    figures = {"sqnr_db": rows, "control_e5m2_input_db": control, "targets_db": TARGETS, "reached": passed}
    write(arguments.out, {**figures, "control_fails": control["output"] < TARGETS["output"]})


if __name__ == "__main__":
    main()
