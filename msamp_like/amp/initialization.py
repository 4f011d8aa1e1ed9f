"""``amp.initialize``: checks, conversion, and the wiring of model, ranks and optimizers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msamp_like import policy as policies
from msamp_like.amp.wiring import Converted, Wiring, adopt_class, wiring_of
from msamp_like.comm import tensor_parallel
from msamp_like.comm.agreement import agree, versions
from msamp_like.comm.axes import Axes, Norms
from msamp_like.comm.buckets import check_bucket_bytes
from msamp_like.comm.collectives import replicate
from msamp_like.comm.data_parallel import DataParallel
from msamp_like.comm.hierarchical import PARTIAL_SUMS, TwoLevelGroup, check_nodes, two_level
from msamp_like.comm.zero import OwnedWeights, Zero
from msamp_like.nn import conversion
from msamp_like.nn.saved_activations import SavedActivations
from msamp_like.nn.saved_activations import check_rule as check_saved
from msamp_like.optim import GradientRelease, LowPrecisionOptimizer, check, from_torch
from msamp_like.optim.offload import Offloaded, holding_weights
from msamp_like.policy import Policy, Role
from msamp_like.scaling import Scaler, roll
from msamp_like.tensor import ScalingTensor

if TYPE_CHECKING:  # its import takes longer than the whole of ours
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=nn.Module)
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


def initialize(
    model: Model,
    optimizer: Optimizers = None,
    level: str | Policy = "O2",
    *,
    recipe: str | None = None,
    overrides: Mapping[str, str] | None = None,
    saved_activations: str | None = None,
    mesh: DeviceMesh | None = None,
    zero_stage: int | None = None,
    overlap_forward: bool = False,
    data_parallel: bool = True,
    process_group: dist.ProcessGroup | None = None,
    ranks_per_node: int | None = None,
    bucket_bytes: int | None = None,
    gradient_release: bool | GradientRelease = False,
    offload: str | None = None,
    seed: int = 0,
) -> tuple[Model, Any]:
    """Convert ``model`` in place to train in FP8 and return it with the optimizer that steps it.

    ``level`` is "O0", "O1", "O2", "O3", "lean" or a :class:`~msamp_like.policy.Policy`. ``recipe`` is "delayed" (the
    level's own), "current", "rowwise", "blockwise" or "mxfp8" (:data:`~msamp_like.policy.RECIPES`). ``overrides`` maps
    module-name patterns to "fp8", "smooth", "bf16" or "skip". ``optimizer`` is the torch optimizer built on the model's
    parameters (one of ours comes back), a sequence of them (a list does), or None (None does) for a model that only
    runs; schedulers built on it go on working. ``seed`` starts the random stream of stochastic rounding.
    ``saved_activations="fp8"`` keeps what norms, activations and elementwise products need for backward in FP8 groups
    (:mod:`msamp_like.nn.saved_activations`), "bf16" as torch does; None is the level's own.

    Where a process group of more than one rank is initialised the model becomes data-parallel over it, or over
    ``process_group``, unless ``data_parallel=False``. ``mesh`` says instead which ranks are data-parallel ("dp"),
    tensor-parallel ("tp") and pipeline stages ("pp"). ``zero_stage`` 1 or 2 gives every parameter one owner among its
    data-parallel ranks (:mod:`msamp_like.comm.zero`), 0 none; None is the level's own: 1 at O3. With
    ``overlap_forward`` new weights may arrive while the next forward runs, layer by layer; a step then returns before
    they are here, and whatever reads a weight waits for it.

    ``ranks_per_node`` is for data-parallel ranks on several nodes, several on each: FP8 gradients are then summed in
    FP32 inside a node, and the sums go to the other nodes in BF16 (:mod:`msamp_like.comm.hierarchical`); None is one
    node, every rank sends to every other. It counts the data-parallel ranks of a node, neighbours on their axis: 8 on
    nodes of 8 GPUs, and 4 where tensor parallelism takes those in pairs. ``bucket_bytes`` is how much leaves at once,
    gradients and ZeRO's weights alike; None is 8 MiB, or 1 MiB a data-parallel rank where that is more.

    With ``gradient_release`` a parameter is stepped in backward and its gradient freed at once, so that they never
    exist together; ``optimizer.step()`` then only closes the step. Clipping is asked for there, as in
    ``GradientRelease(max_norm=1.0)``, by the joint norm that is to be expected; a gradient that is not finite counts as
    zero for its parameter instead of skipping the step; the learning rate is the one at backward; several backwards a
    step are refused (:mod:`msamp_like.optim.release`).

    With ``offload="cpu"`` the optimizer's states, masters and update of matrices are on the host; FP8 gradients go down
    as soon as they are complete and FP8 weights come up as soon as they are stepped (:mod:`msamp_like.optim.offload`).
    The parameter then holds the weight that products read, whatever the level: at O1 and O2 its FP16 master is the
    optimizer's, on the host, where as elsewhere it is the parameter. A gradient that is complete is no longer in
    ``.grad``: clip with ``amp.clip_grad_norm_(model, ...)``, run all micro-batches of a step but the last in
    ``model.no_sync()``; a step uses gradients up. ``overlap_forward`` holds here too.

    Everything is checked before anything is changed. Raises ValueError or TypeError for an unknown level, recipe,
    override or mesh axis, ranks that do not fill their nodes, a model that is converted already or has nothing to
    convert, an optimizer that cannot be mapped or holds parameters that are not the model's, and a parameter in two
    optimizers.
    """
    policy = policies.resolve(level)
    policy = policy.with_recipe(recipe) if recipe is not None else policy
    policy = policy.override(overrides) if overrides else policy
    policy = policy.with_saved_activations(saved_activations) if saved_activations is not None else policy
    check_saved(policy[Role.SAVED_ACTIVATION])
    policy = replace(policy, zero_stage=zero_stage) if zero_stage is not None else policy
    policy = holding_weights(policy) if offload is not None else policy
    several = isinstance(optimizer, Sequence)
    sources = [] if optimizer is None else list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    _check(model, sources, overrides or {})
    check_bucket_bytes(bucket_bytes)
    axes = _axes(model, mesh, process_group, data_parallel)
    release = GradientRelease.of(gradient_release)
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if release is not None:
        _check_release(axes, policy)
    if offload is not None:
        _check_offload(offload, axes, policy, released=release is not None, optimizers=len(sources))
    if ranks_per_node is not None:
        check_nodes(ranks_per_node, axes.data.world if axes.data is not None else 1)

    settings: dict[str, Any] = {"ranks_per_node": ranks_per_node, "bucket_bytes": bucket_bytes, "seed": seed}
    settings.update(gradient_release=str(release), offload=str(offload))
    _agree(axes, policy, settings, next((p.device for p in model.parameters()), torch.device("cpu")))
    if ranks_per_node is not None and axes.data is not None:
        axes.data = two_level(ranks_per_node, axes.data.group, axes.data.axis)
    if axes.data is not None:  # before conversion: masters are made from the values that every rank starts with
        replicate([*model.named_parameters(), *model.named_buffers()], axes.data)
    plans = conversion.plan(model, policy)
    originals = conversion.convert(model, policy)
    tensor_parallel.adopt(model, policy)
    wiring = Wiring(policy, plans, axes)
    adopt_class(model, wiring)
    if policy[Role.SAVED_ACTIVATION].format.scaled:
        wiring.save_activations(model, SavedActivations(policy[Role.SAVED_ACTIVATION]))
    wiring.round_gradients(originals, scattered=_split_parameters(model))
    _reduce_together(model, wiring, bucket_bytes)
    wired = {"overlap_forward": overlap_forward, "offload": offload is not None}
    optimizers = [_optimizer(source, wiring, originals, seed, **wired) for source in sources]
    _roll_with(model, optimizers, wiring)
    _offload(optimizers, wiring)
    if release is not None:
        _release(optimizers, wiring, release)
    axes.end_step()  # what made the ranks alike is no part of the first step
    return model, optimizers if several else optimizers[0] if optimizers else None


def _agree(axes: Axes, policy: Policy, settings: Mapping[str, Any], device: torch.device) -> None:
    """Raise ValueError on every rank unless all were started alike; their models are compared where they are copied."""
    fields: dict[str, Any] = {
        "level": policy.name,
        "policy": {line.split()[0]: line for line in str(policy).splitlines()[1:]},
        "zero_stage": policy.zero_stage,
        **settings,
        "axes": str(axes),
        **versions(),
    }
    for group in axes.groups:
        agree(fields, group, device)


def _axes(
    model: nn.Module, mesh: DeviceMesh | None, process_group: dist.ProcessGroup | None, data_parallel: bool
) -> Axes:
    """The ranks by axis; those over which the model is split are with the model already."""
    split = tensor_parallel.context(model)
    if mesh is not None:
        if process_group is not None or not data_parallel:
            raise ValueError(
                "a mesh says which ranks work together, got process_group or data_parallel=False beside it; leave "
                "them out, or leave the dp axis out of the mesh"
            )
        axes = Axes.of_mesh(mesh)
        expected, found = (None if g is None else g.ranks for g in (axes.tensor, split))
        if expected != found:
            raise ValueError(
                f"the model must be split over the mesh's tp axis, got an axis of ranks {expected} and a model split "
                f"over {found}; call parallelize(model, mesh['tp'], plan) before amp.initialize(..., mesh=mesh)"
            )
    else:
        parallel = data_parallel and dist.is_available() and dist.is_initialized()
        if parallel and split is not None:
            raise ValueError(
                f"a model that is split over ranks {split.ranks} needs to know which others are data-parallel, got no "
                "mesh; give mesh=, or data_parallel=False where there are none"
            )
        axes = Axes.of_group(process_group) if parallel else Axes()
    axes.tensor = split
    return axes


def _split_parameters(model: nn.Module) -> list[Tensor]:
    split = tensor_parallel.sharded_parameters(model)
    return [p for name, p in model.named_parameters(remove_duplicate=False) if name in split]


def _reduce_together(model: nn.Module, wiring: Wiring, bucket_bytes: int | None) -> None:
    """Hooks that reduce gradients, and what joins their norms."""
    named, axes, stage = list(model.named_parameters()), wiring.axes, wiring.policy.zero_stage
    partial = [p for _, p in tensor_parallel.partial_gradients(model)]
    split = _split_parameters(model)
    options: dict[str, Any] = {
        "rule": wiring.policy[Role.GRAD_WEIGHT],
        "group": axes.data,
        "partial": partial,
        "tensor_group": axes.tensor,
        "between": PARTIAL_SUMS if isinstance(axes.data, TwoLevelGroup) else None,
        "bucket_bytes": bucket_bytes,
    }
    owned = stage > 0 and axes.data is not None
    if owned:
        wiring.reducer = Zero(named, stage=stage, **options)
    elif axes.data is not None or partial:
        wiring.reducer = DataParallel(named, scattered=split, **options)
    if owned or axes.tensor is not None or axes.pipeline is not None:
        ids = {id(p) for p in split}
        elsewhere = [isinstance(wiring.reducer, Zero) and wiring.reducer.has_owner(p) for _, p in named]
        wiring.norms = Norms(axes, owned=elsewhere, sharded=[id(p) in ids for _, p in named])


def _optimizer(
    source: torch.optim.Optimizer,
    wiring: Wiring,
    originals: Mapping[Tensor, Tensor],
    seed: int,
    *,
    overlap_forward: bool,
    offload: bool,
) -> LowPrecisionOptimizer:
    parameters = [p for group in source.param_groups for p in group["params"]]
    placement = None
    if isinstance(wiring.reducer, Zero):
        placement = OwnedWeights(parameters, wiring.reducer, overlap_forward=overlap_forward)
    made = from_torch(
        source, wiring.policy, originals, seed, placement, offload=offload, overlap_forward=overlap_forward
    )
    wiring.placements.append(placement)
    if wiring.norms is not None:
        made.agree_max = wiring.axes.agree_max
    return made


def _shared_out(axes: Axes, policy: Policy) -> list[str]:
    """What has a rank step a part of the parameters alone."""
    split = [name for name, group in (("tp", axes.tensor), ("pp", axes.pipeline)) if group is not None]
    return split + (["zero_stage"] if policy.zero_stage and axes.data is not None else [])


def _check_offload(offload: str, axes: Axes, policy: Policy, *, released: bool, optimizers: int) -> None:
    if offload != "cpu":
        raise ValueError(f'states are offloaded to the "cpu", got offload={offload!r}; give "cpu", or None for none')
    if released:
        raise ValueError(
            "an offloaded parameter is stepped once all gradients are known, got gradient_release beside offload, "
            "which steps in backward; leave gradient_release out: offloaded gradients are freed all the same"
        )
    if not optimizers:
        raise ValueError(
            "offload moves what an optimizer keeps, got no optimizer; give one, or for shards under fully_shard "
            "cpu_offload of msamp_like.integrations.fsdp2"
        )
    split = _shared_out(axes, policy)
    if split:
        raise ValueError(
            "offloaded parameters are stepped by one process, or by data-parallel ranks that all step every parameter, "
            f"got {' and '.join(split)}; leave offload out, or give zero_stage=0 and no tp or pp axis"
        )


def _offload(optimizers: Sequence[LowPrecisionOptimizer], wiring: Wiring) -> None:
    """Have each gradient go down when it is there: from backward, or from the reducer that has its mean."""
    wiring.homes = homes = [o.home for o in optimizers if isinstance(o.home, Offloaded)]
    if homes and wiring.reducer is not None:
        wiring.reducer.on_mean = lambda parameter: [home.take(parameter) for home in homes]
    else:
        wiring.removable += [handle for home in homes for handle in home.hooks()]


def _check_release(axes: Axes, policy: Policy) -> None:
    split = _shared_out(axes, policy)
    if split:
        raise ValueError(
            "gradients are released by one process, or by data-parallel ranks that all step every parameter, got "
            f"{' and '.join(split)}; leave gradient_release out, or give zero_stage=0 and no tp or pp axis"
        )


def _release(optimizers: Sequence[LowPrecisionOptimizer], wiring: Wiring, settings: GradientRelease) -> None:
    """Have each parameter stepped when its gradient is there: from backward, or from the reducer that has its mean."""
    released = [optimizer.release(settings) for optimizer in optimizers]
    wiring.releases_gradients = True
    if wiring.reducer is not None:
        wiring.reducer.on_mean = lambda parameter: [one.take(parameter) for one in released]
    else:
        wiring.removable += [handle for one in released for handle in one.hooks()]


def _check(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], overrides: Mapping[str, str]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, Converted) or any(isinstance(p, ScalingTensor) for p in model.parameters()):
        raise ValueError(
            "a model is initialized once, got one that is converted already; call amp.restore(model) first to "
            "change its level, and give several optimizers in one call as a list"
        )
    names = [name for name, _ in model.named_modules()]
    for pattern in overrides:
        if not any(policies.matches(name, pattern) for name in names):
            raise ValueError(
                f"an override must match a module's name, got {pattern!r}, which matches none of {len(names)}; "
                "list them with model.named_modules()"
            )
    known = {id(p): name for name, p in model.named_parameters()}
    owner: dict[int, int] = {}
    split = {id(p) for p in _split_parameters(model)}
    for number, optimizer in enumerate(optimizers):
        needs_whole = check(optimizer).needs_whole_matrices
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in known:
                    raise ValueError(
                        f"an optimizer's parameters must be the model's, got one of shape {tuple(parameter.shape)} "
                        "that is not; build it on model.parameters() of this very model, after moving it to its device"
                    )
                if needs_whole and id(parameter) in split:
                    raise ValueError(
                        f"a {type(optimizer).__name__} steps whole matrices, got {known[id(parameter)]!r}, which is "
                        "split over ranks; step split parameters with AdamW, in an optimizer of their own"
                    )
                if owner.setdefault(id(parameter), number) != number:
                    raise ValueError(
                        f"a parameter belongs to one optimizer, got {known[id(parameter)]!r} in two; "
                        "take it out of one of them"
                    )


def _roll_with(model: nn.Module, optimizers: Sequence[LowPrecisionOptimizer], wiring: Wiring) -> None:
    """Each optimizer's step rolls the scalers of its weights; those of frozen weights go with the first."""
    owned: list[list[Scaler]] = [[] for _ in optimizers]
    owner = {id(p): number for number, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    seen: set[int] = set()
    for parameter in model.parameters():
        gemm = parameter.gemm if isinstance(parameter, ScalingTensor) else None
        if optimizers and gemm is not None and id(gemm) not in seen:
            seen.add(id(gemm))
            owned[owner.get(id(parameter), 0)] += [gemm.input, gemm.grad_output]  # type: ignore[attr-defined]
    for optimizer, scalers in zip(optimizers, owned, strict=True):
        if wiring.reducer is not None:
            optimizer.register_step_pre_hook(_needs_backward(wiring.reducer))
        # not after the step: a small reduction would wait on the wire behind the new weights
        optimizer.before_update = functools.partial(roll, scalers, wiring.axes.reduce_max)
        optimizer.register_step_post_hook(_ends_step(wiring.axes))


def _needs_backward(reducer: DataParallel) -> Callable[..., None]:
    """A rank that steps without having exchanged gradients would meet the others in the wrong collective."""
    seen = 0

    def checked(*_: Any) -> None:
        nonlocal seen
        if reducer.backwards == seen:
            raise RuntimeError(
                "a step needs gradients that all ranks have exchanged, got none on this rank since the last one: its "
                "loss reached no parameter, or backward ran in no_sync() alone; give every rank a loss that depends on "
                "the model, if need be 0 times its output"
            )
        seen = reducer.backwards

    return checked


def _ends_step(axes: Axes) -> Callable[..., None]:
    def ended(*_: Any) -> None:
        axes.end_step()

    return ended


def restore(model: nn.Module) -> nn.Module:
    """Back to a plain torch model, in place: parameters hold the values that FP8 training gave them, hooks are gone.

    The optimizer that ``initialize`` returned has nothing to step any more; build a torch optimizer to go on.
    """
    wiring = wiring_of(model)
    if wiring.released:
        raise RuntimeError(
            "a model is restored while it holds its own parameters, got one whose shards fully_shard holds; "
            "gather plain values with msamp_like.integrations.fsdp2.full_state_dict(model)"
        )
    conversion.check_swappable((n, p) for n, p in model.named_parameters() if isinstance(p, ScalingTensor))
    for removable in wiring.removable:
        removable.remove()
    if wiring.saved is not None:
        wiring.saved.enabled = False  # a deep copy has hooks that no handle of ours removes
    if wiring.reducer is not None:
        wiring.reducer.remove()
    tensor_parallel.forget(model)
    model.__class__ = type(model).__mro__[2]
    del model._wiring
    return conversion.restore(model)
