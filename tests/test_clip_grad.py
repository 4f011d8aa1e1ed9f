"""Clipping: torch's on the real values, whatever each gradient is stored in."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from msamp_like import amp
from msamp_like.formats import BF16, E4M3, E5M2, FP16, FP32
from msamp_like.nn import clip_grad_norm_
from msamp_like.policy import Rule
from msamp_like.scaling import quantize
from msamp_like.tensor import ScalingTensor, norm, real, scaling_tensor
from tests.closeness import same_bits

INFINITY = float("inf")


def mixed() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with gradients in every format and plain ones, and plain twins with the dequantized gradients."""
    ours, plain = [], []
    for number, format in enumerate([E4M3, E5M2, FP16, BF16, FP32, None, None]):
        grad = torch.randn(5, 7) * 3.0**number
        parameter = nn.Parameter(quantize(torch.randn(5, 7), Rule(format=FP16)) if format else torch.randn(5, 7))
        parameter.grad = quantize(grad, Rule(format=format)) if format else grad
        twin = nn.Parameter(torch.zeros(5, 7))
        twin.grad = real(parameter.grad).clone()
        ours.append(parameter)
        plain.append(twin)
    ours.append(nn.Parameter(torch.zeros(3)))  # without a gradient
    return ours, plain


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, INFINITY])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 500.0, 1e6])
@pytest.mark.parametrize("clip", [clip_grad_norm_, nn.utils.clip_grad_norm_], ids=["ours", "torch's"])
def test_equals_torchs_on_the_real_values(norm_type, max_norm, clip):
    """Behaviour 36, within 1e-5; torch's own function gives the same on our gradients."""
    ours, plain = mixed()
    total = clip(ours, max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(plain, max_norm, norm_type)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    for p, q in zip(ours, plain):
        torch.testing.assert_close(real(p.grad), q.grad, rtol=1e-5, atol=0)


def test_an_fp8_gradient_is_not_rounded_again():
    ours, _ = mixed()
    before = copy.deepcopy([p.grad for p in ours[:5]])
    clip_grad_norm_(ours, 1e-3)
    for old, p in zip(before, ours):
        assert same_bits(old.payload, p.grad.payload)
        assert not torch.equal(old.scale_inv, p.grad.scale_inv)


def test_gradients_within_the_bound_are_untouched():
    ours, plain = mixed()
    before = copy.deepcopy([p.grad for p in ours[:7]])
    total = clip_grad_norm_(ours, 1e9)
    assert all(same_bits(old, p.grad) for old, p in zip(before, ours))
    assert total.item() == pytest.approx(torch.cat([q.grad.flatten() for q in plain]).norm().item(), rel=1e-5)


@pytest.mark.parametrize("bad", range(7))
@pytest.mark.parametrize("norm_type", [2.0, INFINITY])
def test_a_non_finite_gradient_stays_visible(bad, norm_type):
    """In any of them: the norm says it, and the gradient it came from still does after clipping."""
    ours, _ = mixed()
    grad = ours[bad].grad
    values = real(grad).clone()
    values[1, 2] = math.nan
    ours[bad].grad = quantize(values, Rule(format=grad.format)) if isinstance(grad, ScalingTensor) else values
    total = clip_grad_norm_(ours, 1.0, norm_type)
    assert not torch.isfinite(total)
    assert not torch.isfinite(real(ours[bad].grad)).all()


def test_one_tensor_and_none():
    ours, plain = mixed()
    torch.testing.assert_close(clip_grad_norm_(ours[0], 1.0), plain[0].grad.norm())
    total = clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0)
    assert (total.shape, total.item()) == ((), 0.0)
    assert clip_grad_norm_(iter(ours[1:]), 1.0) > 0  # a generator, as model.parameters() is


class Elsewhere:
    """What two ranks would do, one after the other: the first call of each leaves its powers, the second adds all."""

    def __init__(self) -> None:
        self.powers: list[Tensor] = []

    def join(self, powers: Tensor, norm_type: float) -> Tensor:
        self.powers.append(powers)
        return torch.stack(self.powers).amax(0) if norm_type == INFINITY else torch.stack(self.powers).sum(0)

    def total(self, total: Tensor, norm_type: float) -> Tensor:
        return total


@pytest.mark.parametrize("norm_type", [1.0, 2.0, INFINITY])
def test_parts_on_several_ranks_have_the_whole_s_norm_to_the_bit(norm_type):
    """The reduction sees one power a parameter, 0 for a gradient that is elsewhere, so the sum has one order."""
    whole, first, second = (torch.manual_seed(0) and mixed()[0] for _ in range(3))
    for i, (p, q) in enumerate(zip(first, second)):
        (p if i % 2 else q).grad = None
    ranks = Elsewhere()
    clip_grad_norm_(first, 1.0, norm_type, reduction=ranks)
    total = clip_grad_norm_(second, 1.0, norm_type, reduction=ranks)
    assert torch.equal(total, clip_grad_norm_(whole, 1.0, norm_type))
    for p, q in zip(second, whole):
        assert p.grad is None or torch.equal(real(p.grad), real(q.grad))


def test_some_of_several_ranks_gradients_have_no_norm():
    """Ours and torch's functions refuse a set of which other ranks hold the rest, and name the way to clip it."""
    ours, _ = mixed()
    ours[0].grad.scattered = True
    with pytest.raises(ValueError, match=r"amp.clip_grad_norm_\(model"):
        clip_grad_norm_(ours, 1.0)
    with pytest.raises(NotImplementedError, match=r"amp.clip_grad_norm_\(model"):
        nn.utils.clip_grad_norm_(ours, 1.0)


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_a_trained_model_is_clipped_at_every_level(level):
    model, _ = amp.initialize(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)), level=level)
    for _ in range(2):  # accumulated: BF16 sums
        model(torch.randn(8, 16)).square().sum().backward()
    before = torch.cat([real(p.grad).flatten() for p in model.parameters()])
    assert amp.clip_grad_norm_(model.parameters(), 0.5).item() == pytest.approx(before.norm().item(), rel=1e-5)
    after = torch.cat([real(p.grad).flatten() for p in model.parameters()])
    assert after.norm().item() == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(after, before * 0.5 / before.norm(), rtol=1e-5, atol=1e-9)


def test_a_norm_never_has_all_of_a_large_gradient_in_fp32(monkeypatch):
    """Control: a gradient with blocks, which is taken as a whole."""
    monkeypatch.setattr(scaling_tensor, "AT_ONCE", 1000)
    grad = torch.randn(70, 50)
    for rule, whole in (
        (Rule(format=E4M3), False),
        (Rule(format=BF16), False),
        (Rule(format=E4M3, block=(1, 10)), True),
    ):
        stored, largest = quantize(grad, rule), []

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, largest=largest):
                made = func(*args, **(kwargs or {}))
                if isinstance(made, Tensor) and made.dtype == torch.float32:
                    largest.append(made.numel())
                return made

        with Sizes():
            found = [norm(stored, ord) for ord in (1.0, 2.0, INFINITY)]
        expected = [torch.linalg.vector_norm(real(stored), ord) for ord in (1.0, 2.0, INFINITY)]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # another order of the same sum
        assert (max(largest) > 1000) == whole
