"""Recipes over ranks: an owner sends weights with their blocks, and what it computes an unsharded run computes too."""

from __future__ import annotations

import pytest
import torch

from msamp_like.policy import O3
from tests.distributed.test_zero import moved, sharded_and_not


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", "mxfp8"])
def test_sharded_weights_are_the_bits_of_an_unsharded_run(ranks, recipe):
    """At O3 the parameter itself is E4M3 in the recipe's blocks; codes and scales of all ranks' weights are equal."""
    results = ranks(2, sharded_and_not, O3.with_recipe(recipe), 1, 4, 1)
    for plain, sharded, start, norms, sharded_norms, skipped in results:
        assert skipped == 0
        assert torch.equal(norms, sharded_norms)
        assert moved(sharded, plain) == []
        assert len(moved(plain, start)) > 3
    assert moved(results[0][1], results[1][1]) == []
