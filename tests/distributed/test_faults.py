"""Ranks that stop: the others fail within the timeout, and name the collective, the bucket and who is missing.

Each scenario breaks processes of its own, forked from a server that has imported torch already. Most of its time is
spent waiting, so a few scenarios run at once, from the first test on that asks for one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from msamp_like import amp
from msamp_like.comm.group import CountedGroup
from msamp_like.comm.roll_call import ranks_text

TIMEOUT_S = 5.0
HANG_S = 50.0
"""More than start, timeout and roll call take on a busy machine, and less than the default group's timeout."""


# --- ranks that may be lost -----------------------------------------------------------------------------------------


def serve(rank, world, folder, kept, pipe, fn, args):
    """Body of a rank: joins the default group and one with a short timeout, calls ``fn`` with that, says what came."""
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    timeout, long = datetime.timedelta(seconds=TIMEOUT_S), datetime.timedelta(minutes=2)
    store = dist.FileStore(f"{folder}/store", world) if kept == "in a file" else on_rank_0(rank, world, folder, long)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=long)
    group = dist.new_group(timeout=timeout)
    dist.barrier()
    try:
        fn(rank, group, *args)
        text = "nothing"
    except RuntimeError as error:
        text = f"{error}\ncaused by {type(error.__cause__).__name__}"
    pipe.send(text)
    with contextlib.suppress(EOFError):
        pipe.recv()  # a rank that has left would look like one that died
    os._exit(0)


def on_rank_0(rank, world, folder, timeout):
    """A TCPStore that the first rank holds, as in a script that is not started by torchrun."""
    port = Path(folder, "port")
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
        port.with_suffix(".new").write_text(str(store.port))
        port.with_suffix(".new").rename(port)
        return store
    while not port.exists():
        time.sleep(0.02)
    return dist.TCPStore("127.0.0.1", int(port.read_text()), world, is_master=False, timeout=timeout)


def lose(context, folder, world, missing, fn, *args, kept="in a file"):
    """Runs ``fn(rank, group, *args)`` on ``world`` ranks; what each rank but ``missing`` raised."""
    folder.mkdir()
    pipes, processes, answers = {}, [], {}
    try:
        for rank in range(world):
            pipes[rank], theirs = context.Pipe()
            arguments = (rank, world, str(folder), kept, theirs, fn, args)
            processes.append(context.Process(target=serve, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
        for rank in set(range(world)) - set(missing):
            try:
                answers[rank] = pipes[rank].recv() if pipes[rank].poll(HANG_S) else "it hangs"
            except EOFError:
                answers[rank] = "it died"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return answers


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """``outcomes(name)`` -> what :func:`lose` gives for that scenario."""
    context, folder = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("faults")
    context.set_forkserver_preload([__name__])
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        futures = {
            name: pool.submit(lose, context, folder / str(i), *arguments, kept=kept)
            for i, (name, (kept, *arguments)) in enumerate(SCENARIOS.items())
        }
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()


# --- what they do ---------------------------------------------------------------------------------------------------


def vanish(how):
    if how == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(3)


class Net(nn.Module):
    """FP8 and plain buckets; ``on_grad`` is called in the middle of backward."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 16)
        self.on_grad = None

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)))
        if self.on_grad is not None:
            y.register_hook(self.on_grad)
        return self.last(y).square().mean()


def train(rank, group, how, where):
    """Three steps, in the second of which rank 1 stops or dies."""
    model = Net()
    model, optimizer = amp.initialize(model, torch.optim.SGD(model.parameters(), lr=0.1), process_group=group)
    for step in range(3):
        if step < 2:
            dist.barrier()  # in the default group, whose timeout is long: the ranks of a busy machine start alike
        lost = rank == 1 and step == 1 and how is not None
        model.on_grad = (lambda grad: vanish(how)) if lost and where == "in backward" else None
        optimizer.zero_grad()
        model(torch.randn(4, 64)).backward()
        if lost:
            vanish(how)
        optimizer.step()


def uneven_steps(rank, group):
    """Rank 1 takes one step, the others two."""
    model = Net()
    model, optimizer = amp.initialize(model, torch.optim.SGD(model.parameters(), lr=0.1), process_group=group)
    dist.barrier()
    for _ in range(1 if rank == 1 else 2):
        model(torch.randn(4, 64)).backward()
        optimizer.step()


def no_parameter(rank, group, level):
    """In its first step rank 1 has a loss that does not depend on the model."""
    model = Net()
    model, optimizer = amp.initialize(model, torch.optim.SGD(model.parameters(), lr=0.1), level, process_group=group)
    dist.barrier()
    for step in range(2):
        x = torch.randn(4, 64, requires_grad=True)
        (x.square().mean() if rank == 1 and step == 0 else model(x)).backward()
        optimizer.step()


def sums(rank, group, how):
    """Rank 0 is there for the first of two."""
    counted = CountedGroup(group)
    for _ in range(2):
        counted.all_reduce(torch.ones(1000), dist.ReduceOp.SUM, "sum").wait()
        if rank == 0:
            vanish(how)


def different_collectives(rank, group):
    """One rank is at another collective, which the others never call."""
    counted = CountedGroup(group)
    if rank == 1:
        counted.all_reduce(torch.ones(7), dist.ReduceOp.MAX, "scalers").wait()
    counted.all_to_all(torch.ones(300), label="comm/bucket0")[1].wait()


def mesh_of_two(rank, group):
    """Groups (0, 1), (2, 3) on axis tp and (0, 2), (1, 3) on axis dp; rank 3 dies."""
    groups = {}
    for axis, all_ranks in {"tp": [[0, 1], [2, 3]], "dp": [[0, 2], [1, 3]]}.items():
        for ranks in all_ranks:
            made = dist.new_group(ranks, timeout=datetime.timedelta(seconds=TIMEOUT_S))
            if rank in ranks:
                groups[axis] = CountedGroup(made, axis)
    dist.barrier()
    for axis, counted in groups.items():
        counted.all_reduce(torch.ones(10), dist.ReduceOp.SUM, axis).wait()
    if rank == 3:
        vanish("dies")
    axes = {0: ["tp"], 1: ["dp", "tp"], 2: ["tp"]}[rank]  # rank 1 meets the dead one before it meets rank 0
    for axis in axes:
        groups[axis].all_reduce(torch.ones(10), dist.ReduceOp.SUM, axis).wait()


SCENARIOS = {
    "dies in backward": ("in a file", 4, [1], train, "dies", "in backward"),
    "stops in backward": ("in a file", 4, [1], train, "stops", "in backward"),
    "dies before the step": ("in a file", 3, [1], train, "dies", "before the step"),
    "healthy": ("in a file", 4, [], train, None, None),
    "store dies": ("on rank 0", 3, [0], sums, "dies"),
    "store stops": ("on rank 0", 3, [0], sums, "stops"),
    "uneven steps": ("in a file", 3, [], uneven_steps),
    "no parameter, O0": ("in a file", 3, [], no_parameter, "O0"),
    "no parameter, O2": ("in a file", 3, [], no_parameter, "O2"),
    "different collectives": ("in a file", 3, [], different_collectives),
    "mesh": ("in a file", 4, [3], mesh_of_two),
}


def at(outcome):
    """Collective, label, axis, rank and world of an error that came in time."""
    found = re.search(r"no end of (\w+) '([^']*)' on axis '(\w+)' on rank (\d+) of (\d+): ", outcome)
    assert found, outcome
    assert "caused by RuntimeError" in outcome
    assert "then restart all of them" in outcome
    return found.groups()


# --- tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "label"),
    [
        ("dies in backward", r"comm/bucket\d(/scales)?"),
        ("stops in backward", r"comm/bucket\d(/scales)?"),
        ("dies before the step", "scalers"),
    ],
)
def test_the_others_name_the_missing_rank(outcomes, scenario, label):
    """A rank that dies is seen at once by some, through a closed connection; one that stops, when the time is up."""
    answers = outcomes(scenario)
    assert len(answers) >= 2
    for rank, outcome in answers.items():
        collective, found, axis, own, world = at(outcome)
        assert collective in ("all_to_all", "all_reduce")
        assert re.fullmatch(label, found), outcome
        assert (axis, own, world) == ("dp", str(rank), str(len(answers) + 1))
        assert ": rank 1 did not answer" in outcome, outcome


def test_without_a_fault_the_same_timeout_raises_nothing(outcomes):
    assert list(outcomes("healthy").values()) == ["nothing"] * 4


@pytest.mark.parametrize("scenario", ["store dies", "store stops"])
def test_a_store_on_the_missing_rank_is_said_and_not_waited_for(outcomes, scenario):
    for outcome in outcomes(scenario).values():
        assert at(outcome)[:3] == ("all_reduce", "sum", "dp")
        assert "which rank is missing cannot be told without the store" in outcome
        assert "rank 0, has stopped too" in outcome


def test_ranks_that_take_different_numbers_of_steps(outcomes):
    """The one that has taken all of its own is alive, but answers no more."""
    first, done, last = outcomes("uneven steps").values()
    assert done == "nothing"
    for outcome in (first, last):
        assert re.fullmatch(r"comm/bucket\d(/scales)?", at(outcome)[1])
        assert ": rank 1 did not answer" in outcome


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_a_loss_that_reaches_no_parameter_on_one_rank(outcomes, level):
    """At O0 its second gradients would be averaged with the others' first; at O2 its scalers with their buckets."""
    first, odd, last = outcomes(f"no parameter, {level}").values()
    assert "its loss reached no parameter" in odd
    for outcome in (first, last):
        assert at(outcome)[1].startswith("comm/bucket")
        assert ": rank 1 did not answer" in outcome


def test_ranks_at_different_collectives_are_told_where_each_is(outcomes):
    """All answer, so nobody is missing; who is elsewhere is said."""
    for rank, outcome in outcomes("different collectives").items():
        assert at(outcome)[1] == ("scalers" if rank == 1 else "comm/bucket0")
        assert "all ranks answer, but not from the same collective" in outcome
        elsewhere = "ranks 0, 2 at all_to_all 'comm/bucket0'" if rank == 1 else "rank 1 at all_reduce 'scalers'"
        assert elsewhere in outcome, outcome


def test_a_rank_of_another_group_is_named_through_the_one_that_waited_for_it(outcomes):
    """Rank 0 never talks to rank 3; it fails when rank 1, which waits for that, never comes, and says so."""
    answers = outcomes("mesh")
    for rank, axis in ((1, "dp"), (2, "tp")):
        assert at(answers[rank])[2] == axis
        assert "world rank 3 did not answer" in answers[rank]
    assert at(answers[0])[2:] == ("tp", "0", "2")
    assert "world rank 1 at all_reduce 'dp' on axis 'dp', without world rank 3" in answers[0], answers[0]


def test_ranks_are_listed_in_runs():
    assert ranks_text([4]) == "rank 4"
    assert ranks_text([7, 0, 1, 2, 5]) == "ranks 0-2, 5, 7"
