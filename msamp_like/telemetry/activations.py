"""What a forward pass keeps for backward, measured on the tensors that it keeps."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from msamp_like.nn.functional import LinearGemm
from msamp_like.tensor import ScalingTensor


class KeptBytes:
    """Counts, while it is entered, the bytes of all storages that autograd keeps, each once; ``total`` and ``by_kind``
    say what was found. The model's parameters, buffers and compute copies are no activations and not counted.

    It is a saved-tensors hook: what activation checkpointing will compute again is not counted, what it keeps is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kinds: dict[str, int] = {}
        self._storages: dict[int, Tensor] = {}  # while counting the tensors live on, so that no address is used twice
        self._hooks: Any = None

    def __enter__(self) -> KeptBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        of_the_model = self._storages_of_the_model()
        for place, tensor in self._storages.items():
            if place not in of_the_model:
                name = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
                self._kinds[name] = self._kinds.get(name, 0) + tensor.untyped_storage().nbytes()
        self._hooks, self._storages = None, {}

    def _pack(self, tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor:
            self._storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    def by_kind(self) -> dict[str, int]:
        """Bytes by dtype and shape of the tensor that a storage was first kept for, the largest first."""
        return dict(sorted(self._kinds.items(), key=lambda item: -item[1]))

    @property
    def total(self) -> int:
        """Bytes of all."""
        return sum(self._kinds.values())

    def _storages_of_the_model(self) -> set[int]:
        tensors: list[Tensor] = [*self.model.buffers()]
        for parameter in self.model.parameters():
            if isinstance(parameter, ScalingTensor):
                tensors += [parameter.payload, parameter.scale_inv]
                if isinstance(parameter.gemm, LinearGemm):
                    tensors += parameter.gemm.weight_operand(parameter)[:2]
            else:
                tensors.append(parameter)
        return {t.untyped_storage().data_ptr() for t in tensors}
