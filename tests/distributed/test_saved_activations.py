"""FP8 saved activations on a split model: norms on a part of the sequence, activations on a part of the columns."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh

from msamp_like import amp
from msamp_like.comm.tensor_parallel import parallelize, plan_gpt
from msamp_like.telemetry.activations import KeptBytes
from msamp_like.tensor import real
from tests.closeness import sqnr
from tests.distributed.test_composition import CONFIG, data, fresh, optimizer_of, recompute


def split(rank, world, group, recomputed):
    """Loss, gradients and bytes kept, with and without FP8 saved activations."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    found = []
    for saved in (None, "fp8"):
        model = parallelize(fresh(), mesh["tp"], plan_gpt(CONFIG), sequence=True)
        model, _ = amp.initialize(model, optimizer_of(model), level="O2", mesh=mesh, saved_activations=saved)
        if recomputed:
            recompute(model)
        tokens = data(0)
        with KeptBytes(model) as kept, torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        grads = {name: real(p.grad).detach() for name, p in model.named_parameters()}
        found.append((loss.detach(), grads, kept.total))
    return found


def test_split_models_keep_fp8_too(ranks):
    answers = [ranks(2, split, recomputed) for recomputed in (False, True)]
    for both in answers:
        assert torch.equal(both[0][1][0], both[1][1][0])  # what is rounded does not part the ranks
        for plain, saved in both:
            assert abs(plain[0] - saved[0]) < 1e-3
            # the O2 rounding of what comes back through FP8 products, made anew, is the larger noise: about 20 dB
            assert min(sqnr(plain[1][name], grad) for name, grad in saved[1].items()) > 12
            assert saved[2] < plain[2]
    for once, again in zip(*answers, strict=True):
        assert all(torch.equal(once[1][1][name], grad) for name, grad in again[1][1].items())
        assert again[1][2] < 0.8 * once[1][2]
