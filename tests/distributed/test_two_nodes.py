"""Two nodes, started by their recipe, train as one node of as many ranks does, to the bit, over a link between them."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from msamp_like.launchers import pretrain
from msamp_like.launchers.pretrain_settings import Settings
from msamp_like.launchers.ranks import Ranks
from msamp_like.launchers.settings import parse
from tests.distributed import namespaces
from tests.distributed.namespaces import Node

MISSING = namespaces.missing()
RECIPE = Path(__file__).resolve().parents[2] / "launchers" / "recipes" / "two_nodes.sh"
STEPS = 4
SETTINGS = (
    f"--steps {STEPS} --num-layers 2 --dim 128 --num-heads 2 --context 64 --batch-size 4 "
    "--micro-batches 2 --eval-batches 2 --save-every 0 --threads 1 --device cpu"
).split()

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"two nodes need network namespaces: {MISSING}")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{i} plus {i + 1} is {2 * i + 1}.\n" for i in range(3000)))
    return path


def on_one_node(rank: int, world: int, group: dist.ProcessGroup, arguments: list[str]) -> None:
    settings = parse(Settings, arguments, program="pretrain")
    pretrain.train(settings, Ranks(rank=rank, local_rank=rank, world=world, local_world=world))


def results(out: Path) -> list[dict[str, Any]]:
    """Of every step, what must not depend on where the ranks are."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "validation_loss", "wire_bytes")
    return [{key: line.get(key) for key in kept} for line in lines]


def start(node: Node, first: Node, folder: Path, arguments: list[str], is_host: object) -> subprocess.Popen[str]:
    """The recipe on one node, its torchrun is that of this interpreter."""
    torchrun = folder / "torchrun"
    torchrun.write_text(f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    environment = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "FIRST_NODE": first.address,
        "ADDRESS": node.address,
        "IS_HOST": str(is_host),
        "INTERFACE": namespaces.DEVICE,
        "RANKS": "1",
        "OUT": str(folder / "two"),
    }
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return node.start([str(RECIPE), *arguments], environment=environment, **silent)


@pytest.mark.slow
def test_two_nodes_train_as_one_node_does(ranks, text, tmp_path):
    given = [*SETTINGS, "--data", str(text)]
    with namespaces.two_nodes() as nodes:
        before = [node.sent for node in nodes]
        started = [start(node, nodes[0], tmp_path, given, int(node is nodes[0])) for node in nodes]
        namespaces.finish(started, timeout_s=120)
        sent = [node.sent - old for node, old in zip(nodes, before)]
    ranks(2, on_one_node, ["--level", "O3", *given, "--out", str(tmp_path / "one")])

    two, one = results(tmp_path / "two"), results(tmp_path / "one")
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in two)
    assert two == one
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["world_size"] == 2
    counted = sum(line["wire_bytes"] for line in two)
    # both took part, over the link; the count is the first rank's, and owners of more send more
    assert sent[0] > counted > 100_000, (sent, counted)
    assert sent[1] > counted / 2, (sent, counted)


@pytest.mark.slow
def test_nodes_that_do_not_meet_train_nothing(text, tmp_path):
    """The negative control: a node whose peer stays away gives up, and leaves no run behind."""
    with namespaces.two_nodes() as nodes:
        conf = "1,join_timeout=3"  # seconds; the recipe passes on what follows is_host=
        alone = start(nodes[0], nodes[0], tmp_path, [*SETTINGS, "--data", str(text)], conf)
        with pytest.raises(RuntimeError, match="Timeout"):
            namespaces.finish([alone], timeout_s=60)
        assert nodes[1].sent < 2000  # the kernel's own neighbour discovery
    assert not (tmp_path / "two").exists()
