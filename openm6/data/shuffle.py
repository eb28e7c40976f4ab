"""Seeded order without a generator's state: every choice is a pure function of a few integers.

NumPy does not promise the streams of its generators from version to version; these functions are our own, so a
run resumed with another NumPy still sees the same data.
"""

from __future__ import annotations

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """64 well-mixed bits of a few integers (the finaliser of SplitMix64, once per part)."""
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK)) + GOLDEN & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def uniform(*parts: int) -> float:
    """A number in [0, 1) of a few integers."""
    return (mix(*parts) >> 11) / 2**53


def permutation(length: int, *parts: int) -> np.ndarray:
    """A shuffled 0 … length-1 that depends on the parts alone; int64, 8 bytes a record."""
    keys = np.arange(length, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(mix(*parts))
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys ^= keys >> np.uint64(31)
    return np.argsort(keys, kind="stable")
