"""Conversion of a plain model, in place and back, and the plan that says what becomes of each module.

Identity is kept: the module objects stay, and so do the parameter objects, whose contents are swapped
(``torch.utils.swap_tensors``). Optimizer groups, schedulers, tied weights and hooks that hold one still hold it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from msamp_like.nn.functional import LinearGemm
from msamp_like.nn.grouped import GroupedGemm, GroupedLinear
from msamp_like.nn.linear import Fp8Linear, ReadsAsBase, rearm_hooks
from msamp_like.policy import Policy
from msamp_like.scaling import quantize
from msamp_like.tensor import ScalingTensor, unscaled

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of one module: ``product`` is "fp8", "bf16", "lookup" (an embedding) or "plain", and why."""

    name: str
    module: nn.Module
    product: str
    reason: str


def plan(model: nn.Module, policy: Policy) -> list[Plan]:
    """A plan for every Linear, every subclass of it and every embedding of a model that is not converted yet."""
    return _agreed([_plan(name, module, policy) for name, module in model.named_modules() if _has_matrix(module)])


def _agreed(plans: list[Plan]) -> list[Plan]:
    """Modules that share a weight share its storage: plain if one of them has to be, else as the first product."""
    first: dict[int, Plan] = {}
    for p in sorted(plans, key=lambda p: p.product != "plain"):
        if p.product != "lookup":
            for parameter in p.module.parameters(recurse=False):
                first.setdefault(id(parameter), p)
    agreed = []
    for p in plans:
        leader = p if p.product == "plain" else first.get(id(p.module.weight), p)
        if leader.product != p.product and (p.product != "lookup" or leader.product == "plain"):
            p = replace(p, product=leader.product, reason=f"it shares the weight of {leader.name!r}")
        agreed.append(p)
    return agreed


def _has_matrix(module: nn.Module) -> bool:
    known = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.MultiheadAttention, GroupedLinear)
    return isinstance(module, known) or torch.nn.utils.parametrize.is_parametrized(module, "weight")


def _plan(name: str, module: nn.Module, policy: Policy) -> Plan:
    def made(product: str, reason: str = "") -> Plan:
        return Plan(name=name, module=module, product=product, reason=reason)

    wanted, pattern = policy.product(name)
    if wanted == "skip":
        return made("plain", f"override {pattern!r} skips it")
    if isinstance(module, nn.MultiheadAttention):
        return made("plain", "nn.MultiheadAttention multiplies by its matrices in a kernel of its own")
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return made("plain", "its weight is computed: a parametrization, weight_norm or spectral_norm")
    if _is(module, nn.Embedding):
        if module.sparse or module.max_norm is not None:
            return made("plain", "an embedding with sparse gradients or max_norm keeps plain weights")
        return _checked(made("lookup", "a lookup has no product; its states follow the level"), module.weight)
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return made("plain", "its shape is unknown before a first forward pass; run one, then initialize")
    if not (_is(module, nn.Linear) or isinstance(module, GroupedLinear)):
        return made("plain", f"{type(module).__name__} may read its weight in a way of its own")
    if wanted == "bf16":
        return _checked(made("bf16", f"policy keeps {pattern!r} in bf16"), module.weight)
    if not policy.fp8_products:
        return _checked(made("bf16", f"level {policy.name} has no FP8 products"), module.weight)
    return _checked(made("fp8", f"override {pattern!r} smooths its input" if wanted == "smooth" else ""), module.weight)


def _is(module: nn.Module, cls: type[M]) -> TypeGuard[M]:
    """Whether the module reads its weight as ``cls`` does."""
    return type(module) is cls or (isinstance(module, cls) and isinstance(module, ReadsAsBase))


def _checked(wanted: Plan, weight: Tensor) -> Plan:
    if not weight.is_floating_point() or weight.is_complex():
        return replace(wanted, product="plain", reason=f"its weight is {weight.dtype}")
    if weight.numel() == 0:
        return replace(wanted, product="plain", reason="its weight is empty")
    return wanted


def convert(model: nn.Module, policy: Policy) -> dict[Tensor, Tensor]:
    """Convert ``model`` in place; returns each converted parameter with its FP32 values before conversion.

    Linears become :class:`Fp8Linear`, their weights and those of embeddings become ScalingTensors as
    ``policy.held`` says. Raises, before anything is changed, ValueError when there is nothing to convert
    and RuntimeError when something else holds a weight's tensor.
    """
    plans = [p for p in plan(model, policy) if p.product != "plain"]
    if not plans:
        raise ValueError(
            f"a model needs at least one nn.Linear or nn.Embedding to convert, {type(model).__name__} has none that "
            f"the policy {policy.name} takes; loosen its overrides, or train it without amp"
        )
    check_swappable((f"{p.name}.weight", p.module.weight) for p in plans)
    weight_in_fp8: dict[int, bool] = {}  # a tied weight: whether the product that reads it is
    for p in plans:
        weight_in_fp8[id(p.module.weight)] = p.product == "fp8" or weight_in_fp8.get(id(p.module.weight), False)
    originals: dict[Tensor, Tensor] = {}
    for p in plans:
        weight: nn.Parameter = p.module.weight  # type: ignore[assignment]
        if not isinstance(weight, ScalingTensor):
            originals[weight] = weight.detach().float().clone()
            rule = policy.held(p.name, in_fp8=weight_in_fp8[id(weight)])
            _swap(weight, quantize(weight.detach(), rule))
    for p in plans:
        if p.product != "lookup":
            _convert_linear(p, policy)
    return originals


def _convert_linear(p: Plan, policy: Policy) -> None:
    module: Any = p.module
    weight: ScalingTensor = module.weight
    if weight.gemm is None:  # two Linears with one weight share its scalers
        gemm = GroupedGemm if isinstance(module, GroupedLinear) else LinearGemm
        weight.gemm = gemm(policy.for_module(p.name), p.name).to(weight.device)
    if not isinstance(module, ReadsAsBase):
        module.__class__ = Fp8Linear
    module.gemm = weight.gemm
    module.gemm.train(module.training)


def check_swappable(parameters: Iterable[tuple[str, Any]]) -> None:
    """Raise RuntimeError unless the contents of all (name, parameter) can be exchanged: each is, there and back."""
    for name, parameter in parameters:
        probe = nn.Parameter(parameter.detach(), parameter.requires_grad)
        try:
            torch.utils.swap_tensors(parameter, probe)
        except RuntimeError as error:
            raise RuntimeError(
                f"a parameter is converted while nothing else holds its tensor, {name!r} is held by the graph of an "
                "earlier forward pass or by a weak reference; delete losses and outputs first (del loss), and compile "
                "the model afterwards"
            ) from error
        torch.utils.swap_tensors(probe, parameter)


def _swap(parameter: nn.Parameter, stored: Tensor) -> None:
    """Put ``stored`` behind the parameter object. A gradient that is there already comes along in the new form, hooks
    and the attributes that a user has set as they are."""
    grad, parameter.grad = parameter.grad, None
    kept = {name: value for name, value in vars(parameter).items() if name not in ScalingTensor.__annotations__}
    torch.utils.swap_tensors(parameter, nn.Parameter(stored, parameter.requires_grad))
    vars(parameter).update(kept)
    rearm_hooks([parameter])
    if grad is not None:
        if isinstance(parameter, ScalingTensor) and not isinstance(grad, ScalingTensor):
            grad = unscaled(grad.to(torch.bfloat16), parameter.dtype)
        parameter.grad = grad if isinstance(parameter, ScalingTensor) else grad.dequantize()


def restore(model: nn.Module) -> nn.Module:
    """Turn a converted model back into plain torch, in place: the values that its parameters stand for, nothing
    else. Raises RuntimeError, before anything is changed, when something else holds a weight's tensor."""
    stored = [(name, p) for name, p in model.named_parameters() if isinstance(p, ScalingTensor)]
    check_swappable(stored)
    for module in list(model.modules()):
        if isinstance(module, Fp8Linear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
        if isinstance(getattr(module, "gemm", None), LinearGemm):
            del module.gemm
    for _, parameter in stored:
        _swap(parameter, parameter.dequantize())
    return model
