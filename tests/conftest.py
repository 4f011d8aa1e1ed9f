"""Fixtures for every test: the same seed before each, few threads, and the session's pool of ranks."""

from __future__ import annotations

import os
import random

import hypothesis
import numpy
import pytest
import torch

from msamp_like.kernels import cpu
from tests.distributed.ranks import RankPool

# An example's time says what else the machine does, not whether the code is right.
hypothesis.settings.register_profile("msamp_like", deadline=None)
hypothesis.settings.load_profile("msamp_like")


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _seed():
    """A test gives the same numbers alone and after any other."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=range(cpu.native().simd + 1) if cpu.available() else [], ids=lambda simd: cpu._SIMD_NAMES[simd])
def every_simd(request, monkeypatch):
    """Each instruction set the processor has, though only the best one is used outside the tests."""
    monkeypatch.setattr(cpu.native(), "simd", request.param)


@pytest.fixture(scope="session")
def rank_pool():
    """Four gloo ranks, started by the first test that needs them."""
    pool = RankPool(size=4)
    yield pool
    pool.close()


@pytest.fixture
def ranks(rank_pool):
    """``ranks(world, fn, *args)`` -> ``[fn(rank, world, group, *args), ...]``; see tests/distributed/ranks.py."""
    return rank_pool.run
