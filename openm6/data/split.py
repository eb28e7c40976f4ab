"""Which records train and which test: a column that says so, a second file, or a stable hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from openm6.base.errors import DataError
from openm6.data.source import Split

TRAIN_WORDS = frozenset({"train", "training"})
TEST_WORDS = frozenset({"test", "testing", "validation", "valid", "val", "dev", "eval", "held-out"})


def stable_share(key: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine and in every version."""
    return (
        int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "big") / 2**64
    )


def rows_by_hash(keys: Sequence[Any], test_share: float, split: Split) -> np.ndarray:
    """Row numbers of one split: equal keys fall on the same side, also when rows are added later."""
    test = np.fromiter((stable_share(str(key)) < test_share for key in keys), dtype=bool, count=len(keys))
    return np.flatnonzero(test if split == "test" else ~test)


def rows_by_word(words: Sequence[Any], split: Split, where: str) -> np.ndarray:
    """Row numbers of one split by the words of a column (`train`, `test`, `validation`, …).

    Rows without a word train.

    Raises:
        DataError: a word that is neither.
    """
    side = {word: _side(word, where) for word in set(words)}
    return np.flatnonzero([side[word] == split for word in words])


def _side(word: Any, where: str) -> Split:
    if word is None:
        return "train"
    text = (word.decode("utf-8", "replace") if isinstance(word, bytes) else str(word)).strip().lower()
    if text in TRAIN_WORDS:
        return "train"
    if text in TEST_WORDS:
        return "test"
    raise DataError(f"{where}: the split column holds {text[:40]!r}; write train or test")
