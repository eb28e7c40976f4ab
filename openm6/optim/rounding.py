"""Stochastic rounding: up or down with the odds that keep the mean, by bits that follow from a counter alone."""

# Letters: E matrices of one tensor (experts; 1 for a plain matrix), n values of each

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = -1640531527  # 0x9E3779B9, odd, near 2³²/φ: neighbouring counters land far apart
MULTIPLIERS = (0x7FEB352D, -2073254261)  # of "lowbias32", the latter 0x846CA68B
BF16_LARGEST = torch.finfo(torch.bfloat16).max


def random_bits(
    num_matrices: int,
    values: int,
    key: int,
    first: int = 0,
    device: torch.device | str | None = None,
    start: int = 0,
) -> Tensor:
    """32 random bits for values number `start` and following of matrices number `first` and following: E n, int32.

    A pure function of (key, matrix, place): the same on every device, however often it is called, and for one expert
    the same whichever of its neighbours are at hand, so a resumed or resharded run rounds alike.
    """
    keys = matrix_keys(num_matrices, key, first, device)
    places = (
        torch.arange(start, start + values, dtype=torch.int64, device=device).to(torch.int32) * GOLDEN
    )  # n
    return _mix(places + keys.unsqueeze(-1))


def matrix_keys(num_matrices: int, key: int, first: int, device: torch.device | str | None = None) -> Tensor:
    """A key for each matrix: E, int32."""
    numbers = torch.arange(first, first + num_matrices, dtype=torch.int32, device=device)
    return _mix(numbers * GOLDEN + _signed(key))


def round_to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16, up with the probability of the part that is cut off: E[result] = x.

    NaN and infinities pass through, since adding bits to a NaN may make it a number; finite values stay finite.
    """
    shifted = (x.view(torch.int32) + (bits & 0xFFFF)) & -65536
    rounded = shifted.view(torch.float32).clamp(-BF16_LARGEST, BF16_LARGEST)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)


def round_to_integer(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> whole numbers in fp32, up with the probability of the fraction; a whole number stays as it is."""
    share = ((bits >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24  # [0, 1)
    low = x.floor()
    return low + (x - low > share)


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers without visible order; `>>` of int32 drags the sign along, hence the masks."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * MULTIPLIERS[0]
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * MULTIPLIERS[1]
    return x ^ ((x >> 16) & 0xFFFF)


def random_bits_reference(num_matrices: int, values: int, key: int) -> list[list[int]]:
    """The naive twin of `random_bits`, in Python's unbounded integers."""
    keys = [_mix_reference(number * (GOLDEN % 2**32) + key) for number in range(num_matrices)]
    return [
        [_signed(_mix_reference(place * (GOLDEN % 2**32) + own)) for place in range(values)] for own in keys
    ]


def _mix_reference(x: int) -> int:
    x %= 2**32
    x ^= x >> 16
    x = x * MULTIPLIERS[0] % 2**32
    x ^= x >> 15
    x = x * (MULTIPLIERS[1] % 2**32) % 2**32
    return x ^ (x >> 16)


def _signed(number: int) -> int:
    """The int32 with the same low 32 bits."""
    return (number + 2**31) % 2**32 - 2**31
