"""What becomes of each module under tensor parallelism: entries by name pattern, and ready plans.

A plan maps a module-name pattern, matched as a shell matches file names, to an entry. Each module is matched by at most
one pattern, and each pattern matches at least one module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Column:
    """An ``nn.Linear`` split by output features.

    ``parts`` projections of one size lie in its weight one below the other (queries, keys, values). ``unit`` features
    stay together: the dim of a head. ``gather_output`` gives every rank all features, in the dtype they have.
    """

    parts: int = 1
    unit: int = 1
    gather_output: bool = False

    def __post_init__(self) -> None:
        if self.parts < 1 or self.unit < 1:
            raise ValueError(f"parts and unit must be at least 1, got {self.parts} and {self.unit}; 1 is the default")
        if self.gather_output and self.parts > 1:
            raise ValueError(
                f"gathered features are of one projection, got gather_output=True with parts={self.parts}; "
                "split the layer into one Linear a projection"
            )


@dataclass(frozen=True, kw_only=True)
class Row:
    """An ``nn.Linear`` split by input features, which a column-parallel layer made; its output is summed over ranks.

    ``unit`` features stay together: the dim of a head.
    """

    unit: int = 1

    def __post_init__(self) -> None:
        if self.unit < 1:
            raise ValueError(f"unit must be at least 1, got {self.unit}; 1 is the default")


@dataclass(frozen=True, kw_only=True)
class Vocab:
    """An ``nn.Embedding`` split by rows. ``scatter=False`` keeps its output whole where sequences are split."""

    scatter: bool = True


@dataclass(frozen=True, kw_only=True)
class VocabLoss:
    """An ``nn.CrossEntropyLoss`` of logits that a column-parallel head leaves split."""


@dataclass(frozen=True, kw_only=True)
class Enter:
    """A module whose input is gathered once for all column-parallel layers inside it, instead of once for each.

    The input is the first positional argument, or else the one named ``argument``.
    """

    argument: str = "hidden_states"


@dataclass(frozen=True, kw_only=True)
class Split:
    """A module whose input, whole on all ranks, is split along the sequence where sequences are split."""

    argument: str = "hidden_states"


@dataclass(frozen=True, kw_only=True)
class Join:
    """A module whose output, split along the sequence, becomes whole on all ranks: before layers that are not split.

    Its own parameters see a part of the sequence."""


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """A replicated module between split products: where sequences are split it sees a part, and so does its
    gradient."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """A replicated module that sees this rank's heads alone, as a norm of queries does: its gradient is a part."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A replicated module that sees whole sequences and all features on every rank, so its gradient is whole."""


Entry = Column | Row | Vocab | VocabLoss | Enter | Split | Join | Sequence | Heads | Whole
Plan = Mapping[str, Entry]


class GPTSizes(Protocol):
    """What a plan needs to know of :class:`msamp_like.models.gpt.GPTConfig`."""

    @property
    def dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def activation(self) -> str: ...


def plan_gpt(config: GPTSizes, *, gather_logits: bool = False) -> dict[str, Entry]:
    """The plan of :class:`msamp_like.models.gpt.GPT`.

    The logits that the model returns are this rank's part of the vocabulary, unless ``gather_logits``; the loss is that
    of all either way.
    """
    head_dim = config.dim // config.num_heads
    return {
        "embed": Vocab(),
        "blocks.*_norm": Sequence(),
        "blocks.*.attention.qkv": Column(parts=3, unit=head_dim),
        "blocks.*.attention.out": Row(unit=head_dim),
        "blocks.*.mlp.up": Column(parts=2 if config.activation == "swiglu" else 1),
        "blocks.*.mlp.down": Row(),
        "norm": Sequence(),
        "lm_head": Column(gather_output=gather_logits),
        **({} if gather_logits else {"loss": VocabLoss()}),
    }


def plan_decoder(*, head_dim: int, qk_norm: bool = False) -> dict[str, Entry]:
    """The plan of a Hugging Face decoder in Llama's names (Llama, Mistral, Qwen), its logits gathered.

    Positions and masks are computed from whole embeddings, so the sequence is split behind them, at the first layer.
    ``qk_norm``: queries and keys are normalised head by head (Qwen 3).
    """
    return {
        "*embed_tokens": Vocab(scatter=False),
        "*layers.0": Split(),
        "*layernorm": Sequence(),
        "*self_attn": Enter(),
        **{f"*.{name}_proj": Column(unit=head_dim) for name in "qkv"},
        **({"*.[qk]_norm": Heads()} if qk_norm else {}),
        "*.o_proj": Row(unit=head_dim),
        "*.mlp": Enter(argument="x"),
        "*.gate_proj": Column(),
        "*.up_proj": Column(),
        "*.down_proj": Row(),
        "*model.norm": Sequence(),
        "lm_head": Column(gather_output=True),
    }
