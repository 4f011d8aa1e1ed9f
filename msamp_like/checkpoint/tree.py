"""Nested state as a flat table of tensors and a JSON description, and back, exactly.

Dicts (any scalar as a key), lists, tuples, None, booleans, integers, floats, strings, dtypes and tensors come back as
they went in: a tuple is not a list, 1 is not "1", a NaN is a NaN, and one plain tensor in two places is one tensor
again. A ScalingTensor becomes two tensors, ``<key>.payload`` and ``<key>.scale_inv``, and a note of its block and outer
dtype.

A container or anything that JSON lacks is written as an object of one tag, so no value can be taken for a description.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from msamp_like.tensor import ScalingTensor

Json = Any  # what json.dumps takes

_SCALARS = (bool, int, str, type(None))


class Flattener:
    """Collects the tensors of one nested value under readable keys; ``describe`` returns the JSON that names them."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[tuple[object, ...], str] = {}

    def describe(self, value: object, key: str) -> Json:
        """JSON of ``value``; raises TypeError for what cannot be stored, naming where it is."""
        if isinstance(value, ScalingTensor):
            parts = [self._store(part, f"{key}.{name}") for name, part in _parts(value)]
            return {"scaling": parts, "block": list(value.block), "dtype": _dtype_name(value.dtype)}
        if isinstance(value, Tensor):
            return {"tensor": self._store(value, key)}
        if isinstance(value, dict):
            items = [[self._describe_key(k, key), self.describe(v, f"{key}.{k}")] for k, v in value.items()]
            if all(isinstance(k, str) for k in value):
                return {"dict": dict(items)}
            return {"items": items}
        if isinstance(value, list | tuple) and type(value) in (list, tuple, torch.Size):
            tag = "list" if isinstance(value, list) else "tuple"
            return {tag: [self.describe(v, f"{key}.{i}") for i, v in enumerate(value)]}
        return self._describe_leaf(value, key)

    def _describe_leaf(self, value: object, key: str) -> Json:
        if type(value) in _SCALARS:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}  # JSON has no word for nan and inf
        if isinstance(value, torch.dtype):
            return {"dtype": _dtype_name(value)}
        raise TypeError(
            f"a checkpoint holds dicts, lists, tuples, scalars and tensors, got {type(value).__name__} at {key!r}; "
            "store the plain values it is made of"
        )

    def _describe_key(self, value: object, key: str) -> Json:
        if type(value) not in (bool, int, str, float, type(None)):
            raise TypeError(f"a key of a stored dict must be a scalar, got {value!r} in {key!r}; use its name")
        return value

    def _store(self, tensor: Tensor, key: str) -> str:
        """The key under which the tensor stands; a tensor met before keeps its first key."""
        tensor = tensor.detach()
        if tensor.layout != torch.strided or tensor.is_meta:
            raise TypeError(
                f"a checkpoint holds dense tensors with storage, got {tensor.layout} at {key!r}; densify it"
            )
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() > 0 and place in self._seen:
            return self._seen[place]
        if key in self.tensors:  # {"a.b": t, "a": {"b": u}} reads alike
            key = f"{key}#{len(self.tensors)}"
        self._seen[place] = key
        self.tensors[key] = tensor
        return key


def rebuild(described: Json, tensors: dict[str, Tensor], device: torch.device | str = "cpu") -> Any:
    """The value that :meth:`Flattener.describe` described, its tensors on ``device``."""
    if not isinstance(described, dict):
        return described
    tag, body = next(iter(described.items()))
    if tag == "tensor":
        return _tensor(body, tensors, device)
    if tag == "scaling":
        payload, scale_inv = (_tensor(key, tensors, device) for key in body)
        rows, columns = described["block"]
        return ScalingTensor(payload, scale_inv, (rows, columns), _dtype(described["dtype"]))
    if tag == "dict":
        return {k: rebuild(v, tensors, device) for k, v in body.items()}
    if tag == "items":
        return {k: rebuild(v, tensors, device) for k, v in body}
    if tag in ("list", "tuple"):
        values = [rebuild(v, tensors, device) for v in body]
        return values if tag == "list" else tuple(values)
    if tag == "float":
        return float(body)
    if tag == "dtype":
        return _dtype(body)
    raise ValueError(f"a checkpoint's description uses known tags only, got {tag!r}; it was made by a newer version")


def _tensor(key: str, tensors: dict[str, Tensor], device: torch.device | str) -> Tensor:
    """``tensors[key]`` on the device, the same object each time, so that an alias stays one."""
    if key not in tensors:
        raise ValueError(f"the tensor file must hold every tensor described, {key!r} is missing; the file was changed")
    tensors[key] = tensors[key].to(device)
    return tensors[key]


def _parts(value: ScalingTensor) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    return ("payload", value.payload), ("scale_inv", value.scale_inv)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a dtype's name must be one of torch's, got {name!r}; it was made by a newer version")
    return dtype
