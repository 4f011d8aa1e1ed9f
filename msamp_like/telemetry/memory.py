"""What training state occupies, measured on the tensors that hold it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from msamp_like.policy import Role
from msamp_like.tensor import ScalingTensor


def state_bytes(
    model: nn.Module,
    states: Iterable[tuple[Tensor, Mapping[str, object]]],
    roles: Mapping[str, Role],
    held: Role,
    sides: Mapping[int, Sequence[Tensor]] | None = None,
) -> dict[str, int]:
    """Bytes by role of the converted matrices, scales included, and of everything else as ``plain``.

    ``states`` are (parameter, its optimizer states), ``roles`` the role of each state's name, ``held`` the role of
    what a parameter holds. A weight's cached compute copy counts as ``weight``. ``matrix_parameters`` and
    ``plain_parameters`` are the element counts to divide by.

    ``sides`` is given where matrices are stepped on the host: by a parameter's ``id``, the host's buffers of its weight
    and its gradient. These and the matrices' states count under ``host_`` and their role.
    """
    found = dict.fromkeys((role.value for role in _COUNTED), 0)
    on_host = "host_" if sides is not None else ""
    if sides is not None:
        found.update((f"host_{role.value}", 0) for role in _COUNTED)
    found.update(plain=0, matrix_parameters=0, plain_parameters=0)
    for parameter in model.parameters():
        matrix = isinstance(parameter, ScalingTensor)
        found["matrix_parameters" if matrix else "plain_parameters"] += parameter.numel()
        found[held.value if matrix else "plain"] += _bytes(parameter)
        if parameter.grad is not None:
            found[Role.GRAD_WEIGHT.value if matrix else "plain"] += _bytes(parameter.grad)
        if isinstance(parameter, ScalingTensor):
            found[Role.WEIGHT.value] += parameter.cast_bytes
        for role, buffer in zip(_BUFFERED, (sides or {}).get(id(parameter), ()), strict=False):
            found[on_host + role.value] += _bytes(buffer)
    for owner, state in states:
        for name, value in state.items():
            if isinstance(value, Tensor):
                role = roles.get(name, Role.MASTER_WEIGHT)
                found[on_host + role.value if isinstance(owner, ScalingTensor) else "plain"] += _bytes(value)
    return found


_COUNTED = (Role.WEIGHT, Role.GRAD_WEIGHT, Role.MASTER_WEIGHT, Role.FIRST_MOMENT, Role.SECOND_MOMENT)
_BUFFERED = (Role.WEIGHT, Role.GRAD_WEIGHT)


def _bytes(tensor: Tensor) -> int:
    if isinstance(tensor, ScalingTensor):
        return tensor.stored_bytes
    return tensor.numel() * torch.empty((), dtype=tensor.dtype).element_size()
