"""HostCopy: the values of a small tensor on their way to the host, for a reader that comes later.

A step that asks the device for a number waits until the device has done all that it was given. What is read a step
later has long arrived, and the device never runs dry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """The tensor's values as they are when the device comes to this point; later writes to it do not show."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.current_stream(tensor.device).record_event()
        else:
            self._values = tensor.clone()

    @property
    def arrived(self) -> bool:
        """Whether :meth:`tolist` would wait for nobody."""
        return not self._values.is_meta and (self._event is None or self._event.query())

    def tolist(self) -> list[Any]:
        """The values; waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        found: list[Any] = self._values.tolist()
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> HostCopy:
        return self  # it never changes, and an event cannot be copied
