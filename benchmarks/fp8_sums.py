"""Sums taken in FP8, as a peer to the sums in FP32 of this project: what a patched NCCL computes, hop by hop.

Values are the codes of E4M3 under a scale that all ranks share; an addition of two codes is exact and then rounded to
E4M3, saturating. Two orders, as NCCL has them:

    ring    the elements are cut into one chunk a rank; chunk c starts at rank c + 1 and is rounded world - 1 times
    tree    neighbours in pairs, pairs of pairs: a value is rounded log2(world) times

Peng et al., "FP8-LM: Training FP8 Large Language Models", 2023, https://arxiv.org/abs/2310.18313: equations 3 (mu) and
4 to 6 (one scale for all ranks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from msamp_like import kernels
from msamp_like.formats import E4M3
from msamp_like.policy import Rule
from msamp_like.scaling import AutoScaler, saturation

MU_STEPS = 40


def rounded(x: Tensor) -> Tensor:
    """FP32 values to E4M3 and back, saturating."""
    return x.clamp(-E4M3.largest, E4M3.largest).to(E4M3.dtype).float()


def ring(codes: Tensor, rounding: bool = True) -> tuple[Tensor, Tensor]:
    """The sum over dim 0 of (world, elements) in ring order, and the largest magnitude that each chunk passed through.

    Without ``rounding`` the partial sums stay in FP32: that tells how large they become.
    """
    world, elements = codes.shape
    chunks = torch.nn.functional.pad(codes, (0, -elements % world)).view(world, world, -1)
    owner = torch.arange(world)
    total = chunks[(owner + 1) % world, owner].clone()
    largest = total.abs()
    for hop in range(2, world + 1):
        total += chunks[(owner + hop) % world, owner]
        if rounding:
            total = rounded(total)
        largest = torch.maximum(largest, total.abs())
    return total.view(-1)[:elements], largest.view(-1)[:elements]


def tree(codes: Tensor) -> Tensor:
    """The sum over dim 0 by pairs; ``world`` is a power of two."""
    while codes.shape[0] > 1:
        codes = rounded(codes[0::2] + codes[1::2])
    return codes[0]


def fp8_sums(inputs: Tensor, block_columns: int) -> dict[str, Tensor]:
    """Means over dim 0 of (world, rows, columns), summed in E4M3 in ring and in tree order.

    The best that one shared scale can do: it is known beforehand, and the largest that no partial sum exceeds.
    ``block_columns`` 0 is one scale for everything, else each run of so many elements has its own.
    """
    world, elements = inputs.shape[0], inputs[0].numel()
    flat = inputs.reshape(world, elements)
    reached = torch.maximum(ring(flat, rounding=False)[1], flat.abs().amax(0))
    groups = reached.view(-1, block_columns) if block_columns else reached.view(1, -1)
    scale_inv = kernels.scale_inv_from_amax(groups.amax(dim=1, keepdim=True), E4M3)
    spread = scale_inv.expand_as(groups).reshape(-1)
    codes = rounded(flat / spread)
    sums = {"ring": ring(codes)[0], "tree": tree(codes)}
    return {name: (total * spread / world).view(inputs.shape[1:]) for name, total in sums.items()}


def fp8_lm(inputs: Tensor) -> tuple[Tensor, float]:
    """FP8-LM's mean over dim 0 of (world, rows, columns), and the mu it settled at.

    Each rank stores its tensor under its own scale, with mu in it (eq. 3); the smallest scale becomes everybody's
    (eqs. 4, 5) and the codes are summed in E4M3 around a ring (eq. 6). mu starts at 1 and is halved after every step
    whose sum saturates in more than 1e-5 of its elements, as AutoScaler has it, until one does not: in training it
    then creeps up by 2^(1/1000) a step and is halved again, so this is the steady state within a factor of two.
    """
    world, scaler = inputs.shape[0], AutoScaler(Rule(format=E4M3))
    for _ in range(MU_STEPS):
        mu = float(scaler.mu)
        stored = [scaler.quantize(x) for x in inputs]
        shared = torch.stack([s.scale_inv for s in stored]).amax()
        codes = torch.stack([rounded(s.dequantize() / shared).flatten() for s in stored])
        total = ring(codes)[0]
        if saturation(total, E4M3.largest) <= scaler.threshold:
            break
        scaler.update(total)
    return (total * shared / world).view(inputs.shape[1:]), mu
