"""Offload over data-parallel ranks: the mean goes to each rank's host, the bits are those without; ZeRO is refused."""

from __future__ import annotations

import torch

from msamp_like import amp
from msamp_like.optim.offload import HOST, Lanes, holding_weights
from msamp_like.policy import O2
from msamp_like.tensor import real
from tests.distributed.test_data_parallel import Net, batch
from tests.test_offload import LateLane


def train(rank, offload):
    torch.manual_seed(rank)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    level = O2 if offload else holding_weights(O2)
    model, optimizer = amp.initialize(model, optimizer, level=level, offload=offload, bucket_bytes=4096)
    if offload:
        optimizer.home.lanes[HOST] = Lanes(LateLane(), LateLane())
    norms = []
    for step in range(3):
        with model.no_sync():
            model(tokens=batch(10 * step + rank + 5)).backward()
        model(tokens=batch(10 * step + rank)).backward()
        norms.append(amp.clip_grad_norm_(model, 0.1))
        optimizer.step()
        optimizer.zero_grad()
    return {n: real(p).detach().clone() for n, p in model.named_parameters()}, torch.stack(norms)


def offloaded_and_not(rank, world, group):
    (offloaded, norms), (kept, expected) = train(rank, "cpu"), train(rank, None)
    return [n for n in kept if not torch.equal(kept[n], offloaded[n])], torch.equal(norms, expected), offloaded


def test_the_bits_of_a_run_without(ranks):
    answers = ranks(2, offloaded_and_not)
    assert [answer[:2] for answer in answers] == [([], True)] * 2
    assert all(torch.equal(answers[0][2][n], answers[1][2][n]) for n in answers[0][2])


def refused(rank, world, group):
    model = Net()
    try:
        amp.initialize(model, torch.optim.AdamW(model.parameters()), level="O3", offload="cpu")
    except ValueError as error:
        return str(error), type(model) is Net
    return "", False


def test_owners_are_refused(ranks):
    for text, untouched in ranks(2, refused):
        assert "got zero_stage; leave offload out, or give zero_stage=0" in text
        assert untouched
