"""Roll call: after a collective has failed, which ranks still answer, and where each of them stands.

A backend says that a connection broke or that time ran out, and not which rank is to blame. So each rank whose
collective fails writes into the store of the default process group that it is there and at which collective, and waits
:data:`GRACE_S` for the others to do the same. Who has written nothing by then is named. Only ``get_group_store`` and
the store's own methods are used, so any backend and any rendezvous will do.

The store may live on the very rank that is gone (``torchrun`` keeps it in its agent; a script without it, on rank 0).
It is therefore asked from a thread that nobody waits for longer than a few seconds, and the text then says so.

Seen with gloo, PyTorch 2.13: when a rank dies, those that talk to it fail at once and the others of a ring wait on;
when a rank stops, all fail after the process group's timeout, each at its own time. :func:`abandon` therefore closes
what is left of a gloo group, so that every rank calls the roll at the same time.

NCCL, not measured here: by default (TORCH_NCCL_ASYNC_ERROR_HANDLING=1) ``wait`` only orders streams; when the timeout
passes, the watchdog thread logs "Watchdog caught collective operation timeout", with the operation and its sizes, and
ends the process, so no text of ours appears. With TORCH_NCCL_BLOCKING_WAIT=1 ``wait`` raises torch's DistBackendError,
a RuntimeError, and the roll is called as with gloo.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Sequence

import torch
import torch.distributed as dist

GRACE_S = 3.0
"""How long a rank waits for the others to answer: ranks of one step are rarely further apart."""

_STORE_S = 4.0
"""How long the store may take for it all, over the grace; a store's clock can be as coarse as two seconds."""

_SHOWN = 16
"""Of how many ranks it is looked up and said where they stand."""

_NO_SUCH_TAG = 0x726F6C6C

_NO_STORE = (
    "which rank is missing cannot be told without the store of the process group ({}): whoever holds it, the launcher "
    "or rank 0, has stopped too"
)


def ranks_text(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    listed = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {listed}"


def first_line(error: Exception) -> str:
    """What a backend says, without the C++ stack that may follow."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def abandon(group: dist.ProcessGroup | None) -> None:
    """Close the connections of a gloo group in which a collective has failed, so that no rank waits for the timeout.

    gloo closes them all when any wait of its own runs out of time: one is made to, for a message that nobody sends.
    """
    group = group or dist.group.WORLD
    if group is None or "cpu:gloo" not in dist.get_backend_config(group):
        return
    try:
        group.recv_anysource([torch.empty(1)], _NO_SUCH_TAG).wait(datetime.timedelta(milliseconds=1))
    except RuntimeError:
        return  # what was asked for


def roll_call(at: str, group: dist.ProcessGroup | None) -> str:
    """Which ranks of ``group`` do not answer, in a clause for an error text; ``at`` says where this rank stands.

    Takes as long as the slowest rank, at most :data:`GRACE_S` and a few seconds, whatever the state of the store.
    """
    found: list[str] = []
    roll = threading.Thread(target=_call, args=(at, dist.get_process_group_ranks(group), found), daemon=True)
    roll.start()
    roll.join(GRACE_S + _STORE_S)
    return found[0] if found else _NO_STORE.format("it does not answer")


def _call(at: str, ranks: list[int], found: list[str]) -> None:
    """Body of the thread: the clause goes into ``found``."""
    world = dist.group.WORLD
    if world is None:
        found.append("the process group was destroyed meanwhile")
        return
    store, rank = world.get_group_store(), dist.get_rank()
    noun = "" if len(ranks) == dist.get_world_size() else "world "
    try:
        store.set(_key(rank), at)
        silent = _silent(store, ranks)
        if silent:
            store.set(_key(rank), f"{at}\n{noun}{ranks_text(silent)}")
        others = {r: store.get(_key(r)).decode() for r in [r for r in ranks if r not in {rank, *silent}][:_SHOWN]}
    except RuntimeError as error:
        found.append(_NO_STORE.format(first_line(error)))
        return
    found.append(_clause(at, silent, others, noun))


def _key(rank: int) -> str:
    return f"msamp_like/roll_call/{rank}"


def _silent(store: dist.Store, ranks: list[int]) -> list[int]:
    """The ranks that have not written anything when the grace is over."""
    try:
        store.wait([_key(rank) for rank in ranks], datetime.timedelta(seconds=GRACE_S))
    except RuntimeError:
        return _unwritten(store, ranks)
    return []


def _unwritten(store: dist.Store, ranks: list[int]) -> list[int]:
    """By halves: few of many ranks are missing, and each question is one message to the store."""
    if store.check([_key(rank) for rank in ranks]):
        return []
    if len(ranks) == 1:
        return ranks
    middle = len(ranks) // 2
    return _unwritten(store, ranks[:middle]) + _unwritten(store, ranks[middle:])


def _clause(at: str, silent: list[int], others: dict[int, str], noun: str) -> str:
    places: dict[str, list[int]] = {}
    for rank, text in others.items():
        place, _, missed = text.partition("\n")
        if place != at or (missed and not silent):
            places.setdefault(place + (f", without {missed}" if missed else ""), []).append(rank)
    elsewhere = "; ".join(f"{noun}{ranks_text(ranks)} at {place}" for place, ranks in places.items())
    if silent:
        return f"{noun}{ranks_text(silent)} did not answer within {GRACE_S:g} s" + (
            f", of the others {elsewhere}" if elsewhere else ""
        )
    if elsewhere:
        return f"all ranks answer, but not from the same collective: {elsewhere}"
    return "all ranks answer, from this very collective: one was slower than the timeout, or the network failed"
