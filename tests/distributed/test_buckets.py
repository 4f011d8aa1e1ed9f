"""How much travels at once: enough for a message to each rank, and what the user says where one does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from msamp_like import amp
from msamp_like.comm.buckets import BUCKET_BYTES, default_bucket_bytes
from tests.distributed.test_data_parallel import raised

NUM_LAYERS, DIM = 6, 32


def test_a_bucket_is_an_eighth_of_the_model_within_what_its_messages_bear():
    assert default_bucket_bytes(2, 1 << 20) == 1 << 18  # a small model: not so small that latency counts
    assert default_bucket_bytes(2, 32 << 20) == 4 << 20
    assert default_bucket_bytes(8, 7 << 30) == BUCKET_BYTES
    for world in (64, 128, 1024, 4096):
        assert default_bucket_bytes(world, 7 << 30) <= max(BUCKET_BYTES, world << 20)
        assert default_bucket_bytes(world, 1 << 20) / world > 90e3  # what a message across nodes has to carry
    assert BUCKET_BYTES / 128 < 90e3  # which buckets of one size would not


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(DIM, DIM, bias=False) for _ in range(NUM_LAYERS)))


def stepped(rank, world, group, stage, bucket_bytes):
    """How many buckets and how many parts of weights a step sent, and the weights after it."""
    model = stack()
    model, optimizer = amp.initialize(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        level="O3",
        zero_stage=stage,
        bucket_bytes=bucket_bytes,
    )
    model(torch.randn(4, DIM, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
    optimizer.step()
    labels = {line.label for line in amp.wire_ledger(model)}
    unplanned = [str(line) for line in amp.wire_ledger(model) if line.sent != line.expected]
    buckets, weights = (
        len([label for label in labels if label.startswith(prefix) and label.count("/") == 1])
        for prefix in ("comm/bucket", "comm/weights")
    )
    return buckets, weights, unplanned, [p.payload.view(torch.uint8).clone() for p in model.parameters()]


@pytest.mark.parametrize("stage", [0, 1])
def test_what_the_user_says_is_how_much_leaves_at_once(ranks, stage):
    """A layer is 1 KiB of codes, and as a weight 4 bytes more. Where a bucket ends changes no bit."""
    one, two = (ranks(2, stepped, stage, size) for size in (None, 2 * DIM * DIM + 8))
    for (buckets, weights, unplanned, stored), (buckets2, weights2, unplanned2, stored2) in zip(one, two, strict=True):
        assert not unplanned
        assert not unplanned2
        assert (buckets, weights) == (1, stage)
        assert (buckets2, weights2) == (NUM_LAYERS / 2, stage * NUM_LAYERS / 2)
        assert all(torch.equal(a, b) for a, b in zip(stored, stored2, strict=True))


def refused(rank, world, group):
    model = stack()
    found = {
        "nothing": raised(lambda: amp.initialize(model, level="O3", bucket_bytes=0)),
        "differ": raised(lambda: amp.initialize(model, level="O3", bucket_bytes=1000 + rank)),
    }
    return found, any(p.dtype != torch.float32 for p in model.parameters())


def test_a_size_that_cannot_be_is_refused_before_anything_is_changed(ranks):
    for found, changed in ranks(2, refused):
        assert not changed
        assert all(word in found["nothing"] for word in ("ValueError", "at least 1", "got 0", "leave it out"))
        assert all(word in found["differ"] for word in ("ValueError", "bucket_bytes", "1000 on rank 0", "1001"))
