"""Level lean: an E4M3 weight and what it leaves are a master of 16 bits; five bytes a parameter, all else as ever."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from msamp_like import amp, checkpoint
from msamp_like.formats import BF16, E4M3, FP16, WHOLE
from msamp_like.kernels import Noise, Operand, dequantize_with_residual, quantize_with_residual, reference
from msamp_like.optim import SGD, AdamW, Lion
from msamp_like.policy import LEAN, O2, O3, Role
from msamp_like.tensor import ScalingTensor, real
from tests.closeness import same_bits

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=3e-2, momentum=0.9),
    "Lion": lambda parameters: Lion(parameters, lr=1e-3),
}


def joined(values, largest=None):
    """What a master in two parts reads back as."""
    amax = values.abs().amax().view(1, 1) if largest is None else largest
    payload, scale_inv, residual, _ = quantize_with_residual(values, amax, E4M3)
    return dequantize_with_residual(Operand(payload, scale_inv, WHOLE), residual)


def in_fp16_blocks(values):
    payload, scale_inv, _ = reference.quantize_current(values, FP16, (1, 128))
    return reference.dequantize(payload, scale_inv, (1, 128), torch.float32)


class TestTwoParts:
    """Against FP16 with a scale a block, which O2's master is: every value between two powers of two below the amax."""

    @staticmethod
    def worst(binade, read):
        """The largest relative error of values ``binade`` powers of two below a largest of 1.7."""
        values = torch.linspace(1, 2, 4097)[:-1].view(32, 128) * 2.0**-binade
        values = torch.cat([values, torch.full((32, 128), 1.7)], dim=1)
        blocks = values if read is joined else torch.cat([values[:, :128]], dim=1)
        found = read(blocks)[:, :128]
        return float(((found - values[:, :128]) / values[:, :128]).abs().max())

    @pytest.mark.parametrize("binade", range(1, 15))
    def test_as_fine_as_fp16_where_weights_are(self, binade):
        assert self.worst(binade, joined) <= 2.0**-11
        assert self.worst(binade, in_fp16_blocks) > 2.0**-11 * 0.9  # control: FP16's own is no less

    @pytest.mark.parametrize("binade", [17, 18, 20])
    def test_coarser_than_fp16_far_below_the_largest(self, binade):
        """From 2^-16 of the amax on the step no longer shrinks; FP16's does, for it has a scale a block."""
        assert self.worst(binade, joined) > self.worst(binade, in_fp16_blocks)

    def test_the_error_far_below_is_a_share_of_the_largest(self):
        values = torch.randn(64, 128) * 1e-6
        values[0, 0] = 1.0
        assert float((joined(values) - values).abs().max()) <= 2.0**-26 * 1.01

    def test_stochastic_rounding_keeps_the_mean(self):
        """Of many draws; to nearest (control) the values below half a step are lost."""
        value = torch.full((1, 4096), 1.0 + 2.0**-13)
        value[0, 0] = 1.7
        amax = torch.full((1, 1), 1.7)
        sums = torch.zeros_like(value)
        for step in range(32):
            payload, scale_inv, residual, _ = quantize_with_residual(value, amax, E4M3, Noise(0, 1, step, 4))
            sums += dequantize_with_residual(Operand(payload, scale_inv, WHOLE), residual)
        mean = float((sums / 32 - 1.0)[0, 1:].mean())
        assert abs(mean - 2.0**-13) < 0.07 * 2.0**-13  # 2^17 draws of at most 2^-11
        assert float((joined(value) - 1.0)[0, 1:].mean()) == 0


# --- training -------------------------------------------------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(40, 128),
        nn.Linear(128, 256),
        nn.GELU(),
        nn.Linear(256, 128),
        nn.LayerNorm(128),
        nn.Linear(128, 64),
    )


def initialized(optimizer="AdamW", level="lean", seed=0, **options):
    model = network(seed)
    return amp.initialize(model, OPTIMIZERS[optimizer](model.parameters()), level=level, data_parallel=False, **options)


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step % 4)
    tokens = torch.randint(0, 40, (64,), generator=generator)
    return (model(tokens) - torch.randn(64, 64, generator=generator)).square().mean()


def train(model, stepper, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        loss = loss_of(model, step)
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def stored(model, stepper):
    """Every bit of weights and states."""
    named = [sorted(stepper.state[p].items()) for p in model.parameters()]
    states = [state for pairs in named for _, state in pairs if isinstance(state, torch.Tensor)]
    return [*(p.detach() for p in model.parameters()), *states]


def masters(model, stepper):
    """The masters of all matrices in FP32."""
    pairs = [(p, stepper.state[p]["master_weight"]) for p in model.parameters() if isinstance(p, ScalingTensor)]
    return [dequantize_with_residual(p.operand, m) if m.dtype == torch.int8 else real(m) for p, m in pairs]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trains_as_the_level_above(optimizer):
    """The loss falls, and as it does at O2."""
    lean = train(*initialized(optimizer), steps=12)[-4:].mean()
    o2 = train(*initialized(optimizer, level="O2"), steps=12)[-4:].mean()
    start = train(*initialized(optimizer), steps=4).mean()
    assert lean < 0.95 * start
    assert abs(lean - o2) < 0.2 * (start - o2)


def test_small_steps_add_up():
    """Steps of a thousandth of an E4M3 step move the master by their sum."""
    model, _ = initialized()
    stepper = SGD(model.parameters(), lr=1.0, policy=LEAN)
    weight = model[1].weight
    before = real(weight).detach().clone()
    for _ in range(50):
        weight.grad = ScalingTensor(torch.full(weight.shape, 1.0).to(E4M3.dtype), torch.full((1, 1), 1e-5))
        stepper.step()
    moved = (dequantize_with_residual(weight.operand, stepper.state[weight]["master_weight"]) - before).mean()
    assert abs(float(moved) + 5e-4) < 2e-5
    assert abs(float((real(weight) - before).abs().max())) < 0.02  # the weight itself has moved in steps


def test_a_weight_that_grows_never_saturates():
    """The scale is fixed before the pass, from the last largest value and what a step can add to it."""
    model, stepper = initialized()
    for group in stepper.param_groups:
        group["lr"] = 0.3  # doubles the largest weight in a step
    for step in range(5):
        train(model, stepper, 1, first=step)
        for weight, master in zip([model[1].weight], masters(model, stepper)[1:2], strict=True):
            held = stepper.state[weight]["weight_amax"]
            assert float(held) == pytest.approx(float(master.abs().max()), rel=2e-3)
            assert float(held) <= float(weight.scale_inv) * E4M3.largest


def test_five_bytes():
    model, stepper = initialized()
    loss_of(model, 0).backward()
    stepper.step()
    found = amp.state_bytes(model, stepper)
    converted = [p for p in model.parameters() if isinstance(p, ScalingTensor) and p.gemm is not None]
    embedding = model[0].weight
    assert embedding.format is BF16
    numel = sum(p.numel() for p in converted)
    assert found["weight"] == numel + 4 * len(converted) + 2 * embedding.numel() + 4
    assert found["master_weight"] == numel + 4 * len(converted) + 2 * embedding.numel() + 4 * 40  # O2's, in blocks
    blocks = (numel + embedding.numel()) // 128
    assert found["second_moment"] == found["first_moment"] == numel + embedding.numel() + 4 * blocks
    loss_of(model, 1)
    assert all(p.cast_bytes == 0 for p in converted)  # products read the weight itself
    assert amp.fp8_report(model).flops_share == 1.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resume_continues_bit_for_bit(optimizer, tmp_path):
    model, stepper = initialized(optimizer)
    train(model, stepper, 3)
    checkpoint.save(tmp_path / "c", {"amp": amp.state_dict(model, stepper)}, identity={})
    train(model, stepper, 3, first=3)
    again, resumed = initialized(optimizer, seed=1)
    train(again, resumed, 1)
    amp.load_state_dict(again, resumed, checkpoint.load(tmp_path / "c", expect={})["amp"])
    train(again, resumed, 3, first=3)
    assert all(same_bits(a, b) for a, b in zip(stored(again, resumed), stored(model, stepper), strict=True))
    forgetful, cold = initialized(optimizer, seed=1)
    saved = checkpoint.load(tmp_path / "c", expect={})["amp"]
    for state in saved["optimizers"][0]["state"].values():
        if "weight_amax" in state:
            state["master_weight"].zero_()  # control: the residual is part of the state
    amp.load_state_dict(forgetful, cold, saved)
    train(forgetful, cold, 3, first=3)
    pairs = zip(stored(forgetful, cold), stored(model, stepper), strict=True)
    assert not all(same_bits(a, b) for a, b in pairs)


def test_the_optimizer_may_be_loaded_before_the_model():
    """Loading the weights then makes the record doubtful, and it is kept where it still fits them."""
    model, stepper = initialized()
    train(model, stepper, 3)
    again, resumed = initialized(seed=1)
    resumed.load_state_dict(copy.deepcopy(stepper.state_dict()))
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    assert not again[1].weight.recorded
    for each in (model, again):
        each.eval()  # the histories of activations are no part of these states
    train(model, stepper, 2, first=3)
    train(again, resumed, 2, first=3)
    assert all(same_bits(a, b) for a, b in zip(masters(again, resumed), masters(model, stepper), strict=True))


def test_a_weight_that_the_user_writes_is_taken_up():
    """A larger one too: its scale is looked at again."""
    model, stepper = initialized()
    train(model, stepper, 2)
    weight = model[1].weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape) * 50)
    written = real(weight).detach().clone()
    train(model, stepper, 1, first=2)
    moved = dequantize_with_residual(weight.operand, stepper.state[weight]["master_weight"]) - written
    assert float((moved / written.abs().clamp(min=1.0)).abs().max()) < 2**-4 + 0.02  # half a step, and Adam's


def test_gradients_accumulate():
    model, stepper = initialized()
    with model.no_sync():
        loss_of(model, 0).backward()
    loss_of(model, 1).backward()
    assert model[1].weight.grad.format is BF16
    stepper.step()
    assert all(value.isfinite().all() for value in masters(model, stepper))


@pytest.mark.parametrize("level", ["O2", "lean"])
def test_a_graph_from_before_a_step_is_not_followed_with_weights_from_after_it(level):
    model, stepper = initialized(level=level)
    first, second = loss_of(model, 0), loss_of(model, 1)
    first.backward()
    stepper.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_copies_moves_and_the_way_back():
    model, stepper = initialized()
    train(model, stepper, 2)
    twin = copy.deepcopy(model)
    assert all(same_bits(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=False)
    average.update_parameters(model)
    model.to(torch.float32)
    before = masters(model, stepper)
    train(model, stepper, 1, first=2)
    assert not any(map(torch.equal, masters(model, stepper), before))
    values = [real(p).detach().clone() for p in model.parameters()]
    plain = amp.restore(model)
    assert all(type(p) is nn.Parameter for p in plain.parameters())
    assert all(map(torch.equal, plain.parameters(), values))


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing():
    model, stepper = initialized()
    train(model, stepper, 2)
    before = [t.clone() for t in stored(model, stepper)]
    loss_of(model, 2).backward()
    model[1].weight.grad.mul_(float("inf"))
    stepper.step()
    assert stepper.skipped_steps == 1
    assert all(same_bits(a, b) for a, b in zip(stored(model, stepper), before, strict=True))


def test_masters_change_places():
    """A master in one part is split on loading; half a master is refused where it would be taken for all of it."""
    model, stepper = initialized(level=O3)
    train(model, stepper, 2)
    lean, into = initialized(seed=1)
    lean.load_state_dict(model.state_dict())
    into.load_state_dict(stepper.state_dict())
    for parameter, master in zip((p for p in model.parameters() if p.dim() == 2), masters(lean, into), strict=True):
        one_part = real(stepper.state[parameter]["master_weight"])
        torch.testing.assert_close(master, one_part, rtol=2.0**-11, atol=2.0**-24)
    other, refuses = initialized(level="O2")
    with pytest.raises(ValueError, match="residual is half of a master.*level of the checkpoint"):
        refuses.load_state_dict(into.state_dict())
    assert O2[Role.MASTER_WEIGHT].format is FP16
    del other


def test_an_optimizer_built_on_a_converted_model_splits_what_it_finds():
    model, _ = initialized()
    stepper = AdamW(model.parameters(), lr=1e-2, policy=LEAN)
    train(model, stepper, 2)
    assert stepper.state[model[1].weight]["master_weight"].dtype == torch.int8
