"""GPT: a decoder-only transformer with rotary positions, plain PyTorch.

Architecture: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2: pre-normalisation, the
tied head, the initialisation); Brown et al., "Language Models are Few-Shot Learners", 2020,
https://arxiv.org/abs/2005.14165 (GPT-3: the sizes). Positions: Su et al., "RoFormer: Enhanced Transformer with Rotary
Position Embedding", 2021, https://arxiv.org/abs/2104.09864. Options: Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019, https://arxiv.org/abs/1910.07467; Shazeer, "GLU Variants Improve Transformer", 2020,
https://arxiv.org/abs/2002.05202.

The presets from 125M up are Table 1 of Peng et al., "FP8-LM: Training FP8 Large Language Models", 2023,
https://arxiv.org/abs/2310.18313; ``tiny`` and ``small`` are ours, for bytes as tokens.

No precision is chosen here: activations follow autocast, and the rotation's tables follow the activations. Left out:
dropout (one pass over the data needs none), a key-value cache, learned positions.

Shape suffixes:
    B batch, T position, C model dim, H heads, D dim of one head, F hidden dim, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes and options of one model. ``hidden_dim`` 0 means 4 C, or for SwiGLU 8 C / 3 rounded up to 128."""

    vocab_size: int
    context: int
    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int = 0
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    activation: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    tied: bool = True
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "dim", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; choose a positive size")
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"dim must divide into heads of an even dim (a rotation acts on pairs), got dim {self.dim} and "
                f"{self.num_heads} heads; choose dim = num_heads * 64"
            )
        for name, known in (("norm", ("layernorm", "rmsnorm")), ("activation", ("gelu", "swiglu"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}; choose one")

    @property
    def mlp_dim(self) -> int:
        """Hidden dim of the MLP with the default filled in."""
        if self.hidden_dim:
            return self.hidden_dim
        return 4 * self.dim if self.activation == "gelu" else -(-8 * self.dim // 3 // 128) * 128


_BYTES = GPTConfig(vocab_size=256, context=256, dim=256, num_layers=4, num_heads=4, bias=False)
_PAPER = GPTConfig(vocab_size=50304, context=2048, dim=768, num_layers=12, num_heads=12)  # 50,257 padded to 128

PRESETS: dict[str, GPTConfig] = {
    "tiny": _BYTES,
    "small": replace(_BYTES, context=512, dim=512, num_layers=8, num_heads=8),
    "125M": _PAPER,
    "7B": replace(_PAPER, dim=4096, num_layers=32, num_heads=32),
    "13B": replace(_PAPER, dim=5120, num_layers=40, num_heads=40),
    "175B": replace(_PAPER, dim=12288, num_layers=96, num_heads=96),
}


def rotation_tables(
    context: int, head_dim: int, base: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position t times frequency base^(-2i / D), FP32, each of shape (T, 1, D / 2)."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(context, dtype=torch.float32, device=device), frequency)[:, None, :]
    return angle.cos(), angle.sin()


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) by its position's angle; queries and keys then see only relative positions.

    Element i is paired with i + D/2, not with its neighbour as in the paper: the same map after a fixed permutation of
    the columns of the projection, and contiguous halves instead of strided ones.
    """
    left, right = x_BTHD.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention; one product makes queries, keys and values, of as many heads as the projection has."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.bias)
        self.out = nn.Linear(config.dim, config.dim, bias=config.bias)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv(x_BTC).unflatten(-1, (-1, self.head_dim))  # (B, T, 3 H, D)
        heads = qkv.shape[2] // 3
        qk, v_BTHD = qkv.split((2 * heads, heads), dim=2)
        q_BTHD, k_BTHD = rotate(qk, cos, sin).chunk(2, dim=2)
        q_BHTD, k_BHTD, v_BHTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        output: Tensor = self.out(y_BHTD.transpose(1, 2).flatten(2))
        return output


class MLP(nn.Module):
    """C -> F -> C with GELU, or with SwiGLU: silu(gate) * value."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.up = nn.Linear(config.dim, (2 if self.gated else 1) * config.mlp_dim, bias=config.bias)
        self.down = nn.Linear(config.mlp_dim, config.dim, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTF = self.up(x_BTC)
        if self.gated:
            gate, value = x_BTF.chunk(2, dim=-1)
            x_BTF = F.silu(gate) * value
        else:
            x_BTF = F.gelu(x_BTF)
        output: Tensor = self.down(x_BTF)
        return output


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), cos, sin)
        output: Tensor = x_BTC + self.mlp(self.mlp_norm(x_BTC))
        return output


def make_norm(config: GPTConfig) -> nn.Module:
    """The normalisation that ``config`` names, over C."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.dim, eps=1e-5)
    return nn.LayerNorm(config.dim, eps=1e-5, bias=config.bias)


class GPT(nn.Module):
    """Tokens in, logits of the next token out; with targets, the loss too."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.loss = nn.CrossEntropyLoss()
        head_dim = config.dim // config.num_heads
        self.register_buffer("cos", torch.empty(config.context, 1, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(config.context, 1, head_dim // 2), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as GPT-2: N(0, 0.02), a projection onto the residual stream N(0, 0.02 / sqrt(2 layers)).

        Also ties the head and fills the rotation's tables: a model built on the meta device is complete after
        ``to_empty``, which makes two tensors of a tied one, and this.
        """
        if self.config.tied:
            self.lm_head.weight = self.embed.weight
        residual_std = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = residual_std if name.endswith(("attention.out", "mlp.down")) else 0.02
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
        head_dim = 2 * self.cos.shape[-1]
        cos, sin = rotation_tables(self.config.context, head_dim, self.config.rope_base, self.cos.device)
        self.cos.copy_(cos)
        self.sin.copy_(sin)

    @overload
    def forward(self, tokens_BT: Tensor) -> Tensor: ...

    @overload
    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V); with ``targets_BT`` the mean cross-entropy too, nats, FP32. Targets -100 do not count."""
        length = tokens_BT.shape[1]
        if length > self.config.context:
            raise ValueError(f"a sequence has at most {self.config.context} tokens here, got {length}; raise `context`")
        x_BTC = self.embed(tokens_BT)
        cos, sin = self.rotation(length, x_BTC)
        for block in self.blocks:
            x_BTC = block(x_BTC, cos, sin)
        logits_BTV: Tensor = self.lm_head(self.norm(x_BTC))
        if targets_BT is None:
            return logits_BTV
        return logits_BTV, self.loss(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    def rotation(self, length: int, x_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """The tables' first rows in the dtype that queries and keys will have: FP32 tables would promote them."""
        device = x_BTC.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BTC.dtype
        return self.cos[:length].to(dtype), self.sin[:length].to(dtype)

    def num_parameters(self) -> int:
        """Parameters, a tied one counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, length: int | None = None) -> int:
        """Floating-point operations of forward and backward a token, in sequences of ``length`` (default: the context).

        6 a weight of every matrix product, the head included and the embedding lookup not, and 12 C T a layer for
        attention: the convention of Chowdhery et al., "PaLM", 2022, https://arxiv.org/abs/2204.02311, which counts what
        the causal mask drops.
        """
        length = self.config.context if length is None else length
        weights = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        return 6 * weights + 12 * self.config.num_layers * self.config.dim * length
