"""Agreement: all ranks were started with the same model and the same settings, or every one of them says what differs.

Ranks that differ would exchange buckets of different sizes, or sums of different things, which no backend notices. So
before anything else is sent, each rank tells its *fields*: settings, versions, a line for every tensor of the model.

    agree({"level": "O2", "seed": 0, **versions(), "model": describe(model)}, group, device)

Where all is well that is one all-gather of 32 bytes. A difference costs a few more, of a digest a line and of the texts
of the first lines that differ, whatever the size of the model; every rank raises the same error.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import msamp_like
from msamp_like.comm.group import CountedGroup
from msamp_like.comm.roll_call import ranks_text
from msamp_like.tensor import ScalingTensor

Field = str | int | float | None | Mapping[str, str]

_SHOWN = 4
"""How many differing lines an error names."""

_WIDTH = 120
"""How much of a value an error shows, around the first place where two ranks differ."""


def agree(fields: Mapping[str, Field], group: CountedGroup, device: torch.device) -> None:
    """Raise ValueError on every rank of ``group`` unless all have the same ``fields``.

    A field is a plain value or a mapping of lines, such as :func:`describe` gives; their order does not count. The text
    names the first differing lines, the values and the ranks that have each. ``device`` is one that the group's backend
    sends from. Every rank has to call this; one that does not is missed by the others as in any collective.
    """
    if group.world == 1:
        return
    lines = _lines(fields)
    own = _digests([json.dumps(sorted(lines.items()))], 32).to(device)
    everyone, work = group.all_gather(own, label="agree")
    work.wait()
    if not bool((everyone.view(group.world, -1) == own).all()):
        raise ValueError(_difference(lines, group, device))


def describe(model: nn.Module) -> dict[str, str]:
    """A line for every parameter and buffer of a model, tied ones once: shape, dtype, how it is stored, frozen or not;
    and one for their order."""
    return described([*model.named_parameters(), *model.named_buffers()])


def described(named: Sequence[tuple[str, Tensor]]) -> dict[str, str]:
    """:func:`describe` for tensors that have no model."""
    lines = {}
    for name, tensor in named:
        stored = f" as {tensor.format} in blocks {tensor.block}" if isinstance(tensor, ScalingTensor) else ""
        frozen = " frozen" if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else ""
        lines[name] = f"{tuple(tensor.shape)} {tensor.dtype}{stored}{frozen}"
    order = hashlib.sha256(json.dumps([name for name, _ in named]).encode()).hexdigest()[:8]
    return {**lines, "(order of names)": f"{len(named)} tensors, {order}"}


def versions() -> dict[str, str]:
    """What decides on a rank's bits and is installed there: ours, torch, CUDA, Python."""
    return {
        "msamp_like": msamp_like.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
    }


# --- what differs ---------------------------------------------------------------------------------------------------


def _lines(fields: Mapping[str, Field]) -> dict[str, str]:
    """One line for each value; a line of a mapping goes by the field's name and its own."""
    lines: dict[str, str] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            lines |= {f"{name} {key}": line for key, line in value.items()}
        else:
            lines[name] = repr(value)
    return lines


def _difference(lines: Mapping[str, str], group: CountedGroup, device: torch.device) -> str:
    """What the error says, alike on all ranks; every rank of the group takes part."""
    digests = _digests([f"{key}\0{value}" for key, value in lines.items()], 8)
    shared = set.intersection(*(set(_numbers(one)) for one in _gather_bytes(digests, group, device)))
    differing = [key for key, number in zip(lines, _numbers(digests), strict=True) if number not in shared]

    firsts = _gather_texts([str(len(differing)), *differing[:_SHOWN]], group, device)
    more = max(int(first[0]) for first in firsts) - _SHOWN
    ranked = itertools.chain.from_iterable(itertools.zip_longest(*(first[1:] for first in firsts)))
    keys = [key for key in dict.fromkeys(ranked) if key is not None][:_SHOWN]

    answers = _gather_texts([lines.get(key, "nothing") for key in keys], group, device)
    found = [f"{key} {_who(column)}" for key, column in zip(keys, zip(*answers, strict=True), strict=True)]
    rest = [f"at least {more} more lines that differ"] if more > 0 else []
    return (
        f"all ranks must be started with the same model and settings, got {'; '.join([*found, *rest])}; "
        "give every rank the same command, configuration and packages"
    )


def _who(values: Sequence[str]) -> str:
    """As "'O2' on ranks 0-2 and 'O3' on rank 3", of each value the part that differs."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    start = 0
    if max(map(len, ranks)) > _WIDTH:
        alike = (len(set(column)) == 1 for column in zip(*ranks, strict=False))
        start = max(0, sum(1 for _ in itertools.takewhile(bool, alike)) - _WIDTH // 3)
    parts = []
    for value, who in ranks.items():
        cut = ("..." if start else "") + value[start : start + _WIDTH] + ("..." if start + _WIDTH < len(value) else "")
        parts.append(f"{cut} on {ranks_text(who)}")
    return " and ".join(parts)


def _digests(texts: Sequence[str], size: int) -> Tensor:
    """``size`` bytes a text, on the CPU."""
    raw = b"".join(hashlib.sha256(text.encode()).digest()[:size] for text in texts)
    return torch.tensor(list(raw), dtype=torch.uint8)


def _numbers(digests: Tensor) -> list[int]:
    return digests.view(torch.int64).tolist()  # type: ignore[no-any-return]


def _gather_texts(texts: Sequence[str], group: CountedGroup, device: torch.device) -> list[list[str]]:
    """Every rank's list of texts, on all ranks."""
    raw = torch.tensor(list(json.dumps(list(texts)).encode()), dtype=torch.uint8)
    return [json.loads(bytes(one.tolist())) for one in _gather_bytes(raw, group, device)]


def _gather_bytes(raw: Tensor, group: CountedGroup, device: torch.device) -> list[Tensor]:
    """Every rank's bytes, on all ranks and on the CPU, however many each has: padded to the longest on the wire."""
    sizes, work = group.all_gather(torch.tensor([raw.numel()], device=device), label="agree")
    work.wait()
    lengths: list[int] = sizes.tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: raw.numel()] = raw
    gathered, work = group.all_gather(padded.to(device), label="agree")
    work.wait()
    rows = gathered.cpu().view(group.world, -1)
    return [row[:length].clone() for row, length in zip(rows, lengths, strict=True)]
