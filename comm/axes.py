"""The ranks that train one model, by mesh axis, and the decisions that all of them take together.

    dp    data parallel: every rank has its own samples
    tp    tensor parallel: every rank has its own slice of the weights (and, in sequence parallelism, of the sequence)
    pp    pipeline parallel: every rank has its own layers

An axis that a mesh does not have is None here, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from msamp_like.comm.group import CountedGroup

if TYPE_CHECKING:  # its import takes longer than the whole of ours
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("dp", "tp", "pp")


class Axes:
    """One :class:`.CountedGroup` an axis; ``data``, ``tensor`` and ``pipeline`` are None where there is one rank."""

    def __init__(
        self,
        data: CountedGroup | None = None,
        tensor: CountedGroup | None = None,
        pipeline: CountedGroup | None = None,
    ) -> None:
        self.data = data
        self.tensor = tensor
        self.pipeline = pipeline

    @classmethod
    def of_group(cls, group: dist.ProcessGroup | None = None) -> Axes:
        """One data-parallel axis over ``group``, or over the world."""
        return cls(data=_several(CountedGroup(group, "dp")))

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh) -> Axes:
        """The axes of a mesh by their names. Raises ValueError for other names and for a mesh that is not the world."""
        names = mesh.mesh_dim_names or ()
        unknown = [name for name in names if name not in AXES]
        if not names or unknown:
            raise ValueError(
                f"the axes of a mesh are named {', '.join(AXES)}, got {tuple(names) or 'no names'}; build it with "
                'init_device_mesh(device, (2, 2), mesh_dim_names=("dp", "tp"))'
            )
        if mesh.size() != dist.get_world_size():
            shape = " x ".join(f"{name} {size}" for name, size in zip(names, mesh.shape, strict=True))
            raise ValueError(
                f"the axes of a mesh must multiply to the world of {dist.get_world_size()} ranks, got {shape} = "
                f"{mesh.size()}; add an axis, or start {mesh.size()} ranks"
            )
        data, tensor, pipeline = (
            _several(CountedGroup(mesh.get_group(name), name)) if name in names else None for name in AXES
        )
        return cls(data, tensor, pipeline)

    @property
    def groups(self) -> list[CountedGroup]:
        """The axes of more than one rank."""
        return [group for group in (self.data, self.tensor, self.pipeline) if group is not None]

    def __str__(self) -> str:
        return " x ".join(map(str, self.groups)) or "one rank"

    def end_step(self) -> None:
        """The ledgers show this step until the next collective."""
        for group in self.groups:
            group.end_step()

    def reduce_max(self, tensor: Tensor) -> None:
        """FP32 ``tensor`` becomes the maximum over the ranks that have the same layers, in place; no NaN may be in it
        (gloo's MAX loses them): the amaxes of a step."""
        for group in (self.data, self.tensor):
            if group is not None:
                group.all_reduce(tensor, dist.ReduceOp.MAX, "scalers").wait()

    def agree_max(self, flag: Tensor) -> None:
        """``flag`` becomes the maximum over all ranks, in place: whether a gradient is not finite anywhere."""
        for group in self.groups:
            group.all_reduce(flag, dist.ReduceOp.MAX, "skip").wait()


class Norms:
    """Joins the powers of gradient norms, one a parameter, over the ranks that have the others or the other parts.

    ``owned`` says of each parameter whether its gradient is with its owner alone (ZeRO), ``sharded`` whether each
    tensor-parallel rank has a part of it. A norm of which one rank has all takes part unchanged, so the sum over
    parameters, always in the order of their names, has the same bits sharded or not.
    """

    def __init__(self, axes: Axes, *, owned: Sequence[bool], sharded: Sequence[bool]) -> None:
        self.axes = axes
        self._joined = [
            (group, torch.tensor(chosen, dtype=torch.bool))
            for group, chosen in ((axes.data, owned), (axes.tensor, sharded))
            if group is not None and any(chosen)
        ]

    def join(self, powers: Tensor, norm_type: float) -> Tensor:
        """FP32 (parameters,) of this rank to those of all that share the layers."""
        for group, chosen in self._joined:
            joined = powers.clone()
            group.all_reduce(joined, _joins(norm_type), "norm").wait()
            powers = torch.where(chosen.to(powers.device), joined, powers)
        return powers

    def total(self, total: Tensor, norm_type: float) -> Tensor:
        """The scalar over this rank's layers to that over all layers."""
        if self.axes.pipeline is not None:
            self.axes.pipeline.all_reduce(total, _joins(norm_type), "norm").wait()
        return total


def _joins(norm_type: float) -> Any:
    return dist.ReduceOp.MAX if norm_type == float("inf") else dist.ReduceOp.SUM


def _several(group: CountedGroup) -> CountedGroup | None:
    return group if group.world > 1 else None
