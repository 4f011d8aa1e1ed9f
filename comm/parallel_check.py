"""Whether a plan fits a model: every rule of tensor parallelism, checked before anything is changed."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from msamp_like.comm.group import CountedGroup
from msamp_like.comm.parallel_layers import Parallel
from msamp_like.comm.parallel_plan import Column, Enter, Plan, Row, Split, Vocab, VocabLoss
from msamp_like.nn.conversion import check_swappable
from msamp_like.policy import matches
from msamp_like.tensor import ScalingTensor


class Found(NamedTuple):
    """A module with the entry whose pattern matches its name."""

    name: str
    module: nn.Module
    entry: Any


def checked(model: nn.Module, group: CountedGroup, plan: Plan, *, sequence: bool) -> list[Found]:
    """The modules that the plan names, in the model's order; see :func:`.tensor_parallel.parallelize` for raises."""
    _check_plain(model)
    found = _found(model, plan)
    for one in found:
        _check_type(one)
        _check_sizes(one, group)
    _check_ties(found, model)
    if sequence:
        _check_covered(model, found)
    if group.world > 1:
        owners = [one for one in found if isinstance(one.entry, Column | Row | Vocab)]
        check_swappable((f"{one.name}.{own}", p) for one in owners for own, p in one.module.named_parameters())
    return found


def _check_plain(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model must be an nn.Module, got {type(model).__name__}")
    if any(isinstance(module, Parallel) for module in model.modules()):
        raise ValueError(
            "a model is parallelized once, got one that is split already; name all its modules in one plan"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, ScalingTensor):
            raise ValueError(
                f"a plain model is parallelized, got {name!r} in {parameter.format}; call parallelize before "
                "amp.initialize"
            )
        if parameter.is_meta:
            raise ValueError(
                f"a model is parallelized with its values, got {name!r} on the meta device; call model.to_empty and "
                "initialise it first"
            )
        if parameter.grad is not None:
            raise ValueError(
                f"a model is parallelized without gradients, got one of {name!r}; "
                "call model.zero_grad(set_to_none=True) first"
            )


def _found(model: nn.Module, plan: Plan) -> list[Found]:
    named = dict(model.named_modules())
    found: list[Found] = []
    for name, module in named.items():
        patterns = [pattern for pattern in plan if matches(name, pattern)]
        if len(patterns) > 1:
            raise ValueError(
                f"a module has one entry of a plan, got {', '.join(map(repr, patterns))} for {name!r}; "
                "make the patterns narrower"
            )
        found += [Found(name, module, plan[pattern]) for pattern in patterns]
    for pattern in plan:
        if not any(matches(name, pattern) for name in named):
            raise ValueError(
                f"an entry of a plan must match a module's name, got {pattern!r}, which matches none of {len(named)}; "
                "list them with model.named_modules()"
            )
    return found


_TYPES: dict[type, type[nn.Module]] = {
    Column: nn.Linear,
    Row: nn.Linear,
    Vocab: nn.Embedding,
    VocabLoss: nn.CrossEntropyLoss,
}


def _check_type(one: Found) -> None:
    name, module, entry = one
    if isinstance(module, nn.MultiheadAttention) or type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        raise ValueError(
            f"nn.MultiheadAttention multiplies by its matrices in a kernel of its own and cannot be split, got "
            f"{name!r} in the plan; write the attention with nn.Linear layers, or leave it out of the plan"
        )
    expected = _TYPES.get(type(entry))
    if expected is not None and type(module) is not expected:
        raise ValueError(
            f"{type(entry).__name__} splits an nn.{expected.__name__}, got {name!r}, a {type(module).__name__}, which "
            "may read its weight in a way of its own; leave it out of the plan"
        )
    if isinstance(module, nn.Embedding) and isinstance(entry, Vocab):
        options = {o: getattr(module, o) for o in ("max_norm", "sparse", "scale_grad_by_freq") if getattr(module, o)}
        if options:
            raise ValueError(f"a split embedding is a plain lookup, got {options} at {name!r}; build it without")
    if isinstance(module, nn.CrossEntropyLoss) and (module.weight is not None or module.label_smoothing):
        raise ValueError(
            f"a loss over a split vocabulary has no class weights and no label smoothing, got them at {name!r}; "
            "gather the logits instead: Column(gather_output=True), and leave the loss out of the plan"
        )


def _check_sizes(one: Found, group: CountedGroup) -> None:
    module: Any = one.module
    if isinstance(one.entry, Column):
        _check_divides(one, module.out_features, "output features", one.entry.parts, one.entry.unit, group)
    elif isinstance(one.entry, Row):
        _check_divides(one, module.in_features, "input features", 1, one.entry.unit, group)
    elif isinstance(one.entry, Vocab):
        _check_divides(one, module.num_embeddings, "rows of the vocabulary", 1, 1, group)


def _check_divides(one: Found, size: int, what: str, parts: int, unit: int, group: CountedGroup) -> None:
    if size % (parts * unit * group.world) == 0:
        return
    projections = f" in {parts} projections" if parts > 1 else ""
    units = f", heads of {unit}," if unit > 1 else ""
    raise ValueError(
        f"{what}{projections}{units} must divide by the {group.world} ranks of axis {group.axis!r}, got {size} at "
        f"{one.name!r}; use fewer ranks, or {'more heads' if unit > 1 else 'pad the layer'}"
    )


def _check_ties(found: list[Found], model: nn.Module) -> None:
    """A weight that several modules read is split by all of them, and alike."""
    splits: dict[int, tuple[str, tuple[int, int]]] = {}
    split_by: dict[Any, Any] = {Column: lambda e: (0, e.parts), Row: lambda e: (1, 1), Vocab: lambda e: (0, 1)}
    for one in found:
        if type(one.entry) in split_by:
            weight, how = id(one.module.weight), split_by[type(one.entry)](one.entry)
            first, other = splits.setdefault(weight, (one.name, how))
            if other != how:
                raise ValueError(
                    f"a weight is split in one way, got that of {first!r} and {one.name!r} split by dims {other[0]} "
                    f"and {how[0]} in {other[1]} and {how[1]} parts; untie it, or give both the same entry"
                )
    planned = {one.name for one in found if type(one.entry) in split_by}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in splits and name not in planned:
                raise ValueError(
                    f"a weight that is split is split for all that read it, got {splits[id(parameter)][0]!r} in the "
                    f"plan and not {name!r}, whose {own} is the same; add an entry for it, or untie it"
                )


def _check_covered(model: nn.Module, found: list[Found]) -> None:
    planned = {one.name for one in found if not isinstance(one.entry, Enter | Split)}  # these say nothing of gradients
    missing = [
        name
        for name, module in model.named_modules()
        if name not in planned and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    if missing:
        raise ValueError(
            f"where sequences are split every parameter needs an entry, which says whether its gradient is a part, got "
            f"none for {missing[0]!r}, the first of {len(missing)}; add Sequence(), or Whole() where it sees everything"
        )
