"""Scalers: the scale is the one that the amax asks for, now or over the last steps, and nothing else gets in."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msamp_like import scaling
from msamp_like.formats import BF16, E4M3, E5M2, FP16, FP32, WHOLE
from msamp_like.host_copy import HostCopy
from msamp_like.kernels import Noise, dequantize
from msamp_like.policy import Rule
from msamp_like.scaling import AutoScaler, Scaler, quantize, roll, saturation
from msamp_like.tensor import ScalingTensor
from tests.closeness import same_bits, sqnr

SCALED = [E4M3, E5M2, FP16]
BLOCKS = [WHOLE, (1, -1), (1, 128), (128, 128), (1, 32)]


def scale_of(value: float, rule: Rule) -> float:
    return 1 / quantize(torch.tensor([value]), rule).scale_inv.item()


# --- current scaling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "scale"), [(10.0, 32.0), (10000.0, 1 / 32), (448.0, 1.0), (449.0, 0.5), (0.0, 1.0)])
def test_published_scales(value, scale):
    """Behaviour 2, E4M3 with margin 0."""
    assert scale_of(value, Rule(format=E4M3)) == scale


@pytest.mark.parametrize("format", SCALED, ids=str)
@settings(max_examples=80, deadline=None)
@given(value=st.floats(2.0**-100, 2.0**100, width=32), margin=st.integers(0, 3))
def test_amax_ends_up_in_the_top_binade(format, value, margin):
    """Behaviours 4 and 5: an exact power of two, the largest that fits."""
    scale = scale_of(value, Rule(format=format, margin=margin))
    assert math.frexp(scale)[0] == 0.5
    limit = format.largest / 2**margin
    assert limit / 2 < value * scale <= limit


@pytest.mark.parametrize("format", SCALED, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("power", [-20, -3, 5])
def test_quantization_commutes_with_powers_of_two(format, block, power):
    x = torch.randn(7, 150)
    one, other = (quantize(values, Rule(format=format, block=block)) for values in (x, x * 2.0**power))
    assert same_bits(one.payload, other.payload)
    assert torch.equal(one.scale_inv * 2.0**power, other.scale_inv)


@pytest.mark.parametrize("format", SCALED, ids=str)
@pytest.mark.parametrize("value", [1e-45, 1e-38, 3.4028234e38, -3.4028234e38])
def test_extreme_values_get_finite_positive_scales(format, value):
    """Behaviour 7. (FLT_MAX itself rounds up to 2^128 when it is read back: its payload is finite.)"""
    tensor = quantize(torch.tensor([value, 0.0]), Rule(format=format))
    assert math.isfinite(tensor.scale_inv.item())
    assert tensor.scale_inv.item() > 0
    assert torch.isfinite(tensor.payload.float()).all()
    assert abs(value) > 1e38 or torch.isfinite(tensor.dequantize()).all()


def test_exact_scales_fill_the_format():
    """``power_of_two=False`` puts amax on the largest value itself, and costs a rounding in the scale."""
    x = torch.randn(64, 64)
    tensor = quantize(x, Rule(format=E4M3, power_of_two=False))
    assert tensor.payload.float().abs().max() == E4M3.largest
    assert tensor.scale_inv.item() == pytest.approx(x.abs().max().item() / 448, rel=2**-23)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_unscaled_formats_keep_scale_one(rounding):
    x = torch.randn(5, 7)
    noise = Noise(0, 0, 1, 0) if rounding == "stochastic" else None
    for format in (BF16, FP32):
        tensor = quantize(x, Rule(format=format, rounding=rounding), noise)
        assert tensor.scale_inv.item() == 1
        assert torch.equal(tensor.payload, x.to(format.dtype))


def test_stochastic_rounding_keeps_the_mean():
    """A value a quarter of the way between two neighbours is rounded up a quarter of the time: 20,000 draws put the
    share within 4 standard deviations, 0.0123, of it; nearest rounding would give 0."""
    x = torch.full((20000,), 1.0 + 0.25 / 8)
    x[0] = 448.0  # fixes the scale at 1
    up = [
        (quantize(x, Rule(format=E4M3), noise).dequantize()[1:] > 1).float().mean()
        for noise in (Noise(3, 1, 7, 5), None)
    ]
    assert abs(up[0] - 0.25) < 0.0123
    assert up[1] == 0


# --- delayed scaling ------------------------------------------------------------------------------------------------


def step(scaler: Scaler, *values: float) -> list[float]:
    """One training step that sees tensors of these amaxes; returns the scale_inv each got."""
    used = [scaler.quantize(torch.tensor([[v, 0.0]]), record=True).scale_inv.item() for v in values]
    roll([scaler])
    return used


def delayed(history: int = 4, **options) -> Scaler:
    return Scaler(Rule(format=E4M3, history=history, **options))


def inverse_scale(amax: float) -> float:
    return quantize(torch.tensor([amax]), Rule(format=E4M3)).scale_inv.item()


def test_window_of_sixteen_over_a_hundred_steps():
    """Behaviours 27 and 28: in time until 16 steps are in, then from the largest of the last 16."""
    scaler = delayed(16)
    amaxes = (torch.rand(102) * 1000 + 0.1).tolist()
    for number, amax in enumerate(amaxes):
        (used,) = step(scaler, amax)
        seen = [amax] if number < 16 else amaxes[number - 16 : number]
        assert used == inverse_scale(max(seen)), number
    assert scaler.history.view(torch.float32).tolist() == pytest.approx(amaxes[:-17:-1])


def test_most_recent_ignores_older_steps():
    scaler = delayed(3, algorithm="most_recent")
    for amax in (900.0, 500.0, 30.0):
        step(scaler, amax)
    assert step(scaler, 1.0) == [inverse_scale(30.0)]
    assert step(delayed_after((900.0, 500.0, 30.0)), 1.0) == [inverse_scale(900.0)]  # as "max" would have it


def delayed_after(amaxes: tuple[float, ...]) -> Scaler:
    scaler = delayed(len(amaxes))
    for amax in amaxes:
        step(scaler, amax)
    return scaler


def test_all_micro_batches_of_a_step_share_one_scale():
    scaler = delayed_after((8.0, 8.0))
    used = step(scaler, 1.0, 100.0, 3.0)
    assert used == [inverse_scale(8.0)] * 3
    assert scaler.history[0].view(torch.float32) == 100.0  # the largest of them entered, once
    assert scaler.filled == 2


def test_a_zero_amax_never_enters():
    """Behaviour 3: it neither seeds an empty history nor pushes a step out of a full one."""
    scaler = delayed()
    for _ in range(5):
        step(scaler, 0.0)
    assert (scaler.filled, scaler.delayed) == (0, False)
    scaler = delayed_after((8.0, 2.0))
    before = scaler.state()
    assert step(scaler, 0.0) == [inverse_scale(8.0)]
    assert all(torch.equal(before[k], scaler.state()[k]) for k in ("history", "scale"))


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_a_non_finite_amax_empties_the_history(bad):
    """Behaviour 29: its own tensor is flagged, and nothing of it stays. The next step, which starts before the host has
    learned of it, keeps the scale; the one after is scaled in time."""
    scaler = delayed_after((8.0, 8.0))
    assert step(scaler, bad) == [math.inf]
    assert scaler.filled == scaler.history.count_nonzero() == 0
    assert step(scaler, 100.0) == [inverse_scale(8.0)]
    assert (scaler.filled, scaler.delayed) == (1, False)
    assert step(scaler, 30.0) == [inverse_scale(30.0)]
    assert (scaler.filled, scaler.delayed) == (2, True)
    assert step(scaler, 1.0) == [inverse_scale(100.0)]


def test_rolling_waits_for_the_device_only_where_a_history_may_become_full(monkeypatch):
    """Control: a copy that is read where it was made."""
    read: list[int] = []
    made: list[int] = []

    class Counted(HostCopy):
        def __init__(self, tensor):
            super().__init__(tensor)
            made.append(steps)

        def tolist(self):
            if made[-1] == steps:
                read.append(steps)
            return super().tolist()

    monkeypatch.setattr(scaling, "HostCopy", Counted)
    scalers = [delayed(5), delayed(5)]
    for steps in range(30):
        scalers[0].quantize(torch.ones(1, 1), record=True)
        if steps > 9:
            scalers[1].quantize(torch.ones(1, 1), record=True)
        roll(scalers)
        assert [s.delayed for s in scalers] == [steps >= 4, steps >= 14]
    assert read == [0, 4, 14]  # in the first call there is no earlier copy


def test_a_bad_micro_batch_does_not_hide_behind_a_good_one():
    scaler = delayed_after((8.0, 8.0))
    step(scaler, 5.0, float("nan"), 6.0)
    assert scaler.filled == 0


@pytest.mark.parametrize("format", SCALED, ids=str)
def test_values_beyond_the_delayed_scale_saturate(format):
    scaler = Scaler(Rule(format=format, history=1))
    scaler.quantize(torch.tensor([[1.0]]), record=True)
    roll([scaler])
    made = scaler.quantize(torch.tensor([[1e6, -1e6, 0.5]]), record=True)
    top = format.largest * made.scale_inv.item()
    assert dequantize(*made[:2], made.block, torch.float32).tolist() == [[top, -top, 0.5]]
    assert scaler.pending.view(torch.float32).item() == 1e6  # the step after will fit


def test_recording_is_a_choice_and_repeats_change_nothing():
    """Evaluation records nothing; the forward that activation checkpointing repeats is the same maximum again."""
    once, twice, never = (delayed() for _ in range(3))
    x = torch.randn(4, 8)
    once.quantize(x, record=True)
    twice.quantize(x, record=True)
    twice.quantize(x, record=True)
    never.quantize(x * 100, record=False)
    roll([once, twice, never])
    assert all(same_bits(once.state()[k], twice.state()[k]) for k in ("history", "scale"))
    assert (once.filled, twice.filled, never.filled) == (1, 1, 0)


def test_rolling_many_at_once_equals_rolling_each():
    rules = [Rule(format=E4M3, history=3), Rule(format=E5M2, history=2), Rule(format=E4M3), Rule(format=BF16)]
    together, apart = ([Scaler(rule) for rule in rules * 2] for _ in range(2))
    for _ in range(5):
        for number, pair in enumerate(zip(together, apart)):
            x = torch.randn(3, 4) * (number + 1)
            assert all(same_bits(a, b) for a, b in zip(*(s.quantize(x, record=True)[:2] for s in pair)))
        roll(together)
        for scaler in apart:
            roll([scaler])
    for one, other in zip(together, apart):
        assert one.filled == other.filled
        assert one.rule.history == 0 or torch.equal(one.history, other.history)


def test_one_reduction_makes_ranks_agree():
    """``reduce_max`` gets every scaler's amax in one tensor; a NaN arrives there as +inf, which no MAX loses."""
    ranks = [[delayed(2), delayed(2)] for _ in range(2)]
    for scalers, amaxes in zip(ranks, ((1.0, 50.0), (20.0, float("nan")))):
        for scaler, amax in zip(scalers, amaxes):
            scaler.quantize(torch.tensor([[amax]]), record=True)
    calls: list[torch.Tensor] = []
    for scalers in copy.deepcopy(ranks):
        roll(scalers, lambda amax: calls.append(amax.clone()))
    assert [t.tolist() for t in calls] == [[1.0, 50.0], [20.0, math.inf]]
    for scalers in ranks:
        roll(scalers, lambda amax: amax.copy_(torch.maximum(*calls)))
        assert [(s.filled, s.history[0].view(torch.float32).item()) for s in scalers] == [(1, 20.0), (0, 0.0)]


def test_state_continues_to_the_bit():
    one = delayed_after((3.0, 70.0, 5.0))
    other = delayed(3)
    other.load_state(one.state())
    saved = one.state()
    step(one, 600.0)
    assert saved["history"][0].view(torch.float32) == 5.0  # a saved state does not change with its scaler
    step(other, 600.0)
    assert same_bits(one.history, other.history)
    assert (one.filled, one.delayed) == (other.filled, other.delayed) == (3, True)
    assert step(one, 1.0) == step(other, 1.0) == [inverse_scale(600.0)]


def test_state_of_an_emptied_history_continues_to_the_bit():
    """Saved while the host has not learned of it yet: the copy keeps the scale for as long as the original."""
    one, other = delayed_after((3.0, 70.0)), delayed(2)
    step(one, math.inf)
    other.load_state(one.state())
    for amax in (5.0, 6.0, 7.0):
        assert step(one, amax) == step(other, amax)
        assert one.delayed == other.delayed


def test_state_of_another_history_is_refused():
    with pytest.raises(ValueError, match=r"as long as the rule's \(4\), got 3; initialize with the recipe"):
        delayed(4).load_state(delayed(3).state())
    with pytest.raises(ValueError, match="got 0"):
        delayed(4).load_state(Scaler(Rule(format=E4M3)).state())


def test_state_survives_casts_of_the_module():
    """``model.half()`` casts every floating buffer: a history in FP16 would overflow at 65504."""
    scaler = delayed_after((1e6, 1e-7))
    before = scaler.state()
    for cast in (scaler.half(), scaler.bfloat16(), scaler.double()):
        assert same_bits(cast.history, before["history"])
    assert not scaler.state_dict()  # the module's state dict stays the plain model's


# --- automatic scaling of gradients (FP8-LM, eq. 3) -------------------------------------------------------------------


class TestAutoScaler:
    def test_saturation_is_measured_on_the_payload(self):
        payload = torch.tensor([448.0, -448.0, 416.0, 0.0]).to(E4M3.dtype)
        assert saturation(payload, E4M3.largest).item() == 0.5

    def test_a_thousand_clean_steps_double_mu(self):
        """Behaviour 42. 1,000 FP32 products of 2^(1/1000) stay within 1e-4 of 2."""
        scaler = AutoScaler(Rule(format=E4M3))
        payload = torch.zeros(10, dtype=E4M3.dtype)
        for _ in range(1000):
            scaler.update(payload)
        assert scaler.mu.item() == pytest.approx(2.0, rel=1e-4)

    @pytest.mark.parametrize(("crowded", "halves"), [(0, False), (1, False), (2, True)])
    def test_more_than_the_threshold_halves_mu(self, crowded, halves):
        payload = torch.zeros(100_000)
        payload[:crowded] = 448.0  # 1 of 100,000 is the threshold, 1e-5, itself
        scaler = AutoScaler(Rule(format=E4M3))
        scaler.update(payload.to(E4M3.dtype))
        assert scaler.mu.item() == (0.5 if halves else pytest.approx(2 ** (1 / 1000)))

    def test_mu_multiplies_the_scale(self):
        x = torch.randn(16, 16)
        plain = quantize(x, Rule(format=E4M3))
        for mu in (0.25, 1.0):
            scaled = AutoScaler(Rule(format=E4M3), initial=mu).quantize(x)
            assert isinstance(scaled, ScalingTensor)
            assert torch.equal(scaled.scale_inv, plain.scale_inv / mu)
        assert same_bits(scaled, plain)

    def test_large_mu_saturates_and_then_comes_down(self):
        scaler = AutoScaler(Rule(format=E4M3), initial=64.0)
        x = torch.randn(128, 128)
        worst = sqnr(x, scaler.quantize(x))
        for _ in range(12):
            scaler.update(scaler.quantize(x).payload)
        assert scaler.mu.item() <= 2.0
        assert worst < 15 < 25 < sqnr(x, scaler.quantize(x))

    def test_state_continues(self):
        one, other = (AutoScaler(Rule(format=E4M3), initial=mu) for mu in (3.0, 1.0))
        other.load_state(one.state())
        assert other.mu.item() == 3.0
        other.update(torch.zeros(1, dtype=E4M3.dtype))
        assert one.mu.item() == 3.0

    @pytest.mark.parametrize("options", [{"window": 0}, {"threshold": 1.0}, {"threshold": -1e-9}, {"initial": 0.0}])
    def test_bad_settings_are_refused(self, options):
        with pytest.raises(ValueError, match="mu needs window >= 1"):
            AutoScaler(Rule(format=E4M3), **options)
