"""The pretraining launcher: what a run leaves behind, resumes to the bit, and one clear error before any step."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from msamp_like import checkpoint
from msamp_like.launchers import compare, pretrain
from msamp_like.launchers.pretrain import main, train
from msamp_like.launchers.pretrain_settings import Settings, check, learning_rate
from msamp_like.launchers.ranks import Ranks
from msamp_like.launchers.settings import as_dict, load, parse

MODEL = "--num-layers 1 --dim 64 --num-heads 2 --context 32 --lr 0.01 --eval-batches 4 --threads 1 --device cpu"


@pytest.fixture(autouse=True)
def _threads_as_before():
    """The launcher chooses the number of threads of its process, which here is pytest's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{i} plus {i + 1} is {2 * i + 1}.\n" for i in range(3000)))
    return path


def settings(text: Path, out: Path, *arguments: str) -> Settings:
    given = [*MODEL.split(), "--data", str(text), "--out", str(out), *arguments]
    return parse(Settings, given, program="pretrain")


def run(text: Path, out: Path, *arguments: str) -> list[dict[str, Any]]:
    """Train in this process; the lines of metrics."""
    train(settings(text, out, *arguments), Ranks())
    return metrics(out)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def results(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What of a line is the same on every machine and day."""
    return [tuple(line.get(k) for k in ("step", "loss", "grad_norm", "lr", "validation_loss")) for line in lines]


# --- one run --------------------------------------------------------------------------------------------------------


def test_a_run_leaves_settings_metrics_summary_and_checkpoint(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    main([*MODEL.split(), "--data", str(text), "--out", str(out), "--steps", "12", "--eval-every", "5"])
    lines, summary = metrics(out), json.loads((out / "summary.json").read_text())
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if "validation_loss" in line] == [5, 10, 12]
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert all(line["step_ms"] > 0 and line["memory_bytes"] > 1e6 and line["tokens_per_s"] > 0 for line in lines)
    assert summary["validation_loss"] == lines[-1]["validation_loss"]
    assert summary["train_loss"] == pytest.approx(sum(line["loss"] for line in lines) / 12)
    assert (summary["level"], summary["world_size"], summary["steps"], summary["skipped_steps"]) == ("O2", 1, 12, 0)
    assert summary["state_bytes"]["first_moment"] > summary["state_bytes"]["matrix_parameters"]
    assert 7 <= summary["bytes_per_parameter"] < 7.5  # the compute copy included, and 16 of what is no matrix
    assert summary["wire_bytes"] is None
    assert summary["fp8_report"]["flops_share"] > 0.5
    assert summary["corpus"]["sha256"]
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["command"].startswith("python -m msamp_like.launchers.pretrain --num-layers 1")
    given = Settings(**load(Settings, str(out / "config.yaml")))
    assert as_dict(given) == summary["settings"]
    assert checkpoint.latest(out).name == "step-000012"
    assert checkpoint.read_identity(out / "step-000012")["level"] == "O2"
    assert f"validation loss {summary['validation_loss']:.4f}" in capsys.readouterr().out


def test_levels_learn_alike_and_are_compared(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for level in ("O0", "O2"):
        run(text, tmp_path / level, "--steps", "12", "--level", level, "--save-every", "0")
    compare.main([str(tmp_path / "O2"), str(tmp_path / "O0"), "--out", str(tmp_path / "loss.png")])
    printed = capsys.readouterr().out
    assert f"loss curves: {tmp_path / 'loss.png'}" in printed
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    two, zero = (json.loads((tmp_path / level / "summary.json").read_text()) for level in ("O2", "O0"))
    gap = two["validation_loss"] - zero["validation_loss"]
    assert abs(gap) < 0.2
    assert f"validation loss {gap:+.4f} nats" in printed
    assert zero["bytes_per_parameter"] == pytest.approx(16, rel=0.03)
    assert zero["bytes_per_parameter"] / two["bytes_per_parameter"] > 2.1


def test_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    s = Settings(steps=100, lr=1.0, warmup_steps=10)
    rates = [learning_rate(s, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(Settings(steps=1), 0) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tensor-parallel 3", "must divide the number of ranks, got 3 for 8"),
        ("--tensor-parallel 4 --num-heads 2", "must divide the model's num_heads, got 4 for 2; give a .* --num-heads"),
        ("--tensor-parallel 4 --num-heads 4 --vocab-size 258", "must divide the model's vocab_size, got 4 for 258"),
        (
            "--tensor-parallel 4 --num-heads 4 --sequence-parallel --context 30",
            "divides by the ranks of a model, got 30 tokens for --tensor-parallel 4; give another --context",
        ),
        ("--gradient-release --micro-batches 2", "frees a gradient .* got --micro-batches 2; take one micro-batch"),
        ("--tensor-parallel 2 --batch-size 6", "times data-parallel ranks, got 6 for 1 times 4; give a multiple of 4"),
    ],
)
def test_settings_that_eight_ranks_cannot_have_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(parse(Settings, arguments.split(), program="pretrain"), 8)


def test_a_batch_divides_by_the_models_not_by_the_ranks() -> None:
    given = parse(Settings, ["--batch-size", "4", "--tensor-parallel", "2"], program="pretrain")
    check(given, 8)
    with pytest.raises(ValueError, match="got 4 for 1 times 8"):
        check(parse(Settings, ["--batch-size", "4"], program="pretrain"), 8)


# --- resuming -------------------------------------------------------------------------------------------------------

STEPS = ("--steps", "8", "--save-every", "4", "--eval-every", "4")


@pytest.mark.parametrize(("level", "optimizer"), [("O0", "adamw"), ("O1", "adamw"), ("O2", "adamw"), ("O2", "muon")])
def test_a_resume_continues_to_the_bit(text: Path, tmp_path: Path, level: str, optimizer: str) -> None:
    """Past step 16, when the amax histories are full and what they hold decides the scales."""
    arguments = ("--steps", "20", "--save-every", "18", "--level", level, "--micro-batches", "2")
    arguments += ("--optimizer", optimizer)
    straight = run(text, tmp_path / "straight", *arguments)
    resumed = run(text, tmp_path / "resumed", *arguments, "--resume", str(tmp_path / "straight" / "step-000018"))
    assert results(resumed) == results(straight)[18:]
    ends = [(tmp_path / name / "step-000020" / "state.safetensors").read_bytes() for name in ("straight", "resumed")]
    assert ends[0] == ends[1]


def world_of_two(rank: int, world: int, group: object, text: str, out: str, *arguments: str) -> None:
    ranks = Ranks(rank=rank, local_rank=rank, world=world, local_world=world)
    train(settings(Path(text), Path(out), *arguments), ranks)


def test_two_ranks_share_the_work_of_one_and_resume(text: Path, tmp_path: Path, ranks: Any) -> None:
    one = run(text, tmp_path / "one", *STEPS)
    ranks(2, world_of_two, str(text), str(tmp_path / "two"), *STEPS)
    two = metrics(tmp_path / "two")
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], abs=2e-3)  # the same sequences, other scales
    assert two[-1]["validation_loss"] == pytest.approx(one[-1]["validation_loss"], abs=0.15)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["wire_bytes"]["fp8_sent"] < 0.6 * summary["wire_bytes"]["fp8_bf16"]
    source = str(tmp_path / "two" / "step-000004")
    ranks(2, world_of_two, str(text), str(tmp_path / "resumed"), *STEPS, "--resume", source)
    assert results(metrics(tmp_path / "resumed")) == results(two)[4:]


def test_ctrl_c_leaves_a_readable_run_that_goes_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = run(text, tmp_path / "straight", *STEPS)
    whole_step = pretrain.train_step

    def interrupted(job: Any, forward: Any, step: int) -> dict[str, Any]:
        if step == 6:
            raise KeyboardInterrupt
        return whole_step(job, forward, step)

    out = tmp_path / "run"
    arguments = [*MODEL.split(), "--data", str(text), "--out", str(out), *STEPS]
    monkeypatch.setattr(pretrain, "train_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 130
    assert f"interrupted; the steps so far are in {out}" in capsys.readouterr().out
    assert results(metrics(out)) == results(straight)[:6]
    monkeypatch.setattr(pretrain, "train_step", whole_step)
    main([*arguments, "--resume", "latest"])
    assert results(metrics(out)) == results(straight)


def test_what_a_writer_that_died_has_left_does_not_bar_the_way(text: Path, tmp_path: Path) -> None:
    straight = run(text, tmp_path / "run", *STEPS)
    (tmp_path / "run" / "step-000008").rename(tmp_path / "run" / "step-000008.tmp-00ff")
    assert results(run(text, tmp_path / "run", *STEPS, "--resume", "latest")) == results(straight)
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-000004", "step-000008"]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--level O9", "a level must be one of"),
        ("--micro-batches 16", "must divide by micro-batches times data-parallel ranks, got 8 for 16 times 1"),
        ("--tensor-parallel 2", "--tensor-parallel must divide the number of ranks, got 2 for 1; give"),
        ("--tensor-parallel 0", "--tensor-parallel must be positive, got 0"),
        ("--sequence-parallel", "--sequence-parallel needs a model split over several ranks, got --tensor-parallel 1"),
        ("--tensor-parallel-overlap", "--tensor-parallel-overlap is of split sequences, got it without"),
        ("--zero-stage 3", "--zero-stage must be 0, 1 or 2, or -1 for the level's own, got 3"),
        ("--steps 0", "--steps must be positive, got 0"),
        ("--lr -1", "--lr must not be negative, got -1"),
        ("--overrides lm_head", "takes pattern=product, got 'lm_head'"),
        ("--overrides head=bf16", "an override must match a module's name, got 'head'"),
        ("--overrides lm_head=int4", "int4"),
        ("--num-heads 7", "heads of an even dim"),
        ("--data missing.txt", "found none at 'missing.txt'"),
        ("--context 100000", "more tokens than one sequence"),
        ("--tokenizer missing.json", "--tokenizer must be"),
        ("--resume latest", "a complete checkpoint"),
        ("--resume nowhere", "a checkpoint is a directory"),
        ("--config missing.yaml", "--config must be a file"),
        pytest.param(
            "--device cuda",
            "CUDA device of its own",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_a_mistake_is_one_error_and_no_run(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main([*MODEL.split(), "--data", str(text), "--out", str(out), "--steps", "2", *arguments.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error: ") == 1
    assert not out.exists()


def test_a_run_is_not_overwritten_by_accident(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = [*MODEL.split(), "--data", str(text), "--out", str(out), *STEPS]
    main(arguments)
    first = metrics(out)
    refused = {
        (): "--resume latest to continue the run that is there, or --overwrite",
        ("--resume", f"{out}/step-000004"): "has step-000008",
        ("--resume", "latest"): "--steps must exceed the 8",
        ("--resume", "latest", "--level", "O1", "--steps", "9"): "has level 'O2', this run has 'O1'",
        ("--resume", "latest", "--dim", "32", "--steps", "9"): "resumes the model it was saved with",
        ("--resume", "latest", "--recipe", "current", "--steps", "9"): "policy",
        ("--resume", "latest", "--data", __file__, "--steps", "9"): "resumes the corpus it was saved with",
    }
    for more, message in refused.items():
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*arguments, *more])
        assert message in capsys.readouterr().err
        assert metrics(out) == first
    main([*arguments, "--overwrite", "--seed", "1"])
    assert results(metrics(out)) != results(first)


def test_more_ranks_than_sequences_is_told_once(text: Path, tmp_path: Path) -> None:
    """Under torchrun itself: the ranks that fail agree on who speaks, and no directory is made."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--data", str(text), "--out", str(tmp_path / "run"), "--batch-size", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, "-m", "msamp_like.launchers.pretrain", *MODEL.split(), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: --batch-size must divide by micro-batches times data-parallel ranks, got 1 f") == 1
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    made = pretrain.Run(str(tmp_path / "run"))
    made.start("", first_step=0)
    made.log({"step": 1, "loss": math.nan})
    made.close()
    assert metrics(tmp_path / "run") == [{"step": 1, "loss": None}]


def test_an_unfinished_run_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        compare.main([str(tmp_path)])
    assert stop.value.code == 2
    assert "a finished run has a summary.json" in capsys.readouterr().err


def test_cores_are_shared_among_the_ranks_of_a_machine() -> None:
    cores = Ranks().threads(0)
    assert Ranks(world=2, local_world=2).threads(0) == max(1, cores // 2)
    assert Ranks(world=64, local_world=64).threads(0) == max(1, cores // 64)
    assert Ranks(world=2, local_world=2).threads(5) == 5
