"""The definition of the optimizers' fused steps, in plain torch: a table of parameters, each with its gradient and
states.

One row is read, updated in FP32 and written back as it is stored; its compute weight is written in the same step, from
what the row then holds. A faster twin does so in one pass over the bytes of all rows and gives the same bytes.

A master may be stored in two parts of 8 bits, a weight that products read as it is and a residual:

    |value| = (256 * code + residual) steps * scale_inv

One 16-bit number, in other words, with the exponents of the weight's format and 8 mantissa bits more (E4M3 and its
residual: sign, 4 and 11), cut so that the weight is the number rounded to nearest. The weight has one scale, which has
to be known before the first element is written. Adam's comes from the largest value of the last write, kept beside the
residual, and from a bound on what one step can add to it (:func:`largest_ratio`). Any other update's is that of the
largest new value, which costs a pass before the writing one and asks nothing of the update (SGD's has no bound).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msamp_like.formats import WHOLE, Format, format_of
from msamp_like.kernels.reference import (
    Noise,
    Operand,
    amax,
    dequantize,
    encode,
    random_bits,
    scale_inv_from_amax,
    store_,
)

MAX_RATIO = 32.0
"""Where betas**2 leaves no bound (beta1^2 >= beta2), a quotient is clamped here once the sum outgrows it."""

SLACK = 2.0**-10
"""Relative room above a bound for what rounding adds to a stored value, a step of the residual: under 2^-11."""


class AdamScalars(NamedTuple):
    """Scalars of an Adam step, each rounded to FP32 where it is used."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool  # AdamW: decay acts on the weight; Adam: it is added to the gradient


class LionScalars(NamedTuple):
    """Scalars of a Lion step, each rounded to FP32 where it is used."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float


class SgdScalars(NamedTuple):
    """Scalars of an SGD step, each rounded to FP32 where it is used."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool


class Residual(NamedTuple):
    """The lower half of a master whose upper half is the weight itself."""

    payload: Tensor  # int8, shape of the weight
    amax: Tensor  # FP32 (1, 1): the largest magnitude of the last write, before it was rounded


class Row(NamedTuple):
    """One parameter of a table. ``step`` counts from 1. All but the gradient is written in place.

    ``param`` is the master as it is stored, or the weight where a ``residual`` makes it the master. ``copy`` is a
    weight for products that is made from the master each step.
    """

    param: Operand
    grad: Operand
    states: tuple[Operand, ...]
    step: int
    copy: Operand | None = None
    residual: Residual | None = None


# --- Adam -----------------------------------------------------------------------------------------------------------


def adam_update(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    scalars: AdamScalars,
    step: int,
    ratio: float | None = None,
) -> list[Tensor]:
    """One step of Adam or AdamW on FP32 tensors of one shape: new (param, first moment, second moment).

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    with the root of the bias correction taken out of the denominator, which saves a division: m / (sqrt(v) + eps') and
    a rate. ``ratio`` clamps that quotient. 0 / 0 (no gradient yet and eps 0) is NaN, as in torch.

    References: Kingma and Ba, "Adam", 2015, arXiv:1412.6980; Loshchilov and Hutter, "Decoupled Weight Decay
    Regularization", 2019, arXiv:1711.05101.

    Every product and sum is its own rounding: a fused multiply-add would give other last bits on another device.
    """
    s = scalars
    if s.weight_decay != 0:
        if s.decoupled:
            param = param * (1 - s.lr * s.weight_decay)
        else:
            grad = grad + param * s.weight_decay
    first = first * s.beta1 + grad * (1 - s.beta1)
    second = second * s.beta2 + (grad * grad) * (1 - s.beta2)
    rate, eps = corrected(s, step)
    root = second.double().sqrt().float()  # torch's FP32 square root is not correctly rounded on every CPU
    quotient = first / (root + eps)
    if ratio is not None:
        quotient = quotient.clamp(-ratio, ratio)
    return [param - quotient * rate, first, second]


def corrected(scalars: AdamScalars, step: int) -> tuple[float, float]:
    """(rate, eps) with both bias corrections in them: w -= rate * m / (sqrt(v) + eps)."""
    correction1, correction2 = 1 - scalars.beta1**step, (1 - scalars.beta2**step) ** 0.5
    return scalars.lr * correction2 / correction1, scalars.eps * correction2


def largest_ratio(scalars: AdamScalars, step: int) -> float:
    """The largest |m| / sqrt(v) that exact moments can have after ``step`` steps.

    By Cauchy and Schwarz, with q = beta1^2 / beta2: (1 - beta1) / sqrt(1 - beta2) * sqrt(1 + q + ... + q^(step - 1)).
    Rounded moments can exceed it (a second moment that was rounded to 0), and a quotient is clamped to it: that takes
    away rounding's doing and nothing else. For beta1^2 >= beta2 the sum has no limit, and MAX_RATIO clips real updates.
    """
    s = scalars
    if s.beta2 == 0:
        return MAX_RATIO
    q = s.beta1**2 / s.beta2
    if q in (0.0, 1.0):
        total = float(step) if q else 1.0
    else:
        total = math.expm1(min(60.0, step * math.log(q))) / (q - 1)  # e^60 is beyond MAX_RATIO for any betas
    return min(MAX_RATIO, (1 - s.beta1) / (1 - s.beta2) ** 0.5 * total**0.5)


def adam_steps_(rows: Sequence[Row], scalars: AdamScalars, bad: Tensor | None = None) -> None:
    """One fused Adam step of every row in place: dequantize, :func:`adam_update`, requantize with scales from the new
    values; then the row's copy from what is stored. Where ``bad``, FP32 (1,) beside the rows, is not zero, nothing is
    written: so a step is left out that the host does not know yet to be wrong."""
    if is_bad(bad):
        return
    for row in rows:
        first, second = row.states
        g, m, v = (dequantize(t.payload, t.scale_inv, t.block, torch.float32) for t in (row.grad, first, second))
        if row.residual is None:
            w = dequantize(row.param.payload, row.param.scale_inv, row.param.block, torch.float32)
            w, m, v = adam_update(w, g, m, v, scalars, row.step)
            store_(row.param, w)
        else:
            ratio = largest_ratio(scalars, row.step)
            w = dequantize_with_residual(row.param, row.residual.payload)
            w, m, v = adam_update(w, g, m, v, scalars, row.step, ratio)
            growth, increase = bounds(scalars, row.step, ratio)
            store_with_residual_(row.param, row.residual, w, row.residual.amax * growth + increase)
        store_(first, m)
        store_(second, v)
        if row.copy is not None:
            stored = dequantize(row.param.payload, row.param.scale_inv, row.param.block, torch.float32)
            store_(row.copy, stored)


def bounds(scalars: AdamScalars, step: int, ratio: float) -> tuple[float, float]:
    """(growth, increase): no value of a step exceeds ``growth`` times the largest of the one before + ``increase``."""
    kept = max(1.0, abs(1 - scalars.lr * scalars.weight_decay)) if scalars.decoupled else 1.0
    return kept + SLACK, corrected(scalars, step)[0] * ratio * (1 + SLACK)


# --- updates with one state, a momentum -------------------------------------------------------------------------------


def lion_update(param: Tensor, grad: Tensor, momentum: Tensor, scalars: LionScalars, step: int) -> list[Tensor]:
    """w = w (1 - lr decay) - lr sign(beta1 m + (1 - beta1) g);  m = beta2 m + (1 - beta2) g. The sign of NaN is 0.

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv:2302.06675.
    """
    s = scalars
    direction = (momentum * s.beta1 + grad * (1 - s.beta1)).sign()
    return [param * (1 - s.lr * s.weight_decay) - direction * s.lr, momentum * s.beta2 + grad * (1 - s.beta2)]


def sgd_update(param: Tensor, grad: Tensor, momentum: Tensor, scalars: SgdScalars, step: int) -> list[Tensor]:
    """b = momentum b + (1 - dampening) g (b = g at step 1);  w = w - lr (g + momentum b if nesterov else b).

    Reference: Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum in deep learning",
    ICML 2013.
    """
    s = scalars
    if s.weight_decay != 0:
        grad = grad + param * s.weight_decay
    if s.momentum == 0:
        return [param - grad * s.lr, momentum]
    momentum = grad if step == 1 else momentum * s.momentum + grad * (1 - s.dampening)
    direction = grad + momentum * s.momentum if s.nesterov else momentum
    return [param - direction * s.lr, momentum]


def lion_steps_(rows: Sequence[Row], scalars: LionScalars, bad: Tensor | None = None) -> None:
    """One fused Lion step of every row in place; see :func:`steps_`."""
    steps_(rows, functools.partial(lion_update, scalars=scalars), bad)


def sgd_steps_(rows: Sequence[Row], scalars: SgdScalars, bad: Tensor | None = None) -> None:
    """One fused SGD step of every row in place; see :func:`steps_`."""
    steps_(rows, functools.partial(sgd_update, scalars=scalars), bad)


def steps_(
    rows: Sequence[Row],
    update: Callable[..., list[Tensor]],
    bad: Tensor | None = None,
    read: Callable[..., Tensor] = dequantize,
    write: Callable[[Operand, Tensor], None] = store_,
) -> None:
    """Dequantize, ``update(param, grad, *states, step=step)``, requantize with scales from the new values; then the
    row's copy from what is stored. Where ``bad``, FP32 (1,) beside the rows, is not zero, nothing is written.

    ``read`` and ``write`` are the casts, here the definition's.
    """
    if is_bad(bad):
        return
    for row in rows:
        grad, *states = (read(*operand[:3], torch.float32) for operand in (row.grad, *row.states))
        if row.residual is None:
            new, *states = update(read(*row.param[:3], torch.float32), grad, *states, step=row.step)
            write(row.param, new)
        else:
            old = dequantize_with_residual(row.param, row.residual.payload)
            new, *states = update(old, grad, *states, step=row.step)
            store_with_residual_(row.param, row.residual, new, amax(new, WHOLE))
        for operand, value in zip(row.states, states, strict=True):
            write(operand, value)
        if row.copy is not None:
            write(row.copy, read(*row.param[:3], torch.float32))


def is_bad(bad: Tensor | None) -> bool:
    """Whether a step is to write nothing; reads the tensor on the host."""
    return bad is not None and bool(bad)


# --- a master in two parts ------------------------------------------------------------------------------------------


def dequantize_with_residual(weight: Operand, residual: Tensor) -> Tensor:
    """The master in FP32; exact but for the scale."""
    format = format_of(weight.payload.dtype)
    code = weight.payload.view(torch.uint8).int()
    number = ((code & 0x7F) << 8) + residual.int()
    # as FP32 bits, subnormal numbers included, the number is too small by a power of two
    magnitude = (number << _dropped(format)).view(torch.float32) * (1 / _tiny(format))
    return torch.where(code >= 0x80, -magnitude, magnitude) * weight.scale_inv.view(())


def quantize_with_residual(
    x: Tensor, largest: Tensor, format: Format, noise: Noise | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x`` as a weight of ``format``, an 8-bit one, and a residual: (payload, scale_inv, residual, amax of x).

    The scale is that of ``largest``, FP32 (1, 1), at least amax; values beyond it saturate. The 16-bit number of both
    is rounded once, to nearest even or stochastically with ``noise``; the weight is the number rounded to nearest, ties
    away from zero. A tensor with a value that is not finite is flagged as a whole: scale_inv = +inf over payloads of 0.
    """
    found = amax(x, WHOLE)
    scale_inv = torch.where(torch.isfinite(found), scale_inv_from_amax(largest, format), torch.inf)
    scaled = x.float() * (1.0 / scale_inv.view(()))
    scaled = torch.where(torch.isfinite(scale_inv.view(())), scaled, torch.zeros_like(scaled))
    bits, dropped = (scaled.abs() * _tiny(format)).view(torch.int32), _dropped(format)
    if noise is None:
        bits = bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)
    else:
        bits = bits + (random_bits(x.numel(), noise, x.device) >> (16 - dropped)).int().view(x.shape)
    top = int(encode(torch.tensor(format.largest), format).view(torch.uint8))
    number = (bits >> dropped).clamp(max=(top << 8) + 127) + 128
    code = (number >> 8) + torch.where(scaled.view(torch.int32) < 0, 0x80, 0)
    return code.to(torch.uint8).view(format.dtype), scale_inv, ((number & 0xFF) - 128).to(torch.int8), found


def _dropped(format: Format) -> int:
    """Mantissa bits of FP32 that neither the weight nor the residual keeps."""
    return 23 - format.mantissa_bits - 8


def _tiny(format: Format) -> float:
    """What makes the format's smallest normal number FP32's: its exponents are FP32's then, subnormals included."""
    return 2.0**-126 / format.smallest_normal


def store_with_residual_(weight: Operand, residual: Residual, value: Tensor, largest: Tensor) -> None:
    """Overwrite a master of two parts with FP32 ``value``; see :func:`quantize_with_residual`."""
    payload, scale_inv, rest, found = quantize_with_residual(
        value, largest, format_of(weight.payload.dtype), weight.noise
    )
    weight.payload.copy_(payload)
    weight.scale_inv.copy_(scale_inv)
    residual.payload.copy_(rest)
    residual.amax.copy_(found)
