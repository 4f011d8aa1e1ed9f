"""The two collectives of PyTorch's FSDP2 with our tensors, in the form that it takes custom ones; see :mod:`.fsdp2`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from msamp_like.comm.collectives import finish
from msamp_like.comm.flat import Stretch, reduce_scatter_flat
from msamp_like.comm.group import CountedGroup
from msamp_like.integrations.fsdp2_optimizer import local_of
from msamp_like.policy import Rule
from msamp_like.tensor import ScalingTensor

logger = logging.getLogger(__name__)


def communicate(model: nn.Module, rule: Rule | None, group: CountedGroup) -> None:
    """Have every group of parameters gather through ``group``, and reduce as the rule says, if it has scales."""
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            label = f"fsdp/{name or 'root'}"
            # torch names base classes for the two, which are not public
            module.set_custom_all_gather(CountedAllGather(group, f"{label}/gather"))  # type: ignore[arg-type]
            if rule is not None and rule.format.scaled:
                scatter = QuantizedReduceScatter(_managed(module), rule, group, label)
                module.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]


class Communication:
    """What torch asks of a custom collective, on a group that counts; ``counted`` may be shared by many."""

    def __init__(self, counted: CountedGroup, label: str) -> None:
        self.counted = counted
        self.label = label

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def on(self, group: dist.ProcessGroup) -> CountedGroup:
        if self.counted.group is not group:  # torch was told to use another for one of the two
            self.counted = CountedGroup(group, self.counted.axis)
        return self.counted


class CountedAllGather(Communication):
    """torch's all-gather of one group of parameters, counted, and named where it fails."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """``output_tensor`` becomes all ranks' ``input_tensor``; the work to wait for, if asked for."""
        _, pending = self.on(group).all_gather(input_tensor, label=self.label, out=output_tensor)
        if async_op:
            return pending.work
        pending.wait()
        return None


class QuantizedReduceScatter(Communication):
    """torch's reduce-scatter of one group of parameters, with the matrices' gradients in the rule's format.

    ``parameters`` are the group's in torch's order: modules children first, each module's own as it names them. Where
    some got no gradient in a backward, torch leaves them out without saying which, and the group travels plain then.
    """

    def __init__(self, parameters: Sequence[DTensor], rule: Rule, counted: CountedGroup, label: str) -> None:
        super().__init__(counted, label)
        self.parameters = tuple(parameters)
        self.rule = rule
        self._warned = False

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """``output_tensor`` becomes this rank's part of the mean (or sum, as ``op`` says) of ``input_tensor``."""
        if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            raise ValueError(
                f"gradients are reduced as a mean or a sum, got {op}; leave the divide factor alone and scale the loss"
            )
        counted = self.on(group)
        rows = input_tensor.view(counted.world, -1)
        total = finish(
            reduce_scatter_flat(rows, self._stretches(rows.shape[1], rows.shape[0]), self.rule, counted, self.label)
        )
        output_tensor.copy_(total.div_(counted.world) if op == dist.ReduceOp.AVG else total)

    @torch.no_grad()
    def _stretches(self, row: int, world: int) -> list[Stretch]:
        stretches = [
            Stretch(numel=-(-p.shape[0] // world) * p.shape[1:].numel(), scaled=isinstance(local_of(p), ScalingTensor))
            for p in self.parameters
            if p.requires_grad
        ]
        if sum(s.numel for s in stretches) == row:
            return stretches
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s: not all of its %d parameters got a gradient, so the others travel plain: FSDP2 does not say which",
                self.label,
                len(stretches),
            )
        return [Stretch(numel=row, scaled=False)]


def _managed(module: Any) -> list[DTensor]:
    """The parameters that ``fully_shard(module)`` made one group, in its order."""
    found: dict[int, DTensor] = {}

    def visit(part: nn.Module) -> None:
        for child in part.children():
            if not isinstance(child, FSDPModule):
                visit(child)
        for parameter in part.parameters(recurse=False):
            if isinstance(parameter, DTensor):
                found.setdefault(id(parameter), parameter)

    visit(module)
    return list(found.values())
