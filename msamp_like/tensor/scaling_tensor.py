"""ScalingTensor: a tensor stored in few bits with its scales.

    real = payload * scale_inv

It is a ``torch.Tensor``, so a parameter, a gradient, an optimizer state and a message are all this one class: modules
hold it, autograd accumulates it, ``torch.save`` writes it, ``torch.compile`` sees its two plain tensors. The operations
below are all it defines. Any other raises: to turn a tensor back into plain numbers is a decision, and it is written
``tensor.dequantize()``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from msamp_like import kernels
from msamp_like.formats import WHOLE, Block, Format, block_extent, format_of, grid_shape
from msamp_like.kernels import Noise, Operand

aten = torch.ops.aten

AT_ONCE = 2**24
"""Elements that are FP32 numbers together while a norm is taken: 64 MiB."""


class Gemm(Protocol):
    """What a weight knows about its products, so that ``F.linear`` takes the same path as the layer that owns it."""

    def linear(self, input: Tensor, weight: ScalingTensor, bias: Tensor | None) -> Tensor: ...


class ScalingTensor(torch.Tensor):
    """``payload`` (any of our formats) and ``scale_inv`` (FP32, one entry a block) behind one tensor.

    The outer ``dtype`` is the one that the user's tensor had; it decides what ``dequantize()`` and mixed arithmetic
    give back, never what is stored. ``gemm`` is set on weights by the conversion and is None everywhere else.
    ``scattered`` is set on a gradient that is one of a set, or a part of one, whose rest lies on other ranks: a norm of
    those that are here means nothing, and asking for one raises. ``arrival`` is set while the values are on their way
    from the rank or the host that owns them: to read ``payload`` or ``scale_inv`` calls it first, and it returns when
    they are here. A compiled graph takes its inputs by the same two names, so it waits as well.

    A tensor may be one rank's shard of a weight (FSDP2). ``padded`` is then the payload with the rows of zeros that
    make all shards equally long, where there are any; ``agreed`` says that all shards have the same scale, which lets
    the gathered weight have one. Whoever makes the scales agree sets it; a write with a scale of its own takes it away.
    """

    block: Block
    gemm: Gemm | None
    scattered: bool
    arrival: Callable[[], None] | None
    padded: Tensor | None
    _marks: dict[str, bool]
    _casts: dict[tuple[object, ...], Operand]

    @staticmethod
    def __new__(
        cls,
        payload: Tensor,
        scale_inv: Tensor,
        block: Block = WHOLE,
        dtype: torch.dtype = torch.float32,
        requires_grad: bool = False,
    ) -> ScalingTensor:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, payload.shape, dtype=dtype, device=payload.device, requires_grad=requires_grad
        )

    def __init__(
        self,
        payload: Tensor,
        scale_inv: Tensor,
        block: Block = WHOLE,
        dtype: torch.dtype = torch.float32,
        requires_grad: bool = False,
    ) -> None:
        expected = grid_shape(payload.shape, block)
        if tuple(scale_inv.shape) != expected:
            raise ValueError(
                f"a payload of shape {tuple(payload.shape)} with block {block} has scales of shape {expected}, "
                f"got {tuple(scale_inv.shape)}; reshape scale_inv"
            )
        self.arrival = None
        self.payload = payload
        self.scale_inv = scale_inv
        self.block = block
        self.gemm = None
        self.scattered = False
        self.padded = None
        self._marks = {}
        self._casts = {}

    # --- reading ----------------------------------------------------------------------------------------------------

    @property
    def payload(self) -> Tensor:
        """What is stored, in the outer shape."""
        self.await_arrival()
        return self._payload

    @payload.setter
    def payload(self, payload: Tensor) -> None:
        self._payload = payload

    @property
    def scale_inv(self) -> Tensor:
        """FP32, one entry a block: 1 / scale."""
        self.await_arrival()
        return self._scale_inv

    @scale_inv.setter
    def scale_inv(self, scale_inv: Tensor) -> None:
        self._scale_inv = scale_inv

    @property
    def format(self) -> Format:
        """Format of the payload."""
        return format_of(self._payload.dtype)

    @property
    def operand(self) -> Operand:
        """The stored tensors as kernels take them."""
        return Operand(self.payload, self.scale_inv, self.block)

    @property
    def agreed(self) -> bool:
        """Whether this is a shard and all shards have one scale; the same of every alias of one storage."""
        return self._marks.get("agreed", False)

    @agreed.setter
    def agreed(self, agreed: bool) -> None:
        self._marks["agreed"] = agreed

    @property
    def recorded(self) -> bool:
        """Whether whoever keeps the other half of a master knows the values; every write takes it away."""
        return self._marks.get("recorded", False)

    @recorded.setter
    def recorded(self, recorded: bool) -> None:
        self._marks["recorded"] = recorded

    @property
    def shard(self) -> bool:
        """Whether torch's ``fully_shard`` made this for a shard's rows."""
        return self._marks.get("shard", False)

    @property
    def stored_bytes(self) -> int:
        """Bytes of payload and scales, measured on the tensors; a cached cast is not in it (see ``cast_bytes``)."""
        return self._payload.nbytes + self._scale_inv.nbytes

    @property
    def cast_bytes(self) -> int:
        """Bytes of the compute copies that are cached now."""
        copies = [c for c in self._casts.values() if c.payload is not self._payload]
        return sum(c.payload.nbytes + c.scale_inv.nbytes for c in copies)

    def await_arrival(self) -> None:
        """Return when the values are here."""
        if self.arrival is not None:
            self.arrival()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The real values as a plain tensor, in the outer dtype unless another is asked for."""
        return kernels.dequantize(self.payload, self.scale_inv, self.block, dtype or self.dtype)

    def cast(self, format: Format, block: Block = WHOLE, margin: int = 0, power_of_two: bool = True) -> Operand:
        """The same values in another format, with scales from the values at hand; kept until the tensor is written.

        The compute copy of a weight: made once an optimizer step, whatever the number of micro-batches.
        """
        self.await_arrival()
        if torch.compiler.is_compiling():
            return self._made(format, block, margin, power_of_two)  # a traced copy belongs to its graph
        key = (format.name, block, margin, power_of_two)
        if key not in self._casts:
            # autograd cannot save a copy that was made in inference mode, and training may read it next
            with torch.inference_mode(False):
                self._casts[key] = self._made(format, block, margin, power_of_two)
        return self._casts[key]

    def _made(self, format: Format, block: Block, margin: int, power_of_two: bool) -> Operand:
        if self._payload.dtype == format.dtype and (block == self.block or not format.scaled):
            return self.operand
        if not format.scaled:
            return Operand(self.dequantize(format.dtype), _one(self.device), WHOLE)
        values = self.dequantize(torch.float32)
        payload, scale_inv, _ = kernels.quantize_current(values, format, block, margin, power_of_two)
        return Operand(payload, scale_inv, block)

    # --- writing ----------------------------------------------------------------------------------------------------

    def store_(self, value: Tensor, noise: Noise | None = None) -> ScalingTensor:
        """Overwrite with real values in the tensor's own format and blocks; ``noise`` rounds stochastically."""
        kernels.store_(Operand(self.payload, self.scale_inv, self.block, noise), value.contiguous())
        self.agreed = False
        self.drop_casts()
        return self

    def drop_casts(self) -> None:
        """Forget compute copies; whoever writes the payload in place calls this."""
        self._casts.clear()
        self.recorded = False

    def cast_to_update(self) -> Operand | None:
        """The compute copy that whoever writes the payload in place writes too, from what is then stored; None where
        there is none. Others are forgotten, and the copy stays cached: it may be read once both are written."""
        self.agreed = False
        kept = [
            (key, copy)
            for key, copy in self._casts.items()
            if key[2:] == (0, True) and copy.payload is not self._payload  # a kernel knows neither margin nor division
        ][:1]
        self._casts.clear()
        self._casts.update(kept)
        return kept[0][1] if kept else None

    def replace_(self, other: ScalingTensor) -> ScalingTensor:
        """Hold another's storage from now on: the only way to change format or blocks in place."""
        self.await_arrival()
        self.payload, self.scale_inv, self.block = other.payload, other.scale_inv, other.block
        self.padded, self._marks = other.padded, other._marks
        self._casts = {}  # not cleared: an alias may share the old ones with the old storage
        return self

    def share_memory_(self) -> ScalingTensor:
        """Move the storage to shared memory; the wrapper has none of its own, and torch crashes looking for it."""
        self.payload.share_memory_()
        self.scale_inv.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.payload.is_shared()

    # --- a shard of a weight: what torch's fully_shard asks of a local tensor -----------------------------------------

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        """What this rank sends to unshard the weight: the stored bytes and, of a format with scales, the scale.

        torch also knows a signature of five arguments, under which every input must have the shape of the padded shard
        where the rows do not divide; a scale has not.
        """
        if self.block != WHOLE:
            raise NotImplementedError(
                f"a shard that is gathered has one scale, got block {self.block}; shard a weight whose rule has one "
                "scale for the whole tensor, as level O3 has"
            )
        payload = (self.payload if self.padded is None else self.padded).detach()
        if not self.format.scaled:
            return (payload,), None
        return (payload.view(torch.uint8), self.scale_inv.detach()), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: ScalingTensor | None = None
    ) -> tuple[ScalingTensor, tuple[Tensor, ...]] | None:
        """The weight of what arrived, sharing its memory: one scale where the shards' agree, else one a shard.

        Called with ``out``, the weight of the first call, it refreshes that; rows beyond the weight's own are dropped.
        """
        payload, block, scale_inv = gathered[0].view(self.payload.dtype), WHOLE, self.scale_inv
        if len(gathered) > 1:
            scales = gathered[1].view(-1, 1)
            block = WHOLE if self.agreed else (payload.shape[0] // scales.shape[0], -1)
            scale_inv = scales[:1] if self.agreed else scales
        weight = ScalingTensor(payload, scale_inv, block, dtype)
        weight.gemm = self.gemm
        if out is None:
            return weight, ()
        out.replace_(weight.first_rows(out.shape[0]))
        return None

    def first_rows(self, rows: int) -> ScalingTensor:
        """The first ``rows`` of dim 0 and their scales, in the same memory."""
        extent = block_extent(self.shape, self.block)[0]
        grid_rows = max(1, -(-rows * math.prod(self.shape[1:-1]) // extent))
        made = ScalingTensor(self.payload[:rows], self.scale_inv[:grid_rows], self.block, self.dtype)
        made.gemm = self.gemm
        return made

    # --- torch ------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:  # type: ignore[override]
        extra = ", requires_grad=True" if self.requires_grad else ""
        return (
            f"ScalingTensor({self.dequantize()}, format={self.format}, block={self.block}, "
            f"scale_inv={tuple(self.scale_inv.shape)}{extra})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Block, torch.dtype]]:
        return ["payload", "scale_inv"], (self.block, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[Block, torch.dtype], outer_size: Any, outer_stride: Any
    ) -> ScalingTensor:
        return ScalingTensor(inner["payload"], inner["scale_inv"], *context)

    def __reduce_ex__(self, protocol: Any) -> Any:
        is_parameter = isinstance(self, torch.nn.Parameter)
        arguments = (self.payload, self.scale_inv, self.block, self.dtype, self.requires_grad, is_parameter)
        return rebuild, arguments

    def __deepcopy__(self, memo: dict[int, Any]) -> ScalingTensor:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        if not self.is_leaf:
            raise RuntimeError("only a leaf of the autograd graph can be deep-copied, got a result; detach() it first")
        is_parameter = isinstance(self, torch.nn.Parameter)
        inner = (self.payload.detach().clone(), self.scale_inv.detach().clone())
        new = rebuild(*inner, self.block, self.dtype, self.requires_grad, is_parameter)
        memo[id(self)] = new
        new.gemm = copy.deepcopy(self.gemm, memo)
        if self.grad is not None:
            new.grad = copy.deepcopy(self.grad, memo)
        return new

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        implementation = OPERATIONS.get(func) or HOST_OPERATIONS.get(str(func))
        if implementation is None:
            raise NotImplementedError(
                f"{func} is not defined on a ScalingTensor, whose values would have to be dequantized in silence; call "
                ".dequantize() where that is meant, or keep the module out of FP8 with "
                "amp.initialize(..., overrides={'module.name': 'skip'})"
            )
        return implementation(*args, **(kwargs or {}))

    __hash__ = torch.Tensor.__hash__


def rebuild(
    payload: Tensor, scale_inv: Tensor, block: Block, dtype: torch.dtype, requires_grad: bool, is_parameter: bool
) -> ScalingTensor:
    """A ScalingTensor from its parts; what pickling and deepcopy call."""
    tensor = ScalingTensor(payload, scale_inv, tuple(block), dtype)  # type: ignore[arg-type]
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad)  # type: ignore[return-value]
    return tensor.requires_grad_(requires_grad)  # type: ignore[return-value]


# Lets torch.load(weights_only=True) rebuild what it read: one class and one function, both free of side effects.
torch.serialization.add_safe_globals([ScalingTensor, rebuild])


def real(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The plain values of a plain or scaling tensor."""
    return tensor.dequantize(dtype) if isinstance(tensor, ScalingTensor) else tensor.to(dtype)


def norm(tensor: Tensor, ord: float = 2.0) -> Tensor:
    """Vector norm of the real values, an FP32 scalar. Where one scale serves all of a large tensor, the values are
    never all in FP32 at once."""
    if not isinstance(tensor, ScalingTensor) or tensor.block != WHOLE or tensor.numel() <= AT_ONCE:
        return torch.linalg.vector_norm(real(tensor), ord)
    parts = tensor.payload.view(-1).split(AT_ONCE)
    values = (kernels.dequantize(part, tensor.scale_inv, WHOLE, torch.float32) for part in parts)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v, ord) for v in values]), ord)


def unscaled(values: Tensor, dtype: torch.dtype) -> ScalingTensor:
    """Plain BF16 (or FP32, FP16) values as a ScalingTensor of scale 1 and outer ``dtype``."""
    return ScalingTensor(values, _one(values.device), WHOLE, dtype)


def _one(device: torch.device) -> Tensor:
    return torch.ones(1, 1, dtype=torch.float32, device=device)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, ScalingTensor) and weight.gemm is not None and not isinstance(input, ScalingTensor):
        return weight.gemm.linear(input, weight, bias)
    raise NotImplementedError(
        "F.linear needs a plain input and a weight that amp.initialize converted, got "
        f"{type(input).__name__} and {type(weight).__name__}; call .dequantize() where plain values are meant"
    )


OPERATIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""ATen operation -> what it does on a ScalingTensor; filled by :mod:`msamp_like.tensor.operations`, at import alone."""

HOST_OPERATIONS: dict[str, Callable[..., Any]] = {}
"""The same for operations that exist once a part of torch is imported, by name, so that nothing has to import it."""
