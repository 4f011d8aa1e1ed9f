"""The counted peak is that of the allocations, to the byte, and says who made them."""

from __future__ import annotations

import torch

from benchmarks.live_memory import START, mark, peak_of

MIB = 2**20


def work():
    kept = torch.empty(4 * MIB, dtype=torch.uint8)
    torch.empty(8 * MIB, dtype=torch.uint8)  # freed at once: a sum of allocations would have it
    mark("second half")
    first = torch.zeros(6 * MIB, dtype=torch.uint8)
    second = first.float()  # 24 MiB
    del first, kept
    second.sum()


def test_the_peak_is_the_sum_of_what_is_alive():
    found = peak_of(work)
    assert found.bytes == (4 + 6 + 24) * MIB
    assert found.made_in == {START: 4 * MIB, "second half": 30 * MIB}
    assert found.phase == "second half"
    assert found.largest[0] == ("to", 1, 24 * MIB)


def test_what_was_there_before_does_not_count():
    before = torch.empty(16 * MIB, dtype=torch.uint8)
    assert peak_of(lambda: before.add_(1)).bytes < MIB
