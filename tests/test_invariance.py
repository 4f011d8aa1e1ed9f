"""What a scale that tokens share can break: an earlier token's output, the output beside padding, a sequence's output
beside another. Each recipe keeps what docs/explanation/numerics.md says it keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.invariance import BUILDS, FORWARD, SHARED, build, gradient_split
from msamp_like.models.gpt import PRESETS

CONFIG = replace(PRESETS["tiny"], num_layers=2, context=16)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors; waking a second thread for each costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[name for name in BUILDS if name not in SHARED])
def independent(request):
    return build(request.param, CONFIG).eval()


@pytest.mark.parametrize("measure", FORWARD.values(), ids=FORWARD)
def test_no_token_changes_another(independent, measure):
    """To the bit. Of a batch split too: CPU products of these sizes sum each row alike."""
    assert measure(independent, CONFIG) == math.inf


@pytest.mark.parametrize("name", SHARED)
def test_one_scale_for_all_tokens_fails_each(name):
    """The control: values a thousand times larger take nearly all precision from the others."""
    model = build(name, CONFIG).eval()
    assert all(measure(model, CONFIG) < 10 for measure in FORWARD.values())


@pytest.mark.parametrize("name", ["O0", "rowwise", "mxfp8"])
def test_gradients_of_a_split_batch_agree_to_their_rounding(name):
    """Sums over tokens, quantized along the tokens: each part is rounded to E4M3 once more when it is stored (28 dB; O0
    keeps BF16's 50), and no scale of one part is meant for another."""
    assert gradient_split(build(name, CONFIG), CONFIG) > (45 if name == "O0" else 25)
