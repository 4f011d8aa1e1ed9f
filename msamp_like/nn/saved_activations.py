"""FP8 saved activations on a model as it is: while one of its modules runs, torch's norms, activations, elementwise
products and cross-entropy are those of :mod:`.saved_functional`.

The means is ``torch.overrides.TorchFunctionMode``: it sees ``nn.LayerNorm`` and ``F.gelu`` alike, whoever calls them,
and nothing outside of the model's own forward. Every module of the model switches it on for as long as it runs, not
only the root: activation checkpointing calls a block again during backward, and must find the same functions there.

What attention keeps stays as it is, in BF16. Of a query, key or value that is a view of a larger tensor the rest of
which nothing needs (a value, where queries and keys are rotated), a copy is kept instead of the whole: the same numbers
in a third of the bytes.

Left to torch: whatever has no gradient, tensors too small to matter, norms over several dims, a cross-entropy with
class weights, label smoothing or class probabilities, dropout (its mask), and everything in subclasses of Tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from msamp_like.formats import FP8_FORMATS
from msamp_like.kernels.fused import Kept
from msamp_like.nn import saved_functional
from msamp_like.nn.functional import LinearGemm
from msamp_like.policy import Rule
from msamp_like.scaling import Scaler

SMALLEST = 4096
"""Elements below which a tensor is left alone: it is not worth the passes."""
GROUPS = (16, 128)
"""Elements that may share a scale."""


def check_rule(rule: Rule) -> None:
    """Raises ValueError unless saved activations can be stored as ``rule``: unquantized, or FP8 in groups of a row."""
    rows, columns = rule.block
    if rule.format.scaled and (rule.format not in FP8_FORMATS or rows != 1 or not GROUPS[0] <= columns <= GROUPS[1]):
        raise ValueError(
            f"saved activations are FP8 with a scale for each {GROUPS[0]} to {GROUPS[1]} elements of a row, got "
            f"{rule}; give saved_activations='fp8', or a rule with block=(1, 128)"
        )


class SavedActivations(TorchFunctionMode):
    """Has what a model keeps for backward stored as ``rule``, while the model runs."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.depth = 0
        self.enabled = True
        self.activated: tuple[Tensor, Tensor, Kept, str] | None = None  # the last activation, its input, what it kept
        # By name: torch has one function as method, operator and function, and torch.compile finds objects less surely.
        self.twins: dict[str, Callable[..., Tensor | None]] = {
            "layer_norm": self._layer_norm,
            "rms_norm": self._rms_norm,
            "gelu": self._gelu,
            "silu": self._silu,
            "mul": self._product,
            "pow": self._power,
            "square": self._square,
            "cross_entropy": self._cross_entropy,
            "scaled_dot_product_attention": self._attention,
            "unflatten": self._unflatten,
        }

    def attach(self, model: nn.Module) -> list[Any]:
        """Switch on while a module of ``model`` runs; returns the handles that undo it."""
        handles: list[Any] = []
        for module in model.modules():
            if not isinstance(module, (nn.Linear, nn.Embedding, LinearGemm, Scaler)):
                handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        return handles

    def _enter(self, *_: Any) -> None:
        if self.depth == 0:
            self.__enter__()
        self.depth += 1

    def _leave(self, *_: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.activated = None
            self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        twin = self.twins.get(getattr(func, "__name__", "")) if self.enabled and torch.is_grad_enabled() else None
        made = None if twin is None else twin(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if made is None else made

    # --- the twins: None leaves the call to torch ---------------------------------------------------------------------

    def _layer_norm(
        self, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float = 1e-5, *_: Any,
    ) -> Tensor | None:  # fmt: skip
        if not _worth(input, weight, bias) or len(normalized_shape) != 1 or input.ndim < 2:
            return None
        with torch.no_grad():  # of no rows: the dtype, which autocast decides, and the errors are torch's own
            dtype = F.layer_norm(input.new_empty(0, input.shape[-1]), normalized_shape, weight, bias, eps).dtype
        return saved_functional.norm(input, weight, bias, eps, dtype, self.rule, centered=True)

    def _rms_norm(
        self, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor | None:
        if not _worth(input, weight) or len(normalized_shape) != 1 or input.ndim < 2:
            return None
        if eps is None and input.dtype != torch.float32:
            return None  # torch's own choice, which is not one number
        with torch.no_grad():
            dtype = F.rms_norm(input.new_empty(0, input.shape[-1]), normalized_shape, weight, eps).dtype
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        return saved_functional.norm(input, weight, None, eps, dtype, self.rule, centered=False)

    def _gelu(self, input: Tensor, approximate: str = "none") -> Tensor | None:
        return self._activation(input, "gelu" if approximate == "none" else "gelu_tanh")

    def _silu(self, input: Tensor, inplace: bool = False) -> Tensor | None:
        return None if inplace else self._activation(input, "silu")

    def _activation(self, input: Tensor, kind: str) -> Tensor | None:
        if not _worth(input):
            return None
        made, kept = saved_functional.activation(input, kind, self.rule)
        self.activated = made, input, kept, kind
        return made

    def _product(self, input: Any, other: Any, *, out: Tensor | None = None) -> Tensor | None:
        both = isinstance(input, Tensor) and isinstance(other, Tensor)
        if out is not None or not both or not _worth(input, other):
            return None
        last, self.activated = self.activated, None
        if last is not None and input.shape == other.shape and (input is last[0] or other is last[0]):
            activated, gate, kept, kind = last
            value = other if input is activated else input
            if value is not activated and value.requires_grad:
                return saved_functional.gated(gate, activated, kept, value, kind, self.rule)
        if not (input.requires_grad and other.requires_grad):
            return None  # torch keeps the other factor alone
        return saved_functional.product(input, other, self.rule)

    def _power(self, input: Any, exponent: Any, *, out: Tensor | None = None) -> Tensor | None:
        return self._square(input, out=out) if isinstance(exponent, int | float) and exponent == 2 else None

    def _square(self, input: Any, *, out: Tensor | None = None) -> Tensor | None:
        if out is not None or not isinstance(input, Tensor) or not _worth(input):
            return None
        return saved_functional.square(input, self.rule)

    def _cross_entropy(
        self, input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: None = None,
        ignore_index: int = -100, reduce: None = None, reduction: str = "mean", label_smoothing: float = 0.0,
    ) -> Tensor | None:  # fmt: skip
        plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
        if not plain or not _worth(input) or input.ndim != 2 or target.is_floating_point():
            return None
        with torch.no_grad():
            dtype = F.cross_entropy(input.new_empty(0, input.shape[-1]), target[:0], reduction="sum").dtype
        return saved_functional.cross_entropy(input, target, ignore_index, reduction, self.rule).to(dtype)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if torch.compiler.is_compiling():
            return None  # what a compiled block keeps is the compiler's choice, and no view
        query, key, value = _without_the_rest((query, key, value))
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    def _unflatten(self, input: Tensor, dim: int, sizes: Sequence[int]) -> Tensor | None:
        # The method is Python that calls super(), which torch.compile does not follow below a mode.
        return torch.unflatten(input, dim, sizes) if torch.compiler.is_compiling() else None


def _worth(*tensors: Tensor | None) -> bool:
    """Whether a call with these is one to take over; the first of them, or the largest, is what would be kept."""
    given = [t for t in tensors if t is not None]
    plain = all(type(t) in (Tensor, nn.Parameter) and t.is_floating_point() for t in given)
    return plain and max(t.numel() for t in given) >= SMALLEST and any(t.requires_grad for t in given)


def _without_the_rest(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, copied where together they are only a part of the storage that they are views of."""
    seen: dict[int, int] = {}
    for t in tensors:
        if type(t) is Tensor:
            place = t.untyped_storage().data_ptr()
            seen[place] = seen.get(place, 0) + t.nbytes
    return [
        t.clone(memory_format=torch.contiguous_format)
        if type(t) is Tensor and t.requires_grad and seen[t.untyped_storage().data_ptr()] < t.untyped_storage().nbytes()
        else t
        for t in tensors
    ]
