"""Random seeds as a pure function of what they are for, so that nothing random needs to be carried along."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed from the run's seed and what it is for, e.g. `derive_seed(7, "step", 120)`.

    Equal on every machine and Python version, unlike `hash()`.
    """
    words = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A fresh numpy generator for one purpose; data threads use this, never the global generator."""
    return np.random.default_rng(derive_seed(seed, *purpose))
