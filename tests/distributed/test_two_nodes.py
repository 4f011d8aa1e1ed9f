"""Two nodes train as one node of as many ranks does, to the bit, over a link that both use."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from msamp_like.launchers import pretrain
from msamp_like.launchers.ranks import Ranks
from msamp_like.launchers.settings import parse
from tests.distributed import namespaces

MISSING = namespaces.missing()
STEPS = 4
SETTINGS = (
    f"--preset tiny --level O3 --steps {STEPS} --num-layers 2 --dim 128 --num-heads 2 --context 64 --batch-size 4 "
    "--micro-batches 2 --eval-batches 2 --save-every 0 --threads 1 --device cpu"
).split()

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"two nodes need network namespaces: {MISSING}")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{i} plus {i + 1} is {2 * i + 1}.\n" for i in range(3000)))
    return path


def on_one_node(rank: int, world: int, group: dist.ProcessGroup, arguments: list[str]) -> None:
    settings = parse(pretrain.Settings, arguments, program="pretrain")
    pretrain.train(settings, Ranks(rank=rank, local_rank=rank, world=world, local_world=world))


def results(out: Path) -> list[dict[str, Any]]:
    """Of every step, what must not depend on where the ranks are."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "validation_loss", "wire_bytes")
    return [{key: line.get(key) for key in kept} for line in lines]


@pytest.mark.slow
def test_two_nodes_train_as_one_node_does(ranks, text, tmp_path):
    given = [*SETTINGS, "--data", str(text)]
    program = [sys.executable, "-m", "torch.distributed.run"]
    launcher = ["-m", "msamp_like.launchers.pretrain", *given, "--out", str(tmp_path / "two")]
    with namespaces.two_nodes() as nodes:
        before = [node.sent for node in nodes]
        started = [
            node.start(
                [*program, *namespaces.torchrun(node, nodes[0]), *launcher],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for node in nodes
        ]
        namespaces.finish(started, timeout_s=120)
        sent = [node.sent - old for node, old in zip(nodes, before)]
    ranks(2, on_one_node, [*given, "--out", str(tmp_path / "one")])

    two, one = results(tmp_path / "two"), results(tmp_path / "one")
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in two)
    assert two == one
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["world_size"] == 2
    counted = sum(line["wire_bytes"] for line in two)
    assert all(bytes_sent > counted > 100_000 for bytes_sent in sent), (sent, counted)  # both took part, over the link


@pytest.mark.slow
def test_nodes_that_do_not_meet_train_nothing(text, tmp_path):
    """The negative control: a node whose peer stays away gives up, and leaves no run behind."""
    with namespaces.two_nodes() as nodes:
        options = namespaces.torchrun(nodes[0], nodes[0])
        options[options.index("is_host=1")] += ",join_timeout=3"
        program = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "msamp_like.launchers.pretrain"]
        alone = nodes[0].start(
            [*program, *SETTINGS, "--data", str(text), "--out", str(tmp_path / "run")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        with pytest.raises(RuntimeError, match="Timeout"):
            namespaces.finish([alone], timeout_s=60)
        assert nodes[1].sent < 2000  # the kernel's own neighbour discovery
    assert not (tmp_path / "run").exists()
