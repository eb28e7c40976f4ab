"""Random seeds as a pure function of what they are for, so that nothing random needs to be carried along.

The one hash of texts and contents is here; counters are mixed by `data.shuffle` (64 bits: the order of records) and
`optim.rounding` (32 bits: rounding, with its form in Triton beside it).
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed from the run's seed and what it is for, e.g. `derive_seed(7, "step", 120)`.

    Equal on every machine and Python version, unlike `hash()`.
    """
    return text_hash("\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])) >> 1


def text_hash(text: str) -> int:
    """A 64-bit number that stands for a text; the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def content_key(content: bytes) -> bytes:
    """16 bytes that stand for a file's content, as the key of a cache."""
    return hashlib.blake2b(content, digest_size=16).digest()


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A fresh numpy generator for one purpose; data threads use this, never the global generator."""
    return np.random.default_rng(derive_seed(seed, *purpose))
