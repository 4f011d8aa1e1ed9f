"""Phases of BF16 products: what changes, what stays, what is saved, and the launcher's flag."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from msamp_like import amp
from msamp_like.formats import E4M3
from msamp_like.launchers import pretrain
from msamp_like.launchers.pretrain_settings import Settings, check, precision
from msamp_like.policy import O2, Role, Rule
from msamp_like.tensor import ScalingTensor
from tests.closeness import same_bits, sqnr

SHORT = O2.with_rule(Role.INPUT, Rule(format=E4M3, history=4))


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors; waking a second thread for each costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def initialized(level=SHORT, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    return amp.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-2), level, **options)


def train(model: nn.Module, optimizer, steps: range, forward=None) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(24, 16, generator=torch.Generator().manual_seed(step))
        loss = ((forward or model)(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def histories(model: nn.Module) -> list[Tensor]:
    gemms = (model[0].gemm, model[2].gemm)
    return [t.clone() for gemm in gemms for s in (gemm.input, gemm.grad_output) for t in (s.history, s.scale_bits)]


@pytest.mark.parametrize("level", ["O2", "O3", "lean"])
def test_products_of_a_phase_read_the_weight_that_was_stepped(level):
    """Where the parameter is the weight itself too, of which BF16 products read a copy."""
    model, optimizer = initialized(level)
    amp.set_precision(model, "bf16")
    train(model, optimizer, range(2))
    x = torch.randn(8, 16)
    expected = x.bfloat16().float() @ model[0].weight.dequantize().bfloat16().float().t() + model[0].bias
    assert sqnr(expected, model[0](x)) > 120


def test_products_are_bf16_and_everything_else_stays():
    model, optimizer = initialized()
    train(model, optimizer, range(6))
    before, roles = histories(model), {n: p.format for n, p in model.named_parameters() if isinstance(p, ScalingTensor)}
    amp.set_precision(model, "bf16")
    x = torch.randn(8, 16)
    expected = x.bfloat16().float() @ model[0].weight.dequantize().bfloat16().float().t() + model[0].bias
    assert sqnr(expected, model[0](x)) > 120
    train(model, optimizer, range(6, 9))
    assert all(same_bits(a, b) for a, b in zip(before, histories(model), strict=True))
    assert {n: p.format for n, p in model.named_parameters() if isinstance(p, ScalingTensor)} == roles
    assert model[0].weight.grad.format is E4M3
    amp.set_precision(model, "fp8")
    assert sqnr(expected, model[0](x)) < 40
    assert model[0].gemm.input.delayed  # with the scale it had
    train(model, optimizer, range(9, 10))
    assert not all(same_bits(a, b) for a, b in zip(before, histories(model), strict=True))


@pytest.mark.parametrize(("level", "recipe"), [("O0", None), ("O1", "rowwise"), ("O2", "mxfp8"), ("O3", "blockwise")])
def test_every_level_and_recipe_switches_there_and_back(level, recipe):
    """A forward of one phase has the backward of that phase, whenever it comes."""
    model, optimizer = initialized(level, recipe=recipe)
    first = train(model, optimizer, range(10))
    output = model(torch.randn(8, 16))
    amp.set_precision(model, "bf16")
    output.sum().backward()
    train(model, optimizer, range(10, 20))
    amp.set_precision(model, "fp8")
    assert train(model, optimizer, range(20, 40))[-1] < first[0] / 2


def test_the_phase_is_saved_and_a_resume_continues_to_the_bit():
    model, optimizer = initialized()
    train(model, optimizer, range(6))
    amp.set_precision(model, "bf16")
    train(model, optimizer, range(6, 8))
    file = io.BytesIO()
    torch.save(amp.state_dict(model, optimizer), file)
    losses = train(model, optimizer, range(8, 12))
    file.seek(0)
    other, resumed = initialized()
    state = torch.load(file, weights_only=True)
    amp.load_state_dict(other, resumed, state)
    assert train(other, resumed, range(8, 12)) == losses
    other, resumed = initialized()
    amp.load_state_dict(other, resumed, {k: v for k, v in state.items() if k != "precision"})  # an older checkpoint
    assert train(other, resumed, range(8, 12)) != losses


def test_the_report_shows_the_phase():
    model, _ = initialized(overrides={"2": "bf16"})
    assert amp.fp8_report(model).rows[0].reason == ""
    amp.set_precision(model, "bf16")
    report = amp.fp8_report(model)
    assert [row.reason for row in report.rows] == [
        'for now: amp.set_precision(model, "bf16")',
        "policy keeps '2' in bf16",
    ]
    assert report.flops_share == 0
    amp.set_precision(model, "fp8")
    assert amp.fp8_report(model).flops_share > 0


def test_switching_compiles_each_phase_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, optimizer = initialized("O2", recipe="current")
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(12):
        amp.set_precision(model, "bf16" if step % 2 else "fp8")
        train(model, optimizer, range(step, step + 1), forward)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_what_is_refused():
    model, _ = initialized()
    with pytest.raises(ValueError, match='"fp8" or "bf16", got \'fp16\'; choose'):
        amp.set_precision(model, "fp16")
    with pytest.raises(ValueError, match="amp.initialize returned"):
        amp.set_precision(nn.Linear(2, 2), "bf16")
    for share in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"--bf16-last is a share of the steps, 0 to 1, got {share}; give"):
            check(Settings(bf16_last=share), 1)


def test_the_launcher_ends_in_bf16_and_resumes_there(tmp_path: Path):
    """The last quarter of 12 steps: until then the losses are those of a run without it; a resume inside the phase
    continues to the bit."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} plus {i + 1} is {2 * i + 1}.\n" for i in range(3000)))
    model = "--num-layers 1 --dim 64 --num-heads 2 --context 32 --eval-batches 1 --threads 1 --device cpu"

    def run(name: str, *more: str) -> list[float]:
        pretrain.main([*model.split(), "--data", str(text), "--out", str(tmp_path / name), "--steps", "12", *more])
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    plain, mixed = run("plain"), run("mixed", "--bf16-last", "0.25", "--save-every", "10")
    assert plain[:9] == mixed[:9]
    assert plain[9] != mixed[9]
    (tmp_path / "mixed" / "summary.json").unlink()
    for path in (tmp_path / "mixed").glob("step-000012"):
        path.rename(tmp_path / "gone")
    assert run("mixed", "--bf16-last", "0.25", "--resume", "latest") == mixed
    settings = Settings(steps=12, bf16_last=0.25)
    assert [precision(settings, step) for step in (0, 8, 9, 11)] == ["fp8", "fp8", "bf16", "bf16"]
