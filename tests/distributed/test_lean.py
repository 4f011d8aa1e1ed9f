"""Level lean over several processes: the residual lives with the owner, and the weights are an unsharded run's bits."""

from __future__ import annotations

import pytest
import torch

from msamp_like import amp
from tests.distributed.test_data_parallel import Net, batch
from tests.distributed.test_zero import sharded_and_not, train, values


@pytest.mark.parametrize(("stage", "micro_batches"), [(1, 2), (2, 1)])
def test_weights_are_the_bits_of_an_unsharded_run(ranks, stage, micro_batches):
    for plain, sharded, start, norms, sharded_norms, skipped in ranks(
        2, sharded_and_not, "lean", stage, 3, micro_batches
    ):
        assert skipped == 0
        assert torch.equal(norms, sharded_norms)
        assert all(torch.equal(plain[n], sharded[n]) for n in plain)
        assert not torch.equal(start["wide.weight"], sharded["wide.weight"])  # control: they have moved


def resumed_alone(rank, world, group):
    """Ranks hold residuals of their own weights, all are saved, and a run without owners goes on from them."""
    model, optimizer, _ = train(rank, world, "lean", 1, 2, 1)
    own = sum("weight_amax" in state for state in optimizer.state.values())
    saved = amp.state_dict(model, optimizer)
    all_of_them = sum("weight_amax" in state for state in saved["optimizers"][0]["state"].values())
    torch.manual_seed(rank)
    again, stepper = Net(), None
    matrices = [p for p in again.parameters() if p.dim() == 2]
    others = [p for p in again.parameters() if p.dim() != 2]
    made = torch.optim.AdamW([{"params": others, "lr": 1e-2}, {"params": matrices}], lr=3e-2)
    again, stepper = amp.initialize(again, made, level="lean", zero_stage=0)
    saved["policy"] = str(amp.policy_of(again))
    amp.load_state_dict(again, stepper, saved)
    for converted, one in ((model, optimizer), (again, stepper)):
        one.zero_grad()
        converted(tokens=batch(100 + rank)).backward()
        one.step()
    left, right = values(model), values(again)
    return own, all_of_them, [n for n in left if not torch.equal(left[n], right[n])]


def test_saved_residuals_are_everybodys(ranks):
    answers = ranks(2, resumed_alone)
    assert [different for _, _, different in answers] == [[], []]
    assert all(0 < own < found for own, found, _ in answers)  # control: each has some alone
