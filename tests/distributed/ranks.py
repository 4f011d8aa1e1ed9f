"""A pool of gloo ranks, spawned once per test session and reused by every distributed test.

Importing torch costs seconds per process, so processes are kept and only the process group is made anew, and that only
when a test asks for another world size. Inside a call the default group *is* the group of that world, as it would be
under torchrun:

    def sum_of_ranks(rank, world, group, start):       # top level of a test module: it is sent by name
        x = torch.tensor([start + rank])
        dist.all_reduce(x, group=group)
        return x.item()

    def test_sum(ranks):
        assert ranks(2, sum_of_ranks, 10) == [21, 21]

A rank that raises fails the test with that rank's traceback. After a failure or a timeout the other ranks may be left
inside a collective, so the whole pool is killed, and the next call spawns a fresh one.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import importlib
import io
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import torch.distributed as dist

GRACE_S = 2.0
"""How long the other ranks may still answer after one has failed; most of them wait for it in a collective."""


class RankError(RuntimeError):
    """One or more ranks raised, died or did not answer; the text says which, with their tracebacks."""


class Call(NamedTuple):
    """One function call as it travels to a rank; ``generation`` counts the process groups made so far."""

    module: str
    name: str
    args: tuple[Any, ...]
    world: int
    generation: int


class RankPool:
    """``size`` persistent processes; :meth:`run` calls a function on the first ``world`` of them."""

    def __init__(self, size: int = 4, timeout_s: float = 120.0) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._world = 0
        self._generation = 0

    def run(self, world: int, fn: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        """``[fn(rank, world, group, *args) for rank in range(world)]``, each in its own process, all at once."""
        if not 1 <= world <= self.size:
            raise ValueError(f"world must be 1 to {self.size}, the size of the pool, got {world}")
        if "<" in fn.__qualname__:
            raise ValueError(f"a rank imports its function by name, got {fn.__qualname__}; move it to the top level")
        if not self._processes:
            self._start()
        if world != self._world:
            self._world, self._generation = world, self._generation + 1
        message = _dumps(tuple(Call(fn.__module__, fn.__qualname__, args, world, self._generation)))
        for pipe in self._pipes[:world]:
            pipe.send_bytes(message)
        answers, failures = self._collect(world, self.timeout_s if timeout_s is None else timeout_s)
        if failures:
            self.kill()
            raise RankError("\n".join(failures[rank] for rank in failures))
        return [answers[rank] for rank in range(world)]

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="msamp_like_ranks_")
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, self._folder.name), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _collect(self, world: int, timeout_s: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Answers and failures by rank; the first failure cuts the time of the others to ``GRACE_S``."""
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {self._pipes[rank]: rank for rank in range(world)}
        deadline = time.monotonic() + timeout_s
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    ok, answer = _loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(1.0)
                    code = self._processes[rank].exitcode
                    ok, answer = False, f"rank {rank} of {world} died, exit code {code}"
                if ok:
                    answers[rank] = answer
                elif not failures:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                if not ok:
                    failures[rank] = answer
        for rank in waiting.values():
            limit = f"{timeout_s:g} s" if not failures else f"{GRACE_S:g} s after the first failure"
            failures[rank] = f"rank {rank} of {world} did not answer within {limit}; it was at\n{self._stack(rank)}"
        return answers, failures

    def _stack(self, rank: int) -> str:
        """Where a silent rank stands, as its fault handler writes it down on SIGUSR1."""
        os.kill(self._processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(0.3)
        return _stack_file(self._folder.name if self._folder else "", rank).read_text() or "(no Python stack)"

    def kill(self) -> None:
        """Ends every process; the next :meth:`run` starts fresh ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        if self._folder:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder, self._world = [], [], None, 0

    def close(self) -> None:
        """Lets every process leave by itself, for what runs at exit; kills those that do not within seconds."""
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send_bytes(b"")
        for process in self._processes:
            process.join(GRACE_S)
        self.kill()


def _dumps(value: Any) -> bytes:
    """By torch's own writer: plain pickle cannot rebuild a float8 tensor."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _loads(message: bytes) -> Any:
    return torch.load(io.BytesIO(message), weights_only=False)  # from our own processes


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder, f"stack_{rank}")


def _serve(rank: int, pipe: Connection, folder: str) -> None:
    """Body of one rank's process: answers calls until the pipe closes or an empty message comes."""
    stacks = _stack_file(folder, rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends this process
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo resolves the host's name, which a sandbox may not know
    torch.set_num_threads(1)
    generation = 0
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, ConnectionResetError):
            break
        if not message:
            break
        try:
            call = Call(*_loads(message))
            if call.generation != generation:
                _join(rank, call, folder)
                generation = call.generation
            answer = _dumps((True, _answer(rank, call)))
        except BaseException as error:  # noqa: BLE001  a pytest outcome or SystemExit must reach the test as well
            text = f"rank {rank} raised {type(error).__name__}: {error}\n{traceback.format_exc()}"
            answer = _dumps((False, text))
        pipe.send_bytes(answer)
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(rank: int, call: Call, folder: str) -> None:
    """Leaves the old default group, if any, and joins the one of this call's world."""
    if dist.is_initialized():
        gc.collect()  # a test's model may still hold the old group in a cycle
        dist.destroy_process_group()
    store = dist.FileStore(str(Path(folder, f"store_{call.generation}")), call.world)
    timeout = datetime.timedelta(minutes=10)  # longer than any test's: the pool reports who is late, not gloo
    dist.init_process_group("gloo", store=store, rank=rank, world_size=call.world, timeout=timeout)


def _answer(rank: int, call: Call) -> Any:
    fn: Any = importlib.import_module(call.module)
    for part in call.name.split("."):
        fn = getattr(fn, part)
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    return fn(rank, call.world, dist.group.WORLD, *call.args)
