"""Counter-based random bits: a pure function of a key and a counter, without state.

The same key and counter yield the same bits on every device, alone or in a batch, in a captured graph, and in a run
that is resumed or resharded. Two mixers, both permutations of their words without visible order: 32 bits wide for
random bits per weight, which GPU kernels repeat in registers, and 64 bits wide for seeds and positions of any size.
"""

# Shapes: any for words; B keys, N counters

import torch
from torch import Tensor

GOLDEN_32 = -0x61C88647  # 0x9E3779B9, odd, near 2³²/φ: neighbouring counters land far apart
MULTIPLIERS_32 = (0x7FEB352D, -0x7B935975)  # of "lowbias32", the latter 0x846CA68B
GOLDEN_64, MULTIPLIER_64 = -0x61C8864680B583EB, -0x00AE502812AA7333  # odd constants, as two's complement


def mix_32(word: Tensor) -> Tensor:
    """Mix int32 words. `>>` of int32 keeps the sign, hence the masks."""
    word = word ^ ((word >> 16) & 0xFFFF)
    word = word * MULTIPLIERS_32[0]
    word = word ^ ((word >> 15) & 0x1FFFF)
    word = word * MULTIPLIERS_32[1]
    return word ^ ((word >> 16) & 0xFFFF)


def mix_64(word: Tensor) -> Tensor:
    """Mix int64 words, as MurmurHash3 finishes. `>>` of int64 keeps the sign, hence the masks."""
    word = (word ^ ((word >> 32) & 0xFFFFFFFF)) * MULTIPLIER_64
    return word ^ ((word >> 29) & 0x7FFFFFFFF)


def uniform(seed: Tensor, draw: Tensor, count: int) -> Tensor:
    """Return `count` numbers in (0, 1), without its ends, for each (seed, index of the draw): B, B -> B N fp32."""
    key = mix_64(seed * GOLDEN_64 + mix_64(draw + 1)) * MULTIPLIER_64
    counter = torch.arange(count, device=seed.device)
    bits = mix_64(key[:, None] + counter * GOLDEN_64) & 0xFFFFFF
    return ((bits.float() + 0.5) * 2.0**-24).clamp_(max=1 - 2.0**-24)  # the last of 2²⁴ values would round to 1
