"""Host-offload: states, masters and the update of matrices live on the host, the device has the bytes products read.

    backward    a gradient that is complete goes down, rounded as it is stored, into pinned memory, and is freed
    step        the host steps tensor by tensor; it waits for a gradient when it comes to it
    weights     a tensor's new bytes go up while the next is stepped; what reads the weight on the device waits for it

An element of a matrix in FP8 moves one byte down and one up, and leaves the device one byte, its weight, and in
backward one more, its gradient. Two streams copy, one each way. The step is the same step bit for bit, its kernels the
CPU's own.

Reference: Ren et al., "ZeRO-Offload: Democratizing Billion-Scale Model Training", 2021,
https://arxiv.org/abs/2101.06840, who move two bytes each way and keep 16 on the host.

Left out: plain parameters (norms, biases, skipped modules) are stepped where they lie. The update waits for the end of
backward, for a gradient that is not finite anywhere skips all of it; and a joint norm is the host's to take.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from msamp_like.policy import Policy, Role
from msamp_like.tensor import ScalingTensor

HOST = torch.device("cpu")

Pairs = Sequence[tuple[Tensor, Tensor]]


# --- lanes ----------------------------------------------------------------------------------------------------------


class Ticket(Protocol):
    """Some copies that were asked for together."""

    def await_on_host(self) -> None:
        """Return when they are done."""
        ...

    def await_on_device(self) -> None:
        """Have whatever the device is given from now on come after them."""
        ...


class Lane(Protocol):
    """Copies one way between device and host, in the order in which they are asked for."""

    moved_bytes: int

    def copy(self, pairs: Pairs) -> Ticket:
        """Copy (target, source) pairs, after what the device has been given so far; both may be let go of at once."""
        ...


class StreamLane:
    """A CUDA stream beside the one that computes. Host tensors are pinned, or the copies would not run beside it."""

    def __init__(self, device: torch.device) -> None:
        self.moved_bytes = 0
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, pairs: Pairs) -> Ticket:
        """See :class:`Lane`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                self.moved_bytes += source.nbytes
                # the allocator must not give away what a copy still reads or writes
                (source if source.is_cuda else target).record_stream(self._stream)
        return _Event(self._stream.record_event(), self._device)


class _Event:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def await_on_host(self) -> None:
        self._event.synchronize()

    def await_on_device(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class DirectLane:
    """The twin of :class:`StreamLane` for a device that is the host: copies are done when they are asked for."""

    def __init__(self) -> None:
        self.moved_bytes = 0

    def copy(self, pairs: Pairs) -> Ticket:
        """See :class:`Lane`."""
        for target, source in pairs:
            target.copy_(source)
            self.moved_bytes += source.nbytes
        return _Done()


class _Done:
    def await_on_host(self) -> None:
        return

    def await_on_device(self) -> None:
        return


class Lanes(NamedTuple):
    """Both ways, at once."""

    down: Lane
    up: Lane


def lanes_of(device: torch.device) -> Lanes:
    """New lanes between the host and a device."""
    if device.type == "cuda":
        return Lanes(StreamLane(device), StreamLane(device))
    return Lanes(DirectLane(), DirectLane())


# --- where parameters are stepped -----------------------------------------------------------------------------------


class Home:
    """Where each parameter is stepped: beside its values. :class:`Offloaded` says otherwise."""

    def twin(self, parameter: Tensor) -> Tensor:
        """What is stepped for the parameter, its values up to date and its gradient with it."""
        return parameter

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The gradient that :meth:`twin` has."""
        return parameter.grad

    def device(self, parameter: Tensor) -> torch.device:
        """Of the twin and of the states."""
        return parameter.device

    def finiteness(self, parameter: Tensor) -> Tensor | None:
        """What was found of a gradient that has left; None of one that has not."""
        return None

    def collect(self) -> None:
        """Take every gradient that is still with its parameter."""

    def drop(self) -> None:
        """Let go of the gradients."""

    def send(self, parameter: Tensor) -> None:
        """The twin was written: give the parameter its values."""


@dataclass(kw_only=True, eq=False)
class _Side:
    """What the host has of one parameter, apart from states; ``gradient`` is the buffer that each lands in."""

    twin: ScalingTensor
    gradient: ScalingTensor | None = None
    finiteness: Tensor | None = None


class Offloaded(Home):
    """The host's side of one optimizer's parameters, and its placement: ``passed`` sends new weights up.

    ``prepare`` rounds a gradient that accumulated and gives a small tensor on its device that is finite if and only if
    the gradient is: asking for the decision to skip does not wait for the bytes. A host buffer that is being copied
    from or to says so by its ``arrival``, as a weight does on the device, so whoever comes first waits.

    While ``holding``, gradients stay on the device and add up.
    """

    def __init__(self, parameters: Sequence[Tensor], prepare: Callable[[Tensor], Tensor]) -> None:
        self.holding = False
        self.lanes: dict[torch.device, Lanes] = {}
        self._parameters = parameters
        self._ids = {id(p) for p in parameters}
        self._prepare = prepare
        self._sides: dict[int, _Side] = {}
        # a wait belongs to no compiled graph
        self._arrived = torch.compiler.disable(_arrived)

    def hooks(self) -> list[Any]:
        """One on each matrix, for gradients that nobody reduces; handles to remove them with."""
        trained = [p for p in self._parameters if p.requires_grad and isinstance(p, ScalingTensor)]
        return [p.register_post_accumulate_grad_hook(functools.partial(_call, self)) for p in trained]

    # --- gradients --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def take(self, parameter: Tensor) -> None:
        """The parameter's gradient is complete: it goes down."""
        grad = parameter.grad
        if self.holding or grad is None or id(parameter) not in self._ids or not isinstance(parameter, ScalingTensor):
            return
        twin = self.twin(parameter)
        side = self._sides[id(parameter)]
        if twin.grad is not None:
            raise RuntimeError(
                "an offloaded gradient leaves the device in the backward that completes it, got a second one for a "
                f"parameter of shape {tuple(parameter.shape)} before optimizer.step() or zero_grad(); run all "
                "micro-batches of a step but the last in model.no_sync(), and checkpoints with use_reentrant=False"
            )
        side.finiteness = self._prepare(parameter)
        twin.grad = self._lowered(parameter, side)
        parameter.grad = None

    def _lowered(self, parameter: ScalingTensor, side: _Side) -> ScalingTensor:
        grad: Any = parameter.grad
        buffer = side.gradient
        if buffer is None or buffer.format != grad.format or buffer.block != grad.block:
            buffer = side.gradient = _on_host(grad)
        pairs = [(buffer.payload, grad.payload), (buffer.scale_inv, grad.scale_inv)]
        buffer.arrival = functools.partial(_here, buffer, self._lanes(parameter).down.copy(pairs))
        return buffer

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """See :class:`Home`; it may still be on its way."""
        if not isinstance(parameter, ScalingTensor):
            return parameter.grad
        side = self._sides.get(id(parameter))
        return side.twin.grad if side is not None else None

    def finiteness(self, parameter: Tensor) -> Tensor | None:
        """See :class:`Home`; on the parameter's device."""
        side = self._sides.get(id(parameter))
        return side.finiteness if side is not None else None

    def collect(self) -> None:
        """See :class:`Home`: those that accumulated while holding, or were set by hand."""
        for parameter in self._parameters:
            self.take(parameter)

    def drop(self) -> None:
        """See :class:`Home`."""
        for side in self._sides.values():
            side.twin.grad = side.finiteness = None

    # --- weights ----------------------------------------------------------------------------------------------------

    def twin(self, parameter: Tensor) -> Tensor:
        """See :class:`Home`. Values that somebody else gave the parameter since it was last sent come down first."""
        if not isinstance(parameter, ScalingTensor):
            return parameter
        side = self._sides.get(id(parameter))
        if side is None:
            side = self._sides[id(parameter)] = _Side(twin=_on_host(parameter))
            parameter.recorded = False
        if not parameter.recorded:
            side.twin.copy_(parameter.detach())
            parameter.recorded = True
        return side.twin

    def device(self, parameter: Tensor) -> torch.device:
        """See :class:`Home`."""
        return HOST if isinstance(parameter, ScalingTensor) else parameter.device

    @torch.no_grad()
    def send(self, parameter: Tensor) -> None:
        """See :class:`Home`: the bytes go up; the parameter, and the twin's next writer, wait for them."""
        side = self._sides.get(id(parameter))
        if side is None or not isinstance(parameter, ScalingTensor):
            return
        pairs = [(parameter.payload, side.twin.payload), (parameter.scale_inv, side.twin.scale_inv)]
        ticket = self._lanes(parameter).up.copy(pairs)
        side.twin.arrival = functools.partial(_here, side.twin, ticket)
        parameter.arrival = functools.partial(self._arrived, parameter, ticket)

    # --- a placement ------------------------------------------------------------------------------------------------

    def owns(self, parameter: Tensor) -> bool:
        """Every parameter is stepped by this process."""
        return True

    def ends_part(self, position: int) -> bool:
        """A matrix is stepped alone: its bytes leave while the next is stepped."""
        return isinstance(self._parameters[position], ScalingTensor)

    def passed(self, position: int) -> None:
        """Send what was stepped, and let its gradient go."""
        parameter = self._parameters[position]
        side = self._sides.get(id(parameter))
        if side is not None and side.twin.grad is not None:
            self.send(parameter)
            side.twin.grad = side.finiteness = None

    def finish(self) -> None:
        """Nothing is left to do: whoever reads a weight waits for it."""

    # --- for the caller ---------------------------------------------------------------------------------------------

    def sides(self) -> Iterator[tuple[Tensor, tuple[ScalingTensor, ...]]]:
        """Each parameter and the host's buffers of it that are no states: its weight, its gradient."""
        for parameter in self._parameters:
            side = self._sides.get(id(parameter))
            if side is not None:
                yield parameter, (side.twin, *((side.gradient,) if side.gradient is not None else ()))

    @property
    def moved_bytes(self) -> tuple[int, int]:
        """Bytes that went down and up so far."""
        return sum(lanes.down.moved_bytes for lanes in self.lanes.values()), sum(
            lanes.up.moved_bytes for lanes in self.lanes.values()
        )

    def _lanes(self, parameter: Tensor) -> Lanes:
        if parameter.device not in self.lanes:
            self.lanes[parameter.device] = lanes_of(parameter.device)
        return self.lanes[parameter.device]


def holding_weights(policy: Policy) -> Policy:
    """The policy whose parameters are the weights that products read: a master is then the optimizer's."""
    if policy.parameter is Role.WEIGHT:
        return policy
    return replace(policy, name=f"{policy.name}+parameter=weight", parameter=Role.WEIGHT)


@contextlib.contextmanager
def holding(homes: Iterable[Offloaded]) -> Iterator[None]:
    """Within it, gradients stay on the device and add up."""
    before = [(home, home.holding) for home in homes]
    for home, _ in before:
        home.holding = True
    try:
        yield
    finally:
        for home, held in before:
            home.holding = held


def _on_host(tensor: ScalingTensor) -> ScalingTensor:
    """A host buffer for such a tensor, pinned where that is another device; its contents are nobody's yet."""

    def buffer(part: Tensor) -> Tensor:
        return torch.empty(part.shape, dtype=part.dtype, device=HOST, pin_memory=part.is_cuda)

    return ScalingTensor(buffer(tensor.payload), buffer(tensor.scale_inv), tensor.block, tensor.dtype)


def _here(buffer: ScalingTensor, ticket: Ticket) -> None:
    """The host may touch the buffer."""
    buffer.arrival = None
    ticket.await_on_host()


def _arrived(parameter: ScalingTensor, ticket: Ticket) -> None:
    """The device may read the weight."""
    parameter.arrival = None
    ticket.await_on_device()
    parameter.drop_casts()
    parameter.recorded = True


def _call(home: Offloaded, parameter: Tensor) -> None:
    home.take(parameter)
