"""What a process group is asked to do, seen from below: the c10d operations that reach the dispatcher."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Call(NamedTuple):
    """One collective: its c10d name without underscores, the dtype and bytes of the buffer this rank hands over."""

    name: str
    dtype: torch.dtype
    input_bytes: int
    sent: int


class Spy(TorchDispatchMode):
    """Records every collective that this thread issues, backward's hooks included."""

    def __init__(self, world: int, rank: int) -> None:
        super().__init__()
        self.world, self.rank = world, rank
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append(self._seen(func.__name__.split(".")[0].strip("_"), args))
        return func(*args, **(kwargs or {}))

    def _seen(self, name: str, args: Any) -> Call:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        handed = tensors[-1]  # all-to-all and all-gather take (output, input); an all-reduce has one
        if name == "alltoall_base":
            splits = [s for s in args if isinstance(s, (list, tuple)) and s and isinstance(s[0], int)]
            own = splits[-1][self.rank] / max(1, sum(splits[-1])) if splits else 1 / self.world
            sent = round(handed.nbytes * (1 - own))
        elif name == "allgather_base":
            sent = handed.nbytes * (self.world - 1)
        elif name == "allreduce":
            sent = math.ceil(2 * (self.world - 1) * handed.nbytes / self.world)
        else:
            raise AssertionError(f"no data-parallel step should issue c10d::{name}")
        return Call(name, handed.dtype, handed.nbytes, sent)

    @property
    def names(self) -> list[str]:
        return [call.name for call in self.calls]

    @property
    def sent(self) -> int:
        return sum(call.sent for call in self.calls)
