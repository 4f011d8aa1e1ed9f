"""What an optimizer asks of whoever shares its parameters out: :class:`.Offloaded` here, ZeRO's owners in ``comm``."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Placement(Protocol):
    """Which of the parameters this rank steps, and what brings their new values to the other ranks."""

    def owns(self, parameter: Tensor) -> bool:
        """Whether this rank steps the parameter and keeps its states."""
        ...

    def ends_part(self, position: int) -> bool:
        """Whether new values leave as soon as parameter number ``position`` is passed: those after it are stepped
        later."""
        ...

    def passed(self, position: int) -> None:
        """The step is done with parameter number ``position``, whether it changed or not."""
        ...

    def finish(self) -> None:
        """Return when every parameter has its new value."""
        ...
