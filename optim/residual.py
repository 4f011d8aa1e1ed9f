"""Masters in two parts: the weight that products read is the upper half, what it leaves of the master the lower.

The optimizer keeps the lower half as the state ``master_weight``, int8, and the largest magnitude of the last write as
``weight_amax``, FP32 (1, 1), from which the next write takes its scale before it starts
(:mod:`msamp_like.kernels.reference_updates` says how).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from msamp_like import kernels
from msamp_like.formats import RESIDUAL, WHOLE
from msamp_like.kernels import Residual
from msamp_like.tensor import ScalingTensor, real

AMAX = "weight_amax"
ROOM = 1 + 2.0**-4
"""Above the largest 8-bit weight: half a step, by which its master may be larger."""


def split_(weight: ScalingTensor, value: Tensor) -> dict[str, Any]:
    """Make ``value`` the master: the weight is written, the states are returned."""
    value = value.detach().float().to(weight.device)
    payload, scale_inv, residual, amax = kernels.quantize_with_residual(
        value, kernels.amax(value, WHOLE), weight.format
    )
    weight.payload.copy_(payload)
    weight.scale_inv.copy_(scale_inv)
    weight.agreed = False
    weight.drop_casts()
    weight.recorded = True
    return {"master_weight": residual, AMAX: amax}


def lower_half(weight: ScalingTensor, state: Mapping[str, Any]) -> Residual:
    """The states as kernels take them, which are about to write both halves.

    Somebody else may have written the weight since the last step (``load_state_dict``, ``nn.init``, a copy from another
    model). Its residual stays, at most half a step of the weight; but its largest value is then no longer the one on
    record, and a scale made from that would saturate. So a weight that no step has left is looked at again.
    """
    residual = Residual(state["master_weight"], state[AMAX])
    if not weight.recorded:
        largest = kernels.amax(weight.dequantize(torch.bfloat16), WHOLE)
        residual.amax.copy_(torch.where(largest > residual.amax * ROOM, largest * ROOM, residual.amax))
    weight.agreed = False
    weight.drop_casts()
    return residual


def load(weight: ScalingTensor, saved: Mapping[str, Any]) -> dict[str, Any]:
    """States as saved, bit for bit; of a master that was saved in one part, both halves are made."""
    master = saved["master_weight"]
    if master.dtype != RESIDUAL.dtype:
        return split_(weight, real(master))
    weight.recorded = True
    return {name: saved[name].to(weight.device, copy=True) for name in ("master_weight", AMAX)}


def round_as_owner_(weight: Any, saved: Mapping[str, Any]) -> None:
    """Write a weight that another rank steps as that rank does when it loads ``saved``."""
    if "master_weight" in saved and saved["master_weight"].dtype != RESIDUAL.dtype:
        split_(weight, real(saved["master_weight"]))
