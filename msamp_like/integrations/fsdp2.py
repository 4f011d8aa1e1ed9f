"""PyTorch's FSDP2 with our tensors: weights gather as FP8 bytes, gradients scatter in FP8, states are sharded.

    model, optimizer = fsdp2.fully_shard(model, optimizer, level="O3", blocks="blocks.*")

FP8-LM (Peng et al., 2023, https://arxiv.org/abs/2310.18313) shards whole tensors; this is the cut along dim 0 that
torch's ``fully_shard`` makes (Rajbhandari et al., "ZeRO", 2019, https://arxiv.org/abs/1910.02054, stage 3). Of the host
only public seams are used: the all-gather methods of a tensor class, which :class:`~msamp_like.tensor.ScalingTensor`
has, ``set_custom_all_gather`` and ``set_custom_reduce_scatter``. Tested with PyTorch 2.13.

Left out: meshes of two dims (HSDP), parameters that are DTensors already, deferred initialisation on the meta device,
``torch.distributed.checkpoint`` (see :func:`full_state_dict` and :func:`state_dict`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor

from msamp_like import amp
from msamp_like import policy as policies
from msamp_like.comm.collectives import replicate
from msamp_like.comm.group import CountedGroup
from msamp_like.formats import RESIDUAL, WHOLE
from msamp_like.integrations.fsdp2_communication import communicate
from msamp_like.integrations.fsdp2_optimizer import (
    ShardedOptimizer,
    agree_on_scales,
    check_rowwise,
    device_of,
    local_of,
    rows_of,
    shard_of,
)
from msamp_like.policy import Policy, Role
from msamp_like.scaling import Scaler
from msamp_like.telemetry.report import Report
from msamp_like.tensor import ScalingTensor, real

Model = TypeVar("Model", bound=nn.Module)

REDUCE = ("fp8", "plain")
"""How gradients are reduced: as the policy's GRAD_WEIGHT rule says, or as torch does it."""


# --- sharding -------------------------------------------------------------------------------------------------------


def fully_shard(
    model: Model,
    optimizer: torch.optim.Optimizer | None = None,
    level: str | Policy = "O3",
    *,
    mesh: DeviceMesh | None = None,
    blocks: str | Sequence[str] = "blocks.*",
    reduce: str = "fp8",
    recipe: str | None = None,
    overrides: Mapping[str, str] | None = None,
    reshard_after_forward: bool | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    cpu_offload: bool = False,
    seed: int = 0,
) -> tuple[Model, ShardedOptimizer | None]:
    """Convert ``model`` in place, shard it over ``mesh`` and return it with the optimizer that steps its shards.

    The first rank's values are taken on all ranks. Every module that ``blocks`` names, part by part as a shell matches
    files, is gathered and reduced as one group, the rest of the model as another. ``mesh`` has one dim; None is the
    world. ``optimizer`` is the torch optimizer built on the model's parameters. ``reduce`` is "fp8", as the policy's
    rule for gradients says, or "plain". The other options are torch's ``fully_shard``'s and ``amp.initialize``'s;
    ``cpu_offload`` keeps shards, gradients and states in host memory, not pinned.

    Raises ValueError, before the model is converted, for a level whose parameter is not the E4M3 or BF16 weight, a mesh
    of two dims, a pattern that matches nothing, and an optimizer that holds parameters that are not the model's.
    """
    policy = policies.resolve(level)
    policy = _checked_policy(policy if recipe is None else policy.with_recipe(recipe))
    _check_reduce(reduce)
    _check_plain(model)
    mesh = _checked_mesh(mesh, model)
    group = CountedGroup(mesh.get_group(), "fsdp")
    modules = _matching(model, [blocks] if isinstance(blocks, str) else blocks)
    names = {id(p): name for name, p in model.named_parameters()}
    members = [] if optimizer is None else _names_of(optimizer, names)
    replicate([*model.named_parameters(), *model.named_buffers()], group)
    originals = {n: shard_of(p.detach(), group).float().clone() for n, p in model.named_parameters() if p.dim() > 1}
    amp.initialize(model, None, policy, overrides=overrides, data_parallel=False)
    moments = {} if optimizer is None else {names[id(p)]: optimizer.state.pop(p) for p in list(optimizer.state)}
    offload = CPUOffloadPolicy(pin_memory=False) if cpu_offload else OffloadPolicy()
    modules.append(model)
    for module in modules:
        torch_fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=mp_policy or MixedPrecisionPolicy(),
            offload_policy=offload,
        )
    if optimizer is not None:
        sharded = dict(model.named_parameters())
        for param_group, wanted in zip(optimizer.param_groups, members, strict=True):
            param_group["params"] = [sharded[name] for name in wanted]
        optimizer.state.update({sharded[name]: states for name, states in moments.items()})
    return model, attach(model, optimizer, reduce=reduce, originals=originals, seed=seed)


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    reduce: str = "fp8",
    originals: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> ShardedOptimizer | None:
    """What :func:`fully_shard` does last, for a model that ``amp.initialize(model, None, level="O3",
    data_parallel=False)`` converted and torch's own ``fully_shard`` has cut: how gradients travel, and the optimizer.

    ``optimizer`` is a torch optimizer on the sharded parameters. ``originals`` are this rank's FP32 rows by name, from
    which masters are made; without them a master starts from the rounded weight.
    """
    _check_reduce(reduce)
    policy = amp.policy_of(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    named = list(model.named_parameters())
    plain = [name for name, p in named if not isinstance(p, DTensor)]
    if plain:
        raise ValueError(
            f"every parameter must be sharded, got {len(plain)} that are not, first {plain[0]!r}; call torch's "
            "fully_shard on the root module too"
        )
    amp.release(model)
    mesh: DeviceMesh = named[0][1].device_mesh  # type: ignore[attr-defined]
    group = CountedGroup(mesh.get_group(), "fsdp")
    communicate(model, policy[Role.GRAD_WEIGHT] if reduce == "fp8" else None, group)
    agree_on_scales([(p, None) for _, p in named], mesh, group)
    if optimizer is None:
        return None
    names = {id(p): name for name, p in named}
    _names_of(optimizer, names)
    scalers = [module for module in model.modules() if isinstance(module, Scaler)]
    return ShardedOptimizer(
        optimizer, policy, mesh, names=names, originals=originals or {}, scalers=scalers, group=group, seed=seed
    )


def _checked_policy(policy: Policy) -> Policy:
    if policy.parameter is not Role.WEIGHT or policy[Role.WEIGHT].block != WHOLE:
        raise ValueError(
            "FSDP2 gathers what a parameter holds, which has to be the weight with one scale, got policy "
            f"{policy.name}, whose parameter is {policy.parameter.value} ({policy.parameter_rule}); use level O3, or "
            "O0 for BF16; and for a recipe with blocks, level=O3.with_recipe(name).with_rule('weight', "
            "Rule(format=E4M3)), which leaves its one scale to the weight"
        )
    if policy[Role.MASTER_WEIGHT].format == RESIDUAL:
        raise ValueError(
            f"under FSDP2 a shard's master is in one part, got policy {policy.name}, where it is a residual of the "
            "weight; use level O3"
        )
    return policy


def _check_plain(model: nn.Module) -> None:
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    if sharded:
        raise ValueError(
            f"a model is sharded once, from plain parameters, got {len(sharded)} DTensors, first {sharded[0]!r}; call "
            "this before anything else cuts the model, or convert and shard by hand and call attach"
        )


def _check_reduce(reduce: str) -> None:
    if reduce not in REDUCE:
        raise ValueError(f'reduce must be one of {", ".join(REDUCE)}, got {reduce!r}; "fp8" follows the policy')


def _checked_mesh(mesh: DeviceMesh | None, model: nn.Module) -> DeviceMesh:
    if mesh is None:
        return init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    if mesh.ndim != 1:
        raise ValueError(
            f"FSDP2 shards over a mesh of one dim here, got {mesh.ndim} dims of shape {tuple(mesh.shape)}; pass one "
            "axis of it, mesh['dp']"
        )
    return mesh


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The modules that the patterns name, inner ones first, as ``fully_shard`` wants them."""
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        parts = pattern.split(".")
        matched = {
            name: module
            for name, module in model.named_modules()
            if name.count(".") == len(parts) - 1 and all(map(fnmatch.fnmatchcase, name.split("."), parts))
        }
        if not matched:
            raise ValueError(
                f"a pattern of blocks must match a module's name, got {pattern!r}, which matches none; list them with "
                "model.named_modules(), or pass blocks=() for one group"
            )
        found.update(matched)
    return [found[name] for name in sorted(found, key=lambda name: -name.count("."))]


def _names_of(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    check_rowwise(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"an optimizer's parameters must be the model's, got one of shape {tuple(parameter.shape)} that is "
                    "not; build it on model.parameters() of this very model as it is now"
                )
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


# --- state ----------------------------------------------------------------------------------------------------------


def state_dict(model: nn.Module, optimizer: ShardedOptimizer) -> dict[str, Any]:
    """Everything this rank needs to resume, the live tensors of its shards; every rank saves its own."""
    return {
        "policy": str(amp.policy_of(model)),
        "model": {name: local_of(value) for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scalers": {name: module.state() for name, module in model.named_modules() if isinstance(module, Scaler)},
    }


@torch.no_grad()
def load_state_dict(model: nn.Module, optimizer: ShardedOptimizer, state: Mapping[str, Any]) -> None:
    """Continue from :func:`state_dict` of the same rank at the same world size, bit for bit."""
    if state.get("policy") != str(amp.policy_of(model)):
        raise ValueError(
            f"a saved state must be of the model's policy, got\n{state.get('policy')}\nshard the model with that level"
        )
    optimizer.load_state_dict(state["optimizer"])  # first: it refuses the state of another rank or world
    for name, value in model.state_dict().items():
        local_of(value).copy_(state["model"][name])
    for name, module in model.named_modules():
        if isinstance(module, Scaler):
            module.load_state(state["scalers"][name])
    agree_on_scales([(p, None) for p in model.parameters()], optimizer.mesh, optimizer.group)


@torch.no_grad()
def full_state_dict(model: nn.Module, optimizer: ShardedOptimizer | None = None) -> dict[str, Tensor]:
    """Plain tensors under the model's own names, whole, on every rank: a checkpoint for any torch program.

    FP32. With ``optimizer`` a weight's values are its master's, without it those that the products read. One tensor is
    gathered at a time.
    """
    found: dict[str, Tensor] = {}
    current = model.state_dict(keep_vars=True)  # its hooks put the shards back, where a forward has gathered them
    names = {id(p): name for name, p in model.named_parameters()}
    for name, value in current.items():
        if not isinstance(value, DTensor):
            found[name] = value.detach().clone()
            continue
        master = optimizer.master_of(names[id(value)]) if optimizer is not None else None
        rows = real(local_of(value) if master is None else master)
        group = CountedGroup(value.device_mesh.get_group(), "fsdp")
        sizes = rows_of(value.shape[0], group.world)
        gathered, work = group.all_gather(rows.to(device_of(value.device_mesh)), sizes, f"fsdp/full/{name}")
        work.wait()
        found[name] = gathered.to(rows.device)
    return found


@torch.no_grad()
def load_full_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], optimizer: ShardedOptimizer | None = None
) -> None:
    """Take the values of :func:`full_state_dict`, or of a plain model's ``state_dict``; every rank passes the same.

    With ``optimizer`` the masters are made from them, which a model that goes on training needs: its next step writes
    the weights from the masters. Moments stay as they are. Raises ValueError for other names or shapes.
    """
    current = model.state_dict(keep_vars=True)
    wrong = [n for n in current if n not in state or current[n].shape != state[n].shape]
    wrong += [n for n in state if n not in current]
    if wrong:
        raise ValueError(
            f"a full state must have the model's names and shapes, {len(wrong)} differ, first {wrong[0]!r}; "
            "build the model with the settings of the checkpoint"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    stored: list[tuple[Tensor, Tensor | None]] = []
    for name, value in current.items():
        if not isinstance(value, DTensor):
            value.copy_(state[name])
            continue
        rows = shard_of(state[name], CountedGroup(value.device_mesh.get_group())).to(local_of(value).device).float()
        if rows.numel():
            local_of(value).copy_(rows)
        if optimizer is not None:
            optimizer.remaster(names[id(value)], rows)
        stored.append((value, rows))
    if stored:
        agree_on_scales(stored, stored[0][0].device_mesh)  # type: ignore[attr-defined]


# --- proof ----------------------------------------------------------------------------------------------------------


def fp8_report(model: nn.Module) -> Report:
    """``amp.fp8_report`` of a sharded model: bytes are those of the whole weights, which no rank holds."""
    report = amp.fp8_report(model)
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    return replace(
        report, rows=tuple(replace(row, bytes=_whole_bytes(weights[row.name], row.bytes)) for row in report.rows)
    )


def _whole_bytes(weight: Any, otherwise: int) -> int:
    local = local_of(weight) if isinstance(weight, DTensor) else weight
    if not isinstance(local, ScalingTensor):
        return otherwise
    return weight.numel() * local.format.bytes + local.scale_inv.nbytes
