"""The optimizer of a model that PyTorch's FSDP2 shards: one of ours on this rank's rows; see :mod:`.fsdp2`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from msamp_like import kernels
from msamp_like.comm.group import CountedGroup
from msamp_like.formats import WHOLE
from msamp_like.nn.clip_grad import clip_grad_norm_
from msamp_like.optim import LowPrecisionOptimizer, check
from msamp_like.policy import Policy, Role
from msamp_like.scaling import Scaler, roll
from msamp_like.tensor import ScalingTensor, real


def check_rowwise(optimizer: torch.optim.Optimizer) -> type[LowPrecisionOptimizer]:
    """The class of ours that steps the shards; raises ValueError for one that needs whole matrices."""
    ours = check(optimizer)
    if ours.needs_whole_matrices:
        raise ValueError(
            f"sharded parameters are stepped row by row, got {ours.__name__}, which needs whole matrices; use AdamW "
            "here, or amp.initialize with ZeRO, whose owners have whole tensors"
        )
    return ours


class ShardedOptimizer(torch.optim.Optimizer):
    """One of our optimizers on this rank's shards; made by :func:`fully_shard` or :func:`attach`.

    Its groups hold the model's DTensors, and they are the very dicts of the optimizer it was made from, so a scheduler
    built on that one drives this one. ``inner`` steps the shards; a rank without a row of a parameter has none of it.
    ``group`` counts what the model's collectives send, torch's own reduction apart (``group.ledger``).
    Non-finite gradients skip the step on all ranks. After a step all shards of a weight are stored with one scale, from
    the largest amax of any (one FP32 a weight in a MAX all-reduce), so the gathered weight has the bits of an unsharded
    one. Stochastic rounding draws other noise on every rank.
    """

    def __init__(
        self,
        source: torch.optim.Optimizer,
        policy: Policy,
        mesh: DeviceMesh,
        *,
        names: Mapping[int, str],
        originals: Mapping[str, Tensor],
        scalers: Sequence[Scaler] = (),
        group: CountedGroup | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(source.param_groups, dict(source.defaults))
        self.mesh = mesh
        self.device = device_of(mesh)
        self.group = group or CountedGroup(mesh.get_group(), "fsdp")
        self._scalers = tuple(scalers)
        self._names = {id(p): names[id(p)] for g in self.param_groups for p in g["params"]}
        self._held: dict[int, Tensor] = {id(p): _alias(local_of(p)) for p in self._parameters()}
        ours: Any = check_rowwise(source)
        groups = [
            {**g, "params": [self._held[id(p)] for p in g["params"] if self._held[id(p)].numel()]}
            for g in self.param_groups
        ]
        self.inner: LowPrecisionOptimizer = ours(groups, policy=policy, seed=_seed_of_rank(seed, self.group.rank))
        self.inner.agree_max = lambda flag: self._all_reduce(flag, dist.ReduceOp.MAX, "fsdp/finite")
        for parameter in self._parameters():
            held = self._held[id(parameter)]
            if held.numel():
                original = originals.get(self._names[id(parameter)]) if isinstance(held, ScalingTensor) else None
                states = {key: _cut(value, parameter, self.group) for key, value in source.state[parameter].items()}
                self.inner.adopt(held, states, original)
        source.state.clear()
        self._source = source

    def _parameters(self) -> list[DTensor]:
        return [p for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def _bind(self) -> None:
        """Hold the shards where they are now: FSDP2 may have made new ones, and a scheduler new learning rates."""
        for parameter in self._parameters():
            held, local = self._held[id(parameter)], local_of(parameter)
            if isinstance(held, ScalingTensor) and isinstance(local, ScalingTensor):
                held.replace_(local)
            else:
                held.data = local
            held.grad = local_of(parameter.grad) if parameter.grad is not None and held.numel() else None
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in group.items() if key != "params"})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on all ranks or on none; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._bind()
        self.inner.step()
        masters = [self.inner.state.get(self._held[id(p)], {}).get("master_weight") for p in self._parameters()]
        agree_on_scales(list(zip(self._parameters(), masters, strict=True)), self.mesh, self.group)
        for held in self._held.values():
            held.grad = None
        self._source._opt_called = True  # type: ignore[attr-defined]  # a scheduler built on it asks whether a step came
        roll(self._scalers, lambda amax: self._all_reduce(amax, dist.ReduceOp.MAX, "fsdp/scalers"))
        return loss

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a gradient was not finite on some rank. Waits for the last step."""
        return self.inner.skipped_steps

    def _all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType, label: str) -> None:
        """``x`` becomes the reduction over the ranks, in place; it may lie in host memory, the collective does not."""
        there = x.to(self.device)
        self.group.all_reduce(there, op, label).wait()
        x.copy_(there)

    def master_of(self, name: str) -> Tensor | None:
        """This rank's rows of the master weight called ``name`` in the model; None where the parameter is its own."""
        held = [self._held[i] for i, known in self._names.items() if known == name]
        return self.inner.state[held[0]].get("master_weight") if held and held[0].numel() else None

    @torch.no_grad()
    def remaster(self, name: str, rows: Tensor) -> None:
        """Make the master weight called ``name`` anew, from this rank's FP32 rows."""
        for held in [self._held[i] for i, known in self._names.items() if known == name]:
            if held.numel() and "master_weight" in self.inner.state[held]:
                self.inner.state[held]["master_weight"] = self.inner.stored(held, rows, Role.MASTER_WEIGHT)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients so that their norm over all shards is at most ``max_norm``; returns the norm before."""
        self._bind()
        return clip_grad_norm_(self._held.values(), max_norm, norm_type, reduction=self)

    def join(self, powers: Tensor, norm_type: float) -> Tensor:
        """Each parameter's power of the norm, from the powers of its shards; see :class:`.NormReduction`."""
        op = dist.ReduceOp.MAX if norm_type == float("inf") else dist.ReduceOp.SUM
        self._all_reduce(powers, op, "fsdp/norm")
        return powers

    def total(self, total: Tensor, norm_type: float) -> Tensor:
        """Every rank has a shard of every layer: there is nothing to add."""
        return total

    def state_bytes(self) -> dict[str, int]:
        """Bytes of this rank's weights and states by role, of matrices that hold few bits; the rest is ``plain``."""
        found = dict.fromkeys(["plain", *(role.value for role in (Role.WEIGHT, *self._roles().values()))], 0)
        for parameter in self._parameters():
            held = self._held[id(parameter)]
            scaled = isinstance(held, ScalingTensor)
            found[Role.WEIGHT.value if scaled else "plain"] += _bytes(held)
            for name, value in self.inner.state.get(held, {}).items():
                if isinstance(value, Tensor):
                    found[self._roles()[name].value if scaled else "plain"] += _bytes(value)
        return found

    def _roles(self) -> dict[str, Role]:
        return {"master_weight": Role.MASTER_WEIGHT, **self.inner.roles}

    def state_dict(self) -> dict[str, Any]:
        """This rank's states; they load on the same rank of as many ranks."""
        self._bind()
        found = self.inner.state_dict()
        return {**found, "rank": self.group.rank, "world": self.group.world}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit; raises ValueError for the state of another rank or world."""
        self._bind()
        where = (self.group.rank, self.group.world)
        if (state_dict.get("rank"), state_dict.get("world")) != where:
            raise ValueError(
                f"a shard's state loads on its own rank of the same world, got rank {state_dict.get('rank')} of "
                f"{state_dict.get('world')} on rank {where[0]} of {where[1]}; between world sizes carry the weights "
                "over with full_state_dict and load_full_state_dict"
            )
        self.inner.load_state_dict(state_dict)
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({key: value for key, value in inner.items() if key != "params"})


@torch.no_grad()
def agree_on_scales(
    shards: Sequence[tuple[Tensor, Tensor | None]], mesh: DeviceMesh, group: CountedGroup | None = None
) -> None:
    """Store this rank's rows of every weight with one scale, that of the largest amax on any rank.

    ``shards`` are (sharded parameter, this rank's values), the same parameters on every rank; None stands for what is
    stored now, whose scales agree on their largest. One MAX all-reduce of an FP32 a weight; plain parameters stay.
    """
    found = [(local_of(parameter), values) for parameter, values in shards]
    scaled = [(local, values) for local, values in found if isinstance(local, ScalingTensor) and local.format.scaled]
    if not scaled:
        return
    device = device_of(mesh)
    amax = torch.stack([_amax(local, values).to(device) for local, values in scaled])
    group = group or CountedGroup(mesh.get_group(), "fsdp")
    group.all_reduce(amax, dist.ReduceOp.MAX, "fsdp/weight scales").wait()
    for (local, values), largest in zip(scaled, amax, strict=True):
        scale_inv = kernels.scale_inv_from_amax(largest.view(1, 1).to(local.device), local.format)
        if local.numel():
            stored = kernels.quantize(real(local if values is None else values), scale_inv, local.format, WHOLE)
            local.payload.copy_(stored)
        local.scale_inv.copy_(scale_inv)
        local.drop_casts()
        local.agreed = True


def _amax(local: ScalingTensor, values: Tensor | None) -> Tensor:
    if not local.numel():
        return torch.zeros((), device=local.device)
    if values is None:  # the amax that asks for the scale which is there
        return (local.scale_inv * local.format.largest).view(())
    return kernels.amax(real(values), WHOLE).view(())


def device_of(mesh: DeviceMesh) -> torch.device:
    """Where collectives run: with offloaded shards, not where those are."""
    kind = mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


def _seed_of_rank(seed: int, rank: int) -> int:
    return (seed + rank * 0x9E3779B1) % 2**31  # far apart, and rank 0 rounds as an unsharded optimizer does


@torch.no_grad()
def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter or gradient: its storage and its marks, if not the very object."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _alias(local: Tensor) -> Tensor:
    if isinstance(local, ScalingTensor):
        return ScalingTensor(local.payload, local.scale_inv, local.block, local.dtype)
    return local.detach()


def rows_of(num_rows: int, world: int) -> list[int]:
    """Rows of dim 0 on each rank, as ``torch.chunk`` cuts them."""
    longest = -(-num_rows // world)
    return [max(0, min(longest, num_rows - rank * longest)) for rank in range(world)]


def shard_of(whole: Tensor, group: CountedGroup) -> Tensor:
    """This rank's rows of a tensor that every rank has."""
    rows = rows_of(whole.shape[0], group.world)
    return whole.narrow(0, sum(rows[: group.rank]), rows[group.rank])


def _cut(value: Any, parameter: Tensor, group: CountedGroup) -> Any:
    return shard_of(value, group) if isinstance(value, Tensor) and value.shape == parameter.shape else value


def _bytes(tensor: Tensor) -> int:
    return tensor.stored_bytes if isinstance(tensor, ScalingTensor) else tensor.nbytes
