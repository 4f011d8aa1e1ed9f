"""Gradients that are released after their reduction: the bits of a run that keeps them, and what is refused."""

from __future__ import annotations

import pytest
import torch

from msamp_like import amp
from msamp_like.optim import GradientRelease
from msamp_like.tensor import real
from tests.distributed.test_data_parallel import Net, batch


def train(rank, release, level):
    torch.manual_seed(rank)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = amp.initialize(model, optimizer, level=level, gradient_release=release, bucket_bytes=4096)
    left = []
    for step in range(3):
        model(tokens=batch(10 * step + rank)).backward()
        left.append(sum(p.grad is not None for p in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    return {n: real(p).detach().clone() for n, p in model.named_parameters()}, left


def released_and_not(rank, world, group, level):
    (released, none), (kept, all_of_them) = train(rank, True, level), train(rank, False, level)
    return [n for n in kept if not torch.equal(kept[n], released[n])], none, min(all_of_them) > 0, released


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_a_mean_is_stepped_as_it_arrives(ranks, level):
    answers = ranks(2, released_and_not, level)
    assert [answer[:3] for answer in answers] == [([], [0, 0, 0], True)] * 2
    assert all(torch.equal(answers[0][3][n], answers[1][3][n]) for n in answers[0][3])


def refused(rank, world, group):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    try:
        amp.initialize(model, optimizer, level="O3", gradient_release=GradientRelease())
    except ValueError as error:
        return str(error), type(model) is Net
    return "", False


def test_owners_keep_their_gradients(ranks):
    for text, untouched in ranks(2, refused):
        assert "got zero_stage; leave gradient_release out, or give zero_stage=0" in text
        assert untouched
