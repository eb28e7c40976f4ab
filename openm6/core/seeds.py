"""Random seeds and orders as pure functions of their purpose, so that no generator state needs to be saved."""

import hashlib

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for a purpose, e.g. `derive_seed(7, "step", 120)`; unlike `hash()` equal everywhere."""
    return text_hash("\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])) >> 1


def text_hash(text: str) -> int:
    """Return a 64-bit hash of a text; the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def content_key(content: bytes) -> bytes:
    """Return a 16-byte hash of a file's content, as the key of a cache."""
    return hashlib.blake2b(content, digest_size=16).digest()


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a new numpy generator for one purpose; data threads use this, never the global generator."""
    return np.random.default_rng(derive_seed(seed, *purpose))


def mix(*parts: int) -> int:
    """Return 64 well-mixed bits of integers (SplitMix64's finaliser): NumPy's generators may change with versions."""
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK)) + GOLDEN & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def uniform(*parts: int) -> float:
    """Return a number in [0, 1) of a few integers."""
    return (mix(*parts) >> 11) / 2**53


def permutation(length: int, *parts: int) -> np.ndarray:
    """Return a shuffled 0 … length-1 that depends on the parts alone; int64, 8 bytes per record."""
    keys = np.arange(length, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(mix(*parts))
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys ^= keys >> np.uint64(31)
    return np.argsort(keys, kind="stable")
