"""The pool itself: worlds of several sizes, errors that name the rank, and a timeout that frees the suite."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankError, RankPool


def total(rank, world, group, start):
    x = torch.tensor([start + rank])
    dist.all_reduce(x, group=group)
    return x.item(), dist.get_world_size(), os.getpid()


def pairs(rank, world, group):
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    x = torch.tensor([float(rank)])
    dist.all_reduce(x, group=halves[rank // 2])
    return x.item()


def echo(rank, world, group, value):
    return value


def fail_on(rank, world, group, bad):
    if rank == bad:
        raise ValueError(f"rank {rank} has a reason")
    dist.barrier(group=group)


def sleep_on(rank, world, group, bad):
    if rank == bad:
        time.sleep(600)


def die_on(rank, world, group, bad):
    if rank == bad:
        os._exit(3)


def fp8_payload(rank, world, group):
    return torch.arange(4.0).to(torch.float8_e4m3fn)


def test_processes_outlive_a_change_of_world(ranks):
    seen = [ranks(world, total, 10) for world in (2, 4, 1, 2, 2)]
    for world, answers in zip((2, 4, 1, 2, 2), seen):
        expected = sum(10 + rank for rank in range(world))
        assert [(answer[0], answer[1]) for answer in answers] == [(expected, world)] * world
    assert len({answer[2] for answers in seen for answer in answers}) == 4


def test_subgroups(ranks):
    assert ranks(4, pairs) == [1.0, 1.0, 5.0, 5.0]


def test_tensors_travel_both_ways(ranks):
    x = torch.arange(6.0).view(2, 3)
    assert all(torch.equal(y, x) for y in ranks(2, echo, x))
    assert all(y.dtype == torch.float8_e4m3fn for y in ranks(2, fp8_payload))


@pytest.fixture(scope="module")
def own_pool():
    """Failures kill a pool, so these tests break one of their own and leave the session's alone."""
    pool = RankPool(size=2)
    yield pool
    pool.close()


def test_failures_name_the_rank_and_the_pool_recovers(own_pool):
    with pytest.raises(RankError, match=r"rank 1 raised ValueError: rank 1 has a reason[\s\S]*in fail_on"):
        own_pool.run(2, fail_on, 1)
    own_pool.run(2, echo, None)  # the fresh processes are up before the clock starts
    with pytest.raises(RankError, match=r"rank 0 of 2 did not answer within 0.5 s[\s\S]*in sleep_on"):
        own_pool.run(2, sleep_on, 0, timeout_s=0.5)
    with pytest.raises(RankError, match="rank 1 of 2 died, exit code 3"):
        own_pool.run(2, die_on, 1)
    assert own_pool.run(2, echo, "alive") == ["alive", "alive"]


def test_what_cannot_be_sent_is_refused_before_it_is_sent(ranks):
    with pytest.raises(ValueError, match="move it to the top level"):
        ranks(2, lambda rank, world, group: None)
    with pytest.raises(ValueError, match="got 64"):
        ranks(64, echo, None)
