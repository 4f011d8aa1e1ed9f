"""What one process of a launch knows of the others, with or without torchrun.

``torchrun --nproc-per-node N -m program`` gives each process RANK, WORLD_SIZE and the like; a plain
``python -m program`` gives none, and is a world of one without a process group.

The world is a grid of data-parallel times tensor-parallel ranks. The ranks that share one model are neighbours, so that
they are on one machine where its size allows: they exchange activations in every layer, and the others gradients once a
step.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # its import takes longer than the whole of ours
    from torch.distributed.device_mesh import DeviceMesh

_HEAD_START_S = 30.0
"""Longer than the first rank takes to leave a busy machine; torchrun ends the others as soon as it has."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among its peers; with a ``mesh`` of the axes ("dp", "tp"), some share one model."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1
    mesh: DeviceMesh | None = None

    @classmethod
    def from_environment(cls) -> Ranks:
        """As torchrun has set the environment, or alone."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world=world,
            local_world=int(os.environ.get("LOCAL_WORLD_SIZE", str(world))),
        )

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """One line on the terminal, once for all ranks."""
        if self.is_first:
            print(text, flush=True)

    # --- machine ----------------------------------------------------------------------------------------------------

    def device(self, name: str) -> torch.device:
        """``name`` ("auto", "cpu" or "cuda") as this rank's device; raises ValueError for CUDA where there is none."""
        available = torch.cuda.is_available()
        if name == "cpu" or (name == "auto" and not available):
            return torch.device("cpu")
        count = torch.cuda.device_count() if available else 0
        if self.local_rank >= count:
            raise ValueError(
                f"each rank of a machine needs a CUDA device of its own, got {self.local_world} ranks and {count} "
                f"devices; start at most {count} with --nproc-per-node, or give --device cpu"
            )
        return torch.device("cuda", self.local_rank)

    def threads(self, asked: int) -> int:
        """Threads of this process: ``asked``, or an equal share of the cores that it may use.

        torchrun sets OMP_NUM_THREADS=1 for more than one rank a machine, which would leave most cores idle.
        """
        if asked:
            return asked
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // self.local_world)

    # --- grid -------------------------------------------------------------------------------------------------------

    def split(self, tensor_parallel: int, device: torch.device) -> Ranks:
        """These ranks, each ``tensor_parallel`` neighbours sharing one model; a collective unless that is 1."""
        if tensor_parallel == 1:
            return self
        from torch.distributed.device_mesh import init_device_mesh

        shape = (self.world // tensor_parallel, tensor_parallel)
        return replace(self, mesh=init_device_mesh(device.type, shape, mesh_dim_names=("dp", "tp")))

    @property
    def data_world(self) -> int:
        """How many models there are, each with its own samples."""
        return self.world if self.mesh is None else self.mesh.size(0)

    @property
    def data_rank(self) -> int:
        """Which of them this process works on."""
        return self.rank if self.mesh is None else self.mesh.get_local_rank("dp")

    @property
    def tensor_world(self) -> int:
        """How many ranks share a model, and its samples."""
        return 1 if self.mesh is None else self.mesh.size(1)

    @property
    def tensor_rank(self) -> int:
        """Which part of it this process has."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("tp")

    def __str__(self) -> str:
        if self.mesh is None:
            return f"{self.world} rank(s)"
        return f"{self.world} ranks, {self.data_world} data-parallel x {self.tensor_world} tensor-parallel,"

    # --- together ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def process_group(self, device: torch.device) -> Iterator[None]:
        """NCCL on CUDA, gloo on CPU, for the body; nothing in a world of one or where a group is there already."""
        if self.world == 1 or dist.is_initialized():
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        try:
            yield
        finally:
            dist.destroy_process_group()

    def sum_(self, values: Tensor) -> Tensor:
        """``values`` added up over the data-parallel ranks, in place; every rank gets the same bits, provided that
        those that share a model bring the same."""
        if self.data_world > 1:
            dist.all_reduce(values, group=self.mesh.get_group("dp") if self.mesh is not None else None)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier()

    # --- errors -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def one_error(self) -> Iterator[None]:
        """A user's mistake met in the body ends the process with one line and exit code 2, told by the first rank.

        The others wait for torchrun to end them; one that is still there was alone in its mistake, and tells it.
        """
        try:
            yield
        except (ValueError, OSError, ModuleNotFoundError) as error:
            self._give_way()
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error
        except SystemExit as error:
            if error.code:
                self._give_way()
            raise

    @contextlib.contextmanager
    def first_prints(self) -> Iterator[None]:
        """The terminal belongs to the first rank alone: help and parser errors come once."""
        with contextlib.ExitStack() as stack:
            if not self.is_first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    def _give_way(self) -> None:
        if not self.is_first:
            time.sleep(_HEAD_START_S)
