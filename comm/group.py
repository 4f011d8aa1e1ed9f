"""A process group that counts what leaves this rank, and says which collective failed.

Every collective of the package goes through one of these, so the ledger of a step is complete: by collective, label and
mesh axis, how many calls and how many bytes. Bytes are counted as the usual algorithms send them:

    all-to-all, all-gather    each byte once to each rank that needs it
    all-reduce                as in a ring, 2 (world - 1) / world of the buffer
    broadcast                 world - 1 copies, by the rank that has it
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from msamp_like.comm.roll_call import abandon, first_line, roll_call

# PyTorch 2.13 renamed the function and warns at the old name; 2.11 has only the old one.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


@dataclass(kw_only=True)
class Entry:
    """One line of a ledger: how often a collective was called under a label, and the bytes this rank sent in it.

    ``planned`` is what the caller said beforehand that it would be, where it knows only at the call.
    """

    axis: str
    collective: str
    label: str
    calls: int = 0
    sent: int = 0
    planned: int = 0


class Pending:
    """A collective under way; :meth:`wait` raises RuntimeError naming it, this rank and the ranks that are missing."""

    def __init__(self, work: dist.Work | None, what: str, group: dist.ProcessGroup | None = None) -> None:
        self.work = work
        self.what = what
        self.group = group

    def wait(self) -> None:
        """Returns when the result is there (on CUDA: when the current stream will see it).

        Raises when a rank is gone, at the latest after the process group's timeout and a few seconds more.
        """
        if self.work is None:
            return
        try:
            self.work.wait()
        except RuntimeError as error:
            abandon(self.group)
            raise RuntimeError(
                f"a collective needs every rank of its group, got no end of {self.what} on rank "
                f"{dist.get_rank(self.group)} of {dist.get_world_size(self.group)}: {roll_call(self.what, self.group)} "
                f"({first_line(error)}); read the logs of the ranks named, then restart all of them"
            ) from error


class CountedGroup:
    """The ranks of one mesh ``axis``: stock collectives, each counted.

    ``group`` is a process group, or None for the world; ``ranks`` are its members in the world's numbering. A group of
    one rank sends nothing.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, axis: str = "dp") -> None:
        self.group = group
        self.axis = axis
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)
        self.ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self._entries: dict[tuple[str, str], Entry] = {}
        self._ended = False

    def __str__(self) -> str:
        return f"{self.axis} {self.world}"

    @property
    def sent(self) -> int:
        """Bytes that this rank sent in this step."""
        return sum(entry.sent for entry in self._entries.values())

    def sent_under(self, labels: Collection[str]) -> int:
        """Bytes of the collectives under these labels and what is below them, ``label/scales`` for example."""
        return sum(e.sent for e in self._entries.values() if e.label in labels or e.label.rpartition("/")[0] in labels)

    @property
    def ledger(self) -> list[Entry]:
        """What was sent in this step, by collective and label."""
        return list(self._entries.values())

    def end_step(self) -> None:
        """The next collective starts a new count; until then the ledger shows the step that ends here."""
        self._ended = True

    def plan(self, collective: str, label: str, sent: int) -> None:
        """Say what the next call of a collective under a label will send, from shapes and formats alone."""
        self._entry(collective, label).planned += sent

    def _entry(self, collective: str, label: str) -> Entry:
        if self._ended:
            self._entries.clear()
            self._ended = False
        return self._entries.setdefault((collective, label), Entry(axis=self.axis, collective=collective, label=label))

    def _count(self, collective: str, label: str, sent: int) -> str:
        entry = self._entry(collective, label)
        entry.calls += 1
        entry.sent += sent
        return f"{collective} {label!r} on axis {self.axis!r}"

    def all_to_all(
        self,
        x: Tensor,
        splits: Sequence[int] | None = None,
        received_splits: Sequence[int] | None = None,
        label: str = "",
    ) -> tuple[Tensor, Pending]:
        """Part r of dim 0 goes to rank r; (what arrives here from rank 0, 1, ..., the work to wait for).

        Equal parts; or ``splits[r]`` rows for rank r, where every rank has the same splits; or, with
        ``received_splits`` too, any that fit together.
        """
        x = x.contiguous()
        if splits is None:
            received, own = torch.empty_like(x), x.shape[0] // self.world
            work = dist.all_to_all_single(received, x, group=self.group, async_op=True)
        else:
            own = splits[self.rank]
            arriving = list(received_splits) if received_splits is not None else [own] * self.world
            received = x.new_empty(sum(arriving), *x.shape[1:])
            work = dist.all_to_all_single(received, x, arriving, list(splits), group=self.group, async_op=True)
        what = self._count("all_to_all", label, x.nbytes - x[:own].nbytes)
        return received, Pending(work, what, self.group)

    def pass_on(self, x: Tensor, distance: int, label: str = "") -> tuple[Tensor, Pending]:
        """``x`` goes to the rank ``distance`` further on; (what arrives from as far back, the work to wait for).

        An all-to-all in which every rank has something for one other: on NCCL a send and a receive, on the communicator
        and the stream of all other collectives of the group, and in their order.
        """
        splits, received_splits = [0] * self.world, [0] * self.world
        splits[(self.rank + distance) % self.world] = x.shape[0]
        received_splits[(self.rank - distance) % self.world] = x.shape[0]
        return self.all_to_all(x, splits, received_splits, label)

    def all_gather(
        self, x: Tensor, sizes: Sequence[int] | None = None, label: str = "", out: Tensor | None = None
    ) -> tuple[Tensor, Pending]:
        """(every rank's ``x`` along dim 0, the work to wait for); ``sizes[r]`` is rank r's dim 0 where they differ.

        Equal parts may be gathered into ``out``, of which ``x`` may be this rank's part.
        """
        x = x.contiguous()
        if sizes is None or len(set(sizes)) == 1:
            gathered = x.new_empty(self.world * x.shape[0], *x.shape[1:]) if out is None else out
            work = _all_gather(gathered, x, group=self.group, async_op=True)
        else:  # no backend gathers parts of different sizes; an all-to-all of copies sends the same bytes
            gathered = x.new_empty(sum(sizes), *x.shape[1:])
            copies = x.repeat(self.world, *[1] * (x.dim() - 1))
            work = dist.all_to_all_single(
                gathered, copies, list(sizes), [x.shape[0]] * self.world, group=self.group, async_op=True
            )
        what = self._count("all_gather", label, x.nbytes * (self.world - 1))
        return gathered, Pending(work, what, self.group)

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType, label: str = "") -> Pending:
        """``x`` becomes the sum or maximum over all ranks, in place, once the work is waited for."""
        work = dist.all_reduce(x, op=op, group=self.group, async_op=True)
        return Pending(work, self._count("all_reduce", label, ring_bytes(x.nbytes, self.world)), self.group)

    def broadcast(self, x: Tensor, source: int = 0, label: str = "") -> None:
        """``x`` becomes that of rank ``source``, in place."""
        work = dist.broadcast(x, group=self.group, group_src=source, async_op=True)
        sent = x.nbytes * (self.world - 1) if self.rank == source else 0
        Pending(work, self._count("broadcast", label, sent), self.group).wait()


def ring_bytes(buffer_bytes: int, world: int) -> int:
    """Bytes that each rank sends in a ring all-reduce of a buffer."""
    return -(-2 * (world - 1) * buffer_bytes // world)
