"""Ranks that were not started alike: all raise the same error, which names the field, the values and the ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from msamp_like import amp
from msamp_like.comm.agreement import agree, describe, versions
from msamp_like.comm.collectives import replicate
from msamp_like.comm.group import CountedGroup
from tests.distributed.spy import Spy

CPU = torch.device("cpu")
FIELDS = {"level": "O2", "seed": 0, "recipe": None, "rate": 0.5, "policy": "policy O2\n  weight  E4M3", "tensors": {}}


def compare(rank, world, group, fields):
    """What agreeing raises, and the collectives it takes."""
    with Spy(world, rank) as spy:
        try:
            agree(fields[rank], CountedGroup(), CPU)
        except ValueError as error:
            return str(error), spy.names
    return "nothing", spy.names


def told(ranks, *fields):
    """The one text that all ranks raise."""
    texts = {text for text, _ in ranks(len(fields), compare, fields)}
    assert len(texts) == 1
    return texts.pop()


def test_ranks_that_are_alike_exchange_32_bytes(ranks):
    shuffled = dict(sorted(FIELDS.items()))
    for text, names in ranks(3, compare, [FIELDS, FIELDS, shuffled]):
        assert text == "nothing"
        assert names == ["allgather_base"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("level", "O3", "got level 'O2' on ranks 0-1, 3 and 'O3' on rank 2; give"),
        ("seed", 1, "got seed 0 on ranks 0-1, 3 and 1 on rank 2; give"),
        ("seed", "0", "got seed 0 on ranks 0-1, 3 and '0' on rank 2; give"),
        ("recipe", "current", "got recipe None on ranks 0-1, 3 and 'current' on rank 2; give"),
        ("rate", 0.25, "got rate 0.5 on ranks 0-1, 3 and 0.25 on rank 2; give"),
        ("tensors", {"a": "(3,)"}, "got tensors a nothing on ranks 0-1, 3 and (3,) on rank 2; give"),
        ("new", 7, "got new nothing on ranks 0-1, 3 and 7 on rank 2; give"),
    ],
)
def test_the_field_the_values_and_the_ranks_are_named(ranks, name, value, said):
    text = told(ranks, FIELDS, FIELDS, {**FIELDS, name: value}, FIELDS)
    assert said in text
    assert "same command, configuration and packages" in text


def test_several_fields_and_more_than_two_values(ranks):
    text = told(ranks, *({**FIELDS, "seed": seed, "level": f"O{seed}"} for seed in (0, 1, 2)))
    assert "level 'O0' on rank 0 and 'O1' on rank 1 and 'O2' on rank 2" in text
    assert "seed 0 on rank 0 and 1 on rank 1 and 2 on rank 2" in text


def test_a_long_value_is_shown_where_it_differs(ranks):
    long = "x" * 5000
    text = told(ranks, {"policy": long + "a" + long}, {"policy": long + "b" + long})
    assert "xa" in text
    assert "xb" in text
    assert len(text) < 600


def test_of_a_large_model_the_first_differences_are_named(ranks):
    """Two thousand lines, of which every one differs, or one is missing."""
    lines = {f"layer{i}.weight": f"({i}, 4) torch.float32" for i in range(2000)}
    other = {name: line.replace("32", "16") for name, line in lines.items()}
    text = told(ranks, {"model": lines}, {"model": other})
    assert "model layer0.weight (0, 4) torch.float32 on rank 0 and (0, 4) torch.float16 on rank 1" in text
    assert "layer3.weight" in text
    assert "layer4.weight" not in text
    assert "at least 1996 more lines" in text
    text = told(ranks, {"model": lines}, {"model": {n: line for n, line in lines.items() if n != "layer9.weight"}})
    assert "got model layer9.weight (9, 4) torch.float32 on rank 0 and nothing on rank 1; give" in text


def test_different_tensors_first_on_each_rank(ranks):
    """What each rank alone has is named, though no rank finds it in its own list of differences."""
    text = told(ranks, {"a": 1, "b": 2}, {"c": 3, "b": 2}, {"a": 1, "d": 4, "b": 2})
    for said in ("a 1 on ranks 0, 2 and nothing on rank 1", "c nothing on ranks 0, 2", "d nothing on ranks 0-1"):
        assert said in text


# --- models ---------------------------------------------------------------------------------------------------------


def test_what_a_model_is_told_by():
    """Every property that decides what is sent changes a line; a value does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    first = describe(model)
    assert first["0.weight"] == "(3, 4) torch.float32"
    assert first["1.num_batches_tracked"] == "() torch.int64"
    model[0].weight.data += 1
    assert describe(model) == first
    model[0].bias.requires_grad_(False)
    assert describe(model)["0.bias"] == "(3,) torch.float32 frozen"
    stored = describe(amp.initialize(nn.Sequential(nn.Linear(4, 3)), level="O2")[0])["0.weight"]
    assert "FP16" in stored or "fp16" in stored


def test_the_order_of_tensors_counts():
    """They are copied and reduced by position."""
    one, other = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), nn.ModuleDict()
    other["b"], other["a"] = one["b"], one["a"]
    a, b = describe(one), describe(other)
    assert {name for name in a if a[name] != b[name]} == {"(order of names)"}


def test_versions_are_plain_texts():
    assert versions()["torch"] == torch.__version__
    assert all(isinstance(value, str) for value in versions().values())


def copied(rank, world, group, tensors):
    """Each rank holds as many tensors as it is told."""
    named = [(f"w{i}", torch.full((3,), float(rank))) for i in range(tensors[rank])]
    try:
        replicate(named, CountedGroup())
    except ValueError as error:
        return str(error)
    return [tensor.sum().item() for _, tensor in named]


def test_ranks_with_different_numbers_of_tensors_do_not_hang(ranks):
    assert ranks(3, copied, [2, 2, 2]) == [[0.0, 0.0]] * 3
    for counts, who in (([2, 2, 1], "rank 2"), ([1, 0, 1], "rank 1"), ([0, 3, 3], "rank 0")):
        for text in ranks(3, copied, counts):
            assert "all ranks must be started with the same model" in text
            assert f"nothing on {who}" in text


def initialized(rank, world, group):
    """A model that differs on one rank is refused before it is changed."""
    model = nn.Sequential(nn.Linear(4, 4 + rank // 2))
    with pytest.raises(ValueError, match=r"\(4, 4\).* on ranks 0-1 and \(5, 4\).* on rank 2"):
        amp.initialize(model, level="O2")
    return type(model) is nn.Sequential and type(model[0]) is nn.Linear


def test_nothing_is_changed_when_ranks_differ(ranks):
    assert ranks(3, initialized) == [True] * 3
