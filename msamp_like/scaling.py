"""Scalers: from the amax of a tensor to the scale it is quantized with.

A scale comes from the tensor at hand (current scaling) or from the amax of past steps (delayed scaling, which reads the
tensor once instead of twice). A delayed scaler collects the largest amax of the running step and enters it into its
history when the optimizer steps, for all layers in one call of :func:`roll`. Within a step the maximum is idempotent,
so a forward recomputed by activation checkpointing changes nothing, and every micro-batch of a step uses the same
scale.

:class:`AutoScaler` is the gradient scaling of FP8-LM (Peng et al., 2023, https://arxiv.org/abs/2310.18313, eq. 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from msamp_like import kernels
from msamp_like.formats import BF16, WHOLE
from msamp_like.host_copy import HostCopy
from msamp_like.kernels import Noise, Operand, fused
from msamp_like.policy import Rule
from msamp_like.tensor import ScalingTensor, real, unscaled


def quantize(x: Tensor, rule: Rule, noise: Noise | None = None) -> ScalingTensor:
    """A plain or stored tensor as the rule stores it, scales from its values; outer dtype is ``x.dtype``.

    A non-finite value flags its block through ``scale_inv``; in BF16 and FP32, which have no scale, it stays in the
    payload.
    """
    if isinstance(x, ScalingTensor) and rule.format.scaled and noise is None:
        made = fused.requantize(x.operand, rule.format, rule.block, rule.margin, rule.power_of_two)
        return ScalingTensor(*made, rule.block, x.dtype)
    dtype, x = x.dtype, real(x) if isinstance(x, ScalingTensor) else x
    if not rule.format.scaled:
        return unscaled(x.to(rule.format.dtype), dtype)
    if noise is None:
        payload, scale_inv, _ = kernels.quantize_current(
            x.contiguous(), rule.format, rule.block, rule.margin, rule.power_of_two
        )
    else:
        amax = kernels.amax(x.contiguous(), rule.block)
        scale_inv = kernels.scale_inv_from_amax(amax, rule.format, rule.margin, rule.power_of_two)
        payload = kernels.quantize(x.contiguous(), scale_inv, rule.format, rule.block, noise)
    return ScalingTensor(payload, scale_inv, rule.block, dtype)


class Scaler(torch.nn.Module):
    """Quantizes one tensor of one layer, step after step, as its rule says.

    With a history it scales from the tensor at hand ("in time") until the history is full; a zero amax never enters the
    history, a non-finite one empties it, see :func:`roll`. Nothing is recorded in evaluation or without gradients.

    The buffers are int32: they hold the bit patterns of FP32 numbers, so that a cast of the whole module to half leaves
    them alone, and for numbers that are not negative integer order is numeric order. They are not in the module's
    ``state_dict``, which stays that of the plain model; ``amp.state_dict`` saves them.
    """

    history: Tensor  # (rule.history,) bits of amax, most recent first
    pending: Tensor  # (1, 1) bits of the running step's amax
    scale_bits: Tensor  # (1, 1) bits of the delayed scale_inv

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.paused = False  # in a phase of BF16 products: nothing is quantized or recorded, the history stays
        self.delayed = False  # torch.compile guards on what it reads: a flag, which moves seldom
        self.counts: HostCopy | None = None  # of all that were rolled together last, this one among them
        if rule.history:
            self.register_buffer("history", torch.zeros(rule.history, dtype=torch.int32), persistent=False)
            self.register_buffer("pending", torch.zeros(1, 1, dtype=torch.int32), persistent=False)
            self.register_buffer("scale_bits", torch.zeros(1, 1, dtype=torch.int32), persistent=False)

    @property
    def filled(self) -> int:
        """How many steps the history holds; a full one gives the delayed scale. Reads the device."""
        return int(self.history.count_nonzero()) if self.rule.history else 0

    @property
    def by_rows(self) -> bool:
        """Whether rows may be quantized some after others, with the same result: the scale is delayed, or there is
        none."""
        return self.paused or self.delayed or not self.rule.format.scaled

    def quantize(self, x: Tensor, record: bool) -> Operand:
        """``x`` as stored; with ``record``, its amax takes part in the history."""
        rule = self.rule
        if self.paused or not rule.format.scaled:
            format = BF16 if self.paused else rule.format
            return Operand(x.to(format.dtype), x.new_ones(1, 1, dtype=torch.float32), WHOLE)
        x = x.contiguous()
        if not self.delayed:
            payload, scale_inv, amax = kernels.quantize_current(
                x, rule.format, rule.block, rule.margin, rule.power_of_two
            )
        else:
            payload, amax = kernels.quantize_amax(x, self.scale_bits.view(torch.float32), rule.format, rule.block)
            scale_inv = torch.where(torch.isfinite(amax), self.scale_bits.view(torch.float32), torch.inf)
        if record and rule.history:
            self.pending.copy_(torch.maximum(self.pending, amax.view(torch.int32)))
        return Operand(payload, scale_inv, rule.block)

    @property
    def one_way(self) -> bool:
        """Whether products over the other dim need an operand of their own, see :attr:`.Rule.one_way`."""
        return self.rule.one_way and not self.paused

    def quantize_both(self, x: Tensor, record: bool, *, along: bool, across: bool) -> tuple[Any, Any]:
        """A matrix as two products read it, two operands: one contracts over its last dim, if ``along``, the other over
        its rows, if ``across``; None for what is not asked. The second is of the transpose where the rule is one-way,
        else the first again."""
        if not self.one_way:
            both = self.quantize(x, record)
            return both, both
        rule = self.rule
        if along and across:
            made = kernels.quantize_both(x, rule.format, rule.block, rule.margin, rule.power_of_two)
            return Operand(*made[:2], rule.block), Operand(*made[2:], rule.block)
        # one-way rules have blocks, hence no history to record in
        return self.quantize(x, record) if along else None, self.quantize(x.t(), record) if across else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Scaler:
        """A model that was initialized on the meta device gets memory here, which holds anything but an empty
        history."""
        empty = any(buffer.is_meta for buffer in self.buffers())
        super()._apply(fn, recurse)
        if empty:
            for buffer in self.buffers():
                buffer.zero_()
        return self

    def state(self) -> dict[str, Any]:
        """What a resume needs; the same on every rank after :func:`roll`."""
        if not self.rule.history:
            return {}
        return {"history": self.history.clone(), "scale": self.scale_bits.clone(), "delayed": self.delayed}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state` was taken; raises ValueError for another history length."""
        if len(state.get("history", ())) != self.rule.history:
            raise ValueError(
                f"a saved amax history must be as long as the rule's ({self.rule.history}), got "
                f"{len(state.get('history', ()))}; initialize with the recipe that the checkpoint was made with"
            )
        if self.rule.history:
            self.history.copy_(state["history"])
            self.scale_bits.copy_(state["scale"])
            self.pending.zero_()
            self.delayed = bool(state["delayed"])
            self.counts = None

    def extra_repr(self) -> str:
        return str(self.rule)


@torch.no_grad()
def roll(scalers: Iterable[Scaler], reduce_max: Callable[[Tensor], None] | None = None) -> None:
    """Enter the running step's amax of every scaler into its history and set the scales of the next step.

    ``reduce_max`` makes a tensor of FP32 amaxes, shape (scalers,), the maximum over the ranks that share the model, in
    place: one collective a step, after which all of them hold the same histories.

    Nobody waits for the device, but in the call in which a history may become full. That one was emptied is learned in
    the call after, and until then its scale stays the one before.
    """
    groups: dict[Rule, list[Scaler]] = {}
    for scaler in scalers:
        if scaler.rule.history:
            groups.setdefault(scaler.rule, []).append(scaler)
    if not groups:
        return
    delayed = [scaler for group in groups.values() for scaler in group]
    before = _learn(delayed, _counted(delayed))
    amax = torch.cat([s.pending.view(1) for s in delayed]).view(torch.float32)
    amax = torch.where(torch.isfinite(amax), amax, torch.inf)  # a NaN would not survive gloo's MAX
    if reduce_max is not None:
        reduce_max(amax)
    parts = amax.split([len(group) for group in groups.values()])
    counts = HostCopy(torch.cat([_roll_group(group, part) for group, part in zip(groups.values(), parts, strict=True)]))
    if any(not s.delayed and count + 1 >= s.rule.history for s, count in zip(delayed, before, strict=True)):
        _learn(delayed, counts)
    for scaler in delayed:
        scaler.counts = counts


def _counted(scalers: Sequence[Scaler]) -> HostCopy:
    """How many steps each history holds: the copy made when all of them were rolled last, or a fresh one."""
    counts = scalers[0].counts
    if counts is not None and all(scaler.counts is counts for scaler in scalers):
        return counts
    return HostCopy(torch.stack([scaler.history.count_nonzero() for scaler in scalers]))


def _learn(scalers: Sequence[Scaler], counts: HostCopy) -> list[int]:
    """Decide from how many steps each history holds whether the scale is the delayed one."""
    found: list[int] = counts.tolist()
    for scaler, count in zip(scalers, found, strict=True):
        scaler.delayed = count == scaler.rule.history
    return found


def _roll_group(group: Sequence[Scaler], amax: Tensor) -> Tensor:
    """Scalers of one rule; returns how many steps each history holds, on the device."""
    rule = group[0].rule
    old = torch.stack([s.history for s in group]).view(torch.float32)
    rolled = torch.cat([amax.unsqueeze(1), old[:, :-1]], dim=1)
    history = torch.where((amax == 0).unsqueeze(1), old, rolled)
    history = torch.where(torch.isfinite(amax).unsqueeze(1), history, 0.0)
    largest = history[:, 0] if rule.algorithm == "most_recent" else history.amax(dim=1)
    scale_inv = kernels.scale_inv_from_amax(largest, rule.format, rule.margin, rule.power_of_two)
    scale_bits = torch.where(largest > 0, scale_inv.view(torch.int32), torch.cat([s.scale_bits[0] for s in group]))
    torch._foreach_copy_([s.history for s in group], list(history.view(torch.int32)))
    torch._foreach_copy_([s.scale_bits for s in group], [bits.view(1, 1) for bits in scale_bits])
    torch._foreach_zero_([s.pending for s in group])
    return history.count_nonzero(dim=1)


def saturation(payload: Tensor, largest: float) -> Tensor:
    """Share of the elements that sit at the format's largest magnitude, a scalar FP32 tensor."""
    return (payload.float().abs() == largest).float().mean()


class AutoScaler:
    """FP8-LM's automatic scaling of a gradient before it is summed in FP8: mu between under- and overflow.

    The gradient is stored with ``mu`` times the scale that its amax asks for. After each step the saturation of the
    payload decides: above ``threshold`` mu is halved, else it grows by 2^(1/window), so that ``window`` clean steps
    double it. mu is one FP32 scalar a tensor and stays on the gradient's device.
    """

    def __init__(self, rule: Rule, window: int = 1000, threshold: float = 1e-5, initial: float = 1.0) -> None:
        if window < 1 or not 0 <= threshold < 1 or initial <= 0:
            raise ValueError(
                "mu needs window >= 1, 0 <= threshold < 1 and initial > 0, got "
                f"window={window}, threshold={threshold}, initial={initial}"
            )
        self.rule = rule
        self.window = window
        self.threshold = threshold
        self.mu = torch.tensor(initial, dtype=torch.float32)

    def quantize(self, x: Tensor) -> ScalingTensor:
        """``x`` as stored under the present mu; values beyond the format saturate, and :meth:`update` sees them."""
        self.mu = self.mu.to(x.device)
        amax = kernels.amax(x.contiguous(), self.rule.block)
        scale_inv = kernels.scale_inv_from_amax(amax, self.rule.format, self.rule.margin, self.rule.power_of_two)
        scale_inv = scale_inv / self.mu
        payload = kernels.quantize(x.contiguous(), scale_inv, self.rule.format, self.rule.block)
        return ScalingTensor(payload, scale_inv, self.rule.block, x.dtype)

    def update(self, payload: Tensor) -> None:
        """Adapt mu to the saturation of what was sent, or of the sum that came back."""
        crowded = saturation(payload, self.rule.format.largest) > self.threshold
        self.mu = torch.where(crowded, self.mu * 0.5, self.mu * 2.0 ** (1.0 / self.window))

    def state(self) -> dict[str, Any]:
        """What a resume needs."""
        return {"mu": self.mu.clone()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state` was taken."""
        self.mu = state["mu"].clone()
