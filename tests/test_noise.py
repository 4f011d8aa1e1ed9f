"""The random stream of stochastic rounding: uniform, and independent across elements, steps, tensors and roles.

Every statistic is a z-score of a mean over n draws: under independence it is within 5 with odds of a million to one a
statistic, and the streams are fixed, so a test that passes once passes always. The control is the stream without its
mix, a keyed Weyl sequence alone, which is perfectly uniform and fails everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msamp_like.kernels import Noise, reference

N = 2**17
BASE = Noise(seed=1, tensor=2, step=3, role=4)
Stream = Callable[[Noise], Tensor]


def ours(noise: Noise) -> Tensor:
    return reference.random_bits(N, noise, torch.device("cpu"))


def weyl(noise: Noise) -> Tensor:
    key, _ = reference.noise_keys(noise)
    word = (torch.arange(N) * reference.WEYL + key) & 0xFFFFFFFF
    return word & 0xFFFF if noise.role & 2 else word >> 16


def correlation(a: Tensor, b: Tensor) -> float:
    """z-score of the correlation of two sequences of 16 bits."""
    x, y = (v.double() / 2**16 - 0.5 + 2.0**-17 for v in (a, b))
    return float((x * y).mean() * 12 * len(x) ** 0.5)


def bitwise(a: Tensor, b: Tensor) -> float:
    """Largest z-score over all pairs of one bit of each sequence."""
    bits = [torch.stack([(v >> k & 1) * 2 - 1 for k in range(16)]).float() for v in (a, b)]
    return float((bits[0] @ bits[1].T).abs().max() / len(a) ** 0.5)


def related(stream: Stream) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of sequences that must know nothing of each other."""
    base = stream(BASE)
    pairs = {f"lag {lag}": (base[:-lag], base[lag:]) for lag in (1, 2, 3, 16, 64, 128, 4096)}
    pairs |= {
        name: (base, stream(BASE._replace(**{name: getattr(BASE, name) + 1}))) for name in ("seed", "tensor", "step")
    }
    return pairs | {f"role {role}": (base, stream(BASE._replace(role=role))) for role in (5, 6)}


@pytest.mark.parametrize("role", [4, 5, 6])
def test_bits_are_uniform(role):
    """Chi-square over 4096 cells and over each bit; a mean of 4095 with a deviation of 90."""
    bits = ours(BASE._replace(role=role))
    for shift in (0, 4):
        counts = torch.bincount(bits >> shift & 0xFFF, minlength=4096).double()
        chi_square = float(((counts - N / 4096).square() / (N / 4096)).sum())
        assert abs(chi_square - 4095) < 5 * (2 * 4095) ** 0.5
    ones = torch.stack([(bits >> k & 1).double().mean() for k in range(16)])
    assert ((ones - 0.5).abs() * 2 * N**0.5).max() < 5
    skewed = bits | (torch.arange(N) % 50 == 0)  # control: a lowest bit set in one element more of a hundred
    assert abs(float((skewed & 1).double().mean()) - 0.5) * 2 * N**0.5 > 5


def test_neighbours_steps_tensors_and_roles_are_uncorrelated():
    for name, pair in related(ours).items():
        assert abs(correlation(*pair)) < 5, name
        assert bitwise(*pair) < 6, name  # the largest of 256
    control = [bitwise(*pair) > 20 for pair in related(weyl).values()]
    assert sum(control) > len(control) // 2


def test_neighbouring_pairs_fill_the_square():
    """Serial test: chi-square of (bits of i, bits of i + 1) over 64 x 64 cells."""
    for stream, fails in ((ours, False), (weyl, True)):
        for lag in (1, 5):
            bits = stream(BASE) >> 10
            counts = torch.bincount((bits[:-lag] << 6) | bits[lag:], minlength=4096).double()
            expected = (N - lag) / 4096
            chi_square = float(((counts - expected).square() / expected).sum())
            assert (abs(chi_square - 4095) > 5 * (2 * 4095) ** 0.5) == fails


def test_streams_are_not_shifts_of_each_other():
    """Three successive differences of one are nowhere in the other; the control's are."""
    for stream, shared in ((ours, False), (weyl, True)):
        one, other = (stream(noise)[:2048].diff() for noise in (BASE, BASE._replace(step=4)))
        windows = [s.unfold(0, 3, 1) @ torch.tensor([1, 2**18, 2**36]) for s in (one, other)]
        assert (int(torch.isin(*windows).sum()) > 100) == shared


def test_half_the_bits_change_with_any_bit_of_any_word():
    """Avalanche of the key: over bits of seed, tensor and step, 8 of 16 bits on average."""
    base = ours(BASE)[:4096]
    for field in ("seed", "tensor", "step"):
        for bit in (0, 1, 15, 31, 47):
            other = ours(BASE._replace(**{field: getattr(BASE, field) ^ (1 << bit)}))[:4096]
            changed = torch.stack([((base ^ other) >> k & 1).double().mean() for k in range(16)])
            assert (changed - 0.5).abs().max() < 0.05


def test_words_of_a_stream_never_repeat():
    """A permutation of the index: both halves together are all different."""
    upper, lower = ours(BASE), ours(BASE._replace(role=6))
    assert len(torch.unique(upper << 16 | lower)) == N
