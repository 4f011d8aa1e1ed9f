"""Tensor parallelism for plain torch models, by name pattern, with or without sequence parallelism.

    model = parallelize(GPT(config), mesh["tp"], plan_gpt(config), sequence=True)
    model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters()), level="O3", mesh=mesh)

Done to a plain model, before amp: modules and parameters stay the objects they are, a parameter holds this rank's
shard. Until :func:`adopt` gives it a policy, activations travel in their own dtype; then as its rule of PARTIAL_OUTPUT
says.

Left out: models on the meta device (ranks have to hold the same values, so there have to be values), dropout that
differs between the parts of a sequence, and experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msamp_like.comm.activations import check_rule
from msamp_like.comm.agreement import agree
from msamp_like.comm.collectives import replicate
from msamp_like.comm.group import CountedGroup
from msamp_like.comm.parallel_check import Found, checked
from msamp_like.comm.parallel_layers import (
    ColumnLinear,
    Context,
    EntersInput,
    JoinsOutput,
    Parallel,
    RowLinear,
    Shard,
    SplitsInput,
)
from msamp_like.comm.parallel_plan import (
    Column,
    Enter,
    Heads,
    Join,
    Plan,
    Row,
    Sequence,
    Split,
    Vocab,
    VocabLoss,
    Whole,
    plan_decoder,
    plan_gpt,
)
from msamp_like.comm.vocab_parallel import VocabCrossEntropy, VocabEmbedding, uncompiled_losses
from msamp_like.nn.linear import rearm_hooks
from msamp_like.policy import Policy, Role
from msamp_like.tensor import real

if TYPE_CHECKING:  # its import takes longer than the whole of ours
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Column",
    "Enter",
    "Heads",
    "Join",
    "Row",
    "Sequence",
    "Split",
    "Vocab",
    "VocabLoss",
    "Whole",
    "adopt",
    "context",
    "forget",
    "full_state_dict",
    "load_full_state_dict",
    "parallelize",
    "partial_gradients",
    "plan_decoder",
    "plan_gpt",
    "sharded_parameters",
]

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    mesh_or_group: DeviceMesh | dist.ProcessGroup,
    plan: Plan,
    *,
    sequence: bool = False,
    overlap: bool = False,
) -> Model:
    """Split ``model`` in place over the ranks of a one-dimensional mesh or a group, and return it.

    All ranks end with the first rank's values. With ``sequence``, activations between the split products are split
    along dim -2, which then has to divide by the ranks. With ``overlap`` too, their exchanges run beside the products
    of a converted model (:mod:`.overlap`): the same values, in more and smaller products. Over one rank nothing is
    changed.

    Everything is checked before anything is changed. Raises ValueError for a plan that does not fit the model (a
    pattern without a match, a module matched twice, a size that does not divide by the ranks, under ``sequence`` a
    parameter that no entry accounts for), a model that is converted or parallelized already, ``overlap`` without
    ``sequence``, and if ranks differ.
    """
    if overlap and not sequence:
        raise ValueError(
            "exchanges run beside products where sequences are split, got overlap=True with sequence=False; "
            "give sequence=True too, or leave overlap out"
        )
    group = _counted(mesh_or_group)
    found = checked(model, group, plan, sequence=sequence)
    if group.world == 1:
        return model
    plan_lines = {name: str(entry) for name, _, entry in found}
    agree({"plan": plan_lines, "sequence": sequence, "overlap": overlap}, group, next(model.parameters()).device)
    replicate([*model.named_parameters(), *model.named_buffers()], group)
    shared = Context(group, sequence=sequence, overlap=overlap)
    entered = [f"{name}." if name else "" for name, _, entry in found if isinstance(entry, Enter)]
    for one in found:
        _BECOMES[type(one.entry)](one, shared, any(one.name.startswith(prefix) for prefix in entered))
    _shard(model, group)
    group.end_step()
    return model


def _counted(mesh_or_group: DeviceMesh | dist.ProcessGroup) -> CountedGroup:
    if isinstance(mesh_or_group, dist.ProcessGroup):
        return CountedGroup(mesh_or_group, "tp")
    names = mesh_or_group.mesh_dim_names or ("tp",)
    if mesh_or_group.ndim != 1:
        raise ValueError(f"a model is split over one axis of a mesh, got the axes {names}; pass mesh['tp']")
    return CountedGroup(mesh_or_group.get_group(), names[0])


# --- what becomes of a module ---------------------------------------------------------------------------------------


def _become(one: Found, context: Context, cls: type[Parallel]) -> Any:
    module: Any = one.module
    module.__class__ = cls
    module.context, module.label = context, one.name
    return module


def _column(one: Found, context: Context, entered: bool) -> None:
    module = _become(one, context, ColumnLinear)
    module.parts, module.gather_output, module.enters = one.entry.parts, one.entry.gather_output, not entered
    module.out_features //= context.group.world


def _row(one: Found, context: Context, entered: bool) -> None:
    module = _become(one, context, RowLinear)
    module.in_features //= context.group.world


def _vocab(one: Found, context: Context, entered: bool) -> None:
    module = _become(one, context, VocabEmbedding)
    module.scatters = one.entry.scatter
    module.num_embeddings //= context.group.world
    if module.padding_idx is not None:
        local = module.padding_idx - context.group.rank * module.num_embeddings
        module.padding_idx = local if 0 <= local < module.num_embeddings else None


def _loss(one: Found, context: Context, entered: bool) -> None:
    _become(one, context, VocabCrossEntropy).losses = uncompiled_losses()


def _enter(one: Found, context: Context, entered: bool) -> None:
    hook = EntersInput(context, one.name, one.entry.argument)
    one.module.register_forward_pre_hook(hook, with_kwargs=True)


def _split(one: Found, context: Context, entered: bool) -> None:
    if context.sequence:
        hook = SplitsInput(context, f"{one.name}/split", one.entry.argument)
        one.module.register_forward_pre_hook(hook, with_kwargs=True)


def _join(one: Found, context: Context, entered: bool) -> None:
    if context.sequence:
        context.partial.append(one.module)
        one.module.register_forward_hook(JoinsOutput(context, f"{one.name}/join"))


def _sequence(one: Found, context: Context, entered: bool) -> None:
    if context.sequence:
        context.partial.append(one.module)


def _heads(one: Found, context: Context, entered: bool) -> None:
    context.partial.append(one.module)


def _whole(one: Found, context: Context, entered: bool) -> None:
    """Nothing to do: it is the same on all ranks, and so is its gradient."""


_BECOMES: Mapping[type, Callable[[Found, Context, bool], None]] = {
    Column: _column,
    Row: _row,
    Vocab: _vocab,
    VocabLoss: _loss,
    Enter: _enter,
    Split: _split,
    Join: _join,
    Sequence: _sequence,
    Heads: _heads,
    Whole: _whole,
}


@torch.no_grad()
def _shard(model: nn.Module, group: CountedGroup) -> None:
    """Leave every split parameter its share; a tied one is split once."""
    done: set[int] = set()
    for _, parameter, shard in _sharded(model):
        if id(parameter) not in done:
            done.add(id(parameter))
            attributes = dict(vars(parameter))
            share = nn.Parameter(shard.of(parameter.detach(), group.rank, group.world), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, share)  # not .data: a graph that is alive expects the old shape
            vars(parameter).update(attributes)
            rearm_hooks([parameter])


def _sharded(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Shard]]:
    """(name, parameter, how it is split) of every split parameter, a tied one under each of its names."""
    for name, module in model.named_modules():
        if isinstance(module, Parallel):
            for own, shard in module.shards().items():
                parameter = getattr(module, own)
                if parameter is not None:
                    yield f"{name}.{own}" if name else own, parameter, shard


# --- for those who wire the model -----------------------------------------------------------------------------------


def _context(model: nn.Module) -> Context | None:
    return next((m.context for m in model.modules() if isinstance(m, Parallel)), None)


def context(model: nn.Module) -> CountedGroup | None:
    """The ranks over which the model is split, with the ledger of what its activations sent; None if it is not."""
    found = _context(model)
    return None if found is None else found.group


def adopt(model: nn.Module, policy: Policy) -> None:
    """From now on activations travel as the policy's PARTIAL_OUTPUT rule says; nothing for a model that is not split.

    Raises ValueError for a rule that activations cannot travel by.
    """
    found = _context(model)
    if found is not None:
        check_rule(policy[Role.PARTIAL_OUTPUT])
        found.rule = policy[Role.PARTIAL_OUTPUT]


def forget(model: nn.Module) -> None:
    """Activations travel in their own dtype again."""
    found = _context(model)
    if found is not None:
        found.rule = None


def sharded_parameters(model: nn.Module) -> dict[str, Shard]:
    """Name of every split parameter -> (dim, parts); a tied one under each of its names."""
    return {name: shard for name, _, shard in _sharded(model)}


def partial_gradients(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The replicated parameters whose gradient on one rank is its share of a sum over :func:`context`'s ranks.

    These are what works on a part of the sequence: norms, and the biases of row-parallel layers; and what works on a
    rank's own heads. Their sum over the ranks has to be taken before the gradient is used.
    """
    found = _context(model)
    if found is None:
        return []
    partial = {id(module) for module in found.partial}
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            is_bias = found.sequence and isinstance(module, RowLinear) and own == "bias"
            if is_bias or id(module) in partial:
                named.setdefault(id(parameter), (f"{name}.{own}" if name else own, parameter))
    return list(named.values())


# --- whole tensors --------------------------------------------------------------------------------------------------


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state of the whole model on every rank, in plain tensors: what a model that is not split would load.

    Collective: call it on all ranks.
    """
    found, shards = _context(model), sharded_parameters(model)
    full: dict[str, Any] = {}
    gathered: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            full[name] = value
            continue
        if id(value) not in gathered:
            plain = real(value.detach(), value.dtype)
            gathered[id(value)] = plain if name not in shards else gather_whole(plain, shards[name], found)
        full[name] = gathered[id(value)]
    return full


def gather_whole(shard: Tensor, how: Shard, context: Context | None) -> Tensor:
    """The whole of a plain tensor that is split as a parameter is, such as its gradient, on every rank."""
    if context is None:
        return shard
    stacked, work = context.group.all_gather(shard.unsqueeze(0), label="full_state_dict")
    work.wait()
    return how.whole(stacked)


def load_full_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the state of a whole model: this rank keeps its shards. Meant before amp, whose optimizers keep masters."""
    group, shards = context(model), sharded_parameters(model)
    model.load_state_dict(
        {
            name: value if group is None or name not in shards else shards[name].of(value, group.rank, group.world)
            for name, value in state.items()
        }
    )
