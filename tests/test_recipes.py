"""The recipes start what they say: shells read them, and what reaches torchrun are settings that the launcher takes."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msamp_like.launchers.pretrain import train
from msamp_like.launchers.pretrain_settings import Settings, check
from msamp_like.launchers.ranks import Ranks
from msamp_like.launchers.settings import parse

RECIPES = Path(__file__).resolve().parents[1] / "launchers" / "recipes"
ALL = sorted(RECIPES.iterdir())

STANDINS = {
    "torchrun": 'printf "%s\\n" "$@" > "$RECORD"',
    "python": 'printf "%s\\n" "$@" > "$RECORD"',
    "srun": 'shift; exec "$@"',  # its one option, then a command
    "scontrol": 'printf "%s\\n" alpha beta',
}


@pytest.fixture
def started(tmp_path):
    """``started(recipe, *settings, **environment)``: what the recipe hands to torchrun, word by word."""
    for name, body in STANDINS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    record = tmp_path / "record"

    def start(*command: str, **environment: str) -> list[str]:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        variables = {"PATH": path, "RECORD": str(record), "HOME": str(tmp_path), **environment}
        subprocess.run(command, env=variables, cwd=tmp_path, check=True, capture_output=True)
        return record.read_text().splitlines()

    return start


def options(words: list[str]) -> dict[str, str]:
    return {word: value for word, value in itertools.pairwise(words) if word.startswith("--")}


@pytest.mark.parametrize("recipe", ALL, ids=lambda path: path.name)
def test_a_shell_reads_it_and_nothing_is_unset_by_mistake(recipe):
    subprocess.run(["bash", "-n", str(recipe)], check=True)
    text = recipe.read_text()
    assert text.startswith("#!/usr/bin/env bash\n#")
    assert "set -euo pipefail" in text
    assert re.search(r"\[settings\.\.\.\]", text)
    assert os.access(recipe, os.X_OK)


def test_a_broken_recipe_would_be_seen(tmp_path):
    broken = tmp_path / "broken.sh"
    broken.write_text((RECIPES / "elastic.sh").read_text().replace("\nfi\n", "\n", 1))
    assert subprocess.run(["bash", "-n", str(broken)], capture_output=True).returncode


def test_one_node(started):
    words = started(str(RECIPES / "one_node.sh"), "--steps", "7", RANKS="2")
    assert words[:4] == ["--standalone", "--nproc-per-node", "2", "-m"]
    settings = parse(Settings, words[5:], program="pretrain")
    check(settings, 2)
    assert (settings.level, settings.steps, settings.out) == ("O3", 7, "runs/tiny-O3")


def test_two_nodes(started):
    recipe = str(RECIPES / "two_nodes.sh")
    words = started(recipe, "--steps", "7", FIRST_NODE="10.0.0.1", ADDRESS="10.0.0.2", IS_HOST="0", LEVEL="O2")
    torchrun, launcher = words[: words.index("-m")], words[words.index("-m") + 2 :]
    expected = {
        "--nnodes": "2",
        "--nproc-per-node": "gpu",
        "--local-addr": "10.0.0.2",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "10.0.0.1:29400",
        "--rdzv-id": "two_nodes",
        "--rdzv-conf": "is_host=0",
    }
    assert options(torchrun) == expected
    assert parse(Settings, launcher, program="pretrain").level == "O2"
    plain = started(recipe, FIRST_NODE="alpha")
    assert "--local-addr" not in plain
    assert "--rdzv-conf" not in plain
    with pytest.raises(subprocess.CalledProcessError) as failure:
        started(recipe)
    assert b"FIRST_NODE: the name or address" in failure.value.stderr


def test_elastic_resumes_where_there_is_a_checkpoint(started, tmp_path):
    words = started(str(RECIPES / "elastic.sh"), "--save-every", "5", FIRST_NODE="alpha", OUT="run")
    found = options(words[: words.index("--no-python")])
    assert (found["--nnodes"], found["--max-restarts"], found["--rdzv-backend"]) == ("1:4", "3", "c10d")
    worker = words[words.index("--no-python") + 1 :]
    worker = ["bash", "-c", "\n".join(worker[2 : worker.index("pretrain")]), *worker[worker.index("pretrain") :]]
    first = parse(Settings, started(*worker, OUT="run")[2:], program="pretrain")
    assert (first.resume, first.overwrite, first.out, first.save_every) == ("", True, "run", 5)
    for machines in range(1, 5):
        check(first, 8 * machines)
    (tmp_path / "run" / "step-000005").mkdir(parents=True)
    assert "--overwrite" in started(*worker, OUT="run")  # the checkpoint is not complete
    (tmp_path / "run" / "step-000005" / "checkpoint.json").touch()
    again = parse(Settings, started(*worker, OUT="run")[2:], program="pretrain")
    assert (again.resume, again.overwrite) == ("latest", False)


def test_slurm(started, tmp_path):
    job = {"SLURM_JOB_ID": "4321", "SLURM_JOB_NODELIST": "[alpha-beta]", "SLURM_NNODES": "2", "OUT": "run"}
    words = started("bash", str(RECIPES / "slurm.sbatch"), "--steps", "7", **job)
    found = options(words[: words.index("-m")])
    assert (found["--nnodes"], found["--rdzv-endpoint"]) == ("2", "alpha:29721")
    settings = parse(Settings, words[words.index("-m") + 2 :], program="pretrain")
    assert (settings.preset, settings.steps, settings.overwrite) == ("125M", 7, True)
    (tmp_path / "run" / "step-000005").mkdir(parents=True)
    (tmp_path / "run" / "step-000005" / "checkpoint.json").touch()
    assert started("bash", str(RECIPES / "slurm.sbatch"), **job)[-2:] == ["--resume", "latest"]


DIES_ONCE = """
if [ -e died ]; then exec "$REAL" "$@"; fi
touch died
"$REAL" "$@" &
while [ ! -e run/step-000005/checkpoint.json ] && kill -0 $!; do sleep 0.01; done
kill -9 $!
exit 1
"""


@pytest.mark.slow
def test_an_elastic_run_goes_on_where_a_process_died(tmp_path):
    """Torchrun itself: the worker is killed behind its first checkpoint, and what it began is finished, bit for bit."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} plus {i + 1} is {2 * i + 1}.\n" for i in range(3000)))
    model = (
        "--num-layers 1 --dim 64 --num-heads 2 --context 32 --batch-size 8 --eval-batches 2 --threads 1 --device cpu"
    )
    given = [*model.split(), "--steps", "30", "--save-every", "5", "--data", str(text)]
    for name, body in (("python", DIES_ONCE), ("torchrun", 'exec "$REAL" -m torch.distributed.run "$@"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "REAL": sys.executable}
    settings = {
        "FIRST_NODE": "localhost",
        "PORT": "0",
        "NODES": "1",
        "RANKS": "1",
        "OUT": "run",
        "OMP_NUM_THREADS": "1",
    }
    command = [str(RECIPES / "elastic.sh"), *given]
    subprocess.run(command, env={**environment, **settings}, cwd=tmp_path, check=True, capture_output=True, timeout=180)

    before = torch.get_num_threads()
    whole = parse(Settings, ["--level", "O3", *given, "--out", str(tmp_path / "whole")], program="pretrain")
    try:
        torch.set_num_threads(1)
        train(whole, Ranks())
    finally:
        torch.set_num_threads(before)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["first_step"] >= 5
    runs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "whole")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in runs]
    assert len(losses[0]) == 30
    assert losses[0] == losses[1]
