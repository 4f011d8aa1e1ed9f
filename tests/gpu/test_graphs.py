"""Forward and backward replayed from a CUDA graph give the bits of those that are launched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from msamp_like import amp
from msamp_like.tensor import real
from tests.gpu import NEEDS_GPU

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("options", [{}, {"recipe": "rowwise"}, {"recipe": "blockwise"}, {"saved_activations": "fp8"}])
@pytest.mark.parametrize("level", ["O1", "O2", "lean"])
def test_a_replayed_step_is_the_same_step(level, options):
    """Control: a replay that is not followed by its step ends elsewhere."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 128)).cuda()
    batches = torch.randn(40, 32, 128, device="cuda")

    def trained(graphed: bool, forgets: int = -1) -> list[torch.Tensor]:
        model = copy.deepcopy(plain)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer = amp.initialize(model, optimizer, level=level, data_parallel=False, **options)
        x, graph = torch.empty(32, 128, device="cuda"), None
        for number, batch in enumerate(batches):
            x.copy_(batch)
            if graphed and number == 20:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    model(x).square().mean().backward()
            if graph is not None:
                graph.replay()
            else:
                model(x).square().mean().backward()
            if number != forgets:
                amp.clip_grad_norm_(model, 1.0)
                optimizer.step()
            if graph is None:
                optimizer.zero_grad()
        return [real(p).detach().clone() for p in model.parameters()]

    launched = trained(False)
    assert all(map(torch.equal, trained(True), launched))
    assert not all(map(torch.equal, trained(True, forgets=30), launched))
