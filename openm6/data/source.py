"""What every source of records is, the config that opens it, and which of its records train, validate and test."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from openm6.core.config import Config
from openm6.core.errors import DataError
from openm6.core.seeds import text_hash
from openm6.data.records import Record, unless_broken

Split = Literal["train", "validation", "test"]  # a source need not have validation records, for choices in training

SPLIT_WORDS: dict[Split, frozenset[str]] = {
    "train": frozenset({"train", "training"}),
    "validation": frozenset({"validation", "valid", "val", "dev"}),
    "test": frozenset({"test", "testing", "eval", "held-out"}),
}


class Source(ABC):
    """Records by index, built when asked for. Broken rows raise DataError when read, not when the source is opened."""

    name: str
    columns: Mapping[str, Sequence[str]] = MappingProxyType({})
    """The columns of a user's table, each with the keys that it fills: none if it is not read."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    def at(self, index: int, epoch: int) -> Record:
        """The record of an index in an epoch; sources that pair again each epoch differ between epochs."""
        return self[index]

    def values(self, key: str) -> list[Any]:
        """The value of one key in every record, None if absent or broken; tables read only that column."""
        records = (unless_broken(self.__getitem__, index) for index in range(len(self)))
        return [None if record is None else record.get(key) for record in records]


Neighbour = Callable[[str], Source]  # opens another source of the same recipe by name, in the same split


class SourceConfig(Config):
    """Parent of the source configs: each names its `kind` and opens itself."""

    kind: str

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        """The records of one split; DataError if data is missing, unreadable as a whole, or lacks a column."""
        raise NotImplementedError


def check_index(index: int, length: int) -> int:
    """A non-negative index, counted from the end if negative; IndexError outside."""
    if not -length <= index < length:
        raise IndexError(f"index {index} of {length} records")
    return index % length


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine and in every version."""
    return text_hash(key) / 2**64


def rows_by_hash(
    keys: Sequence[Any], test_fraction: float, split: Split, validation_fraction: float = 0.0
) -> np.ndarray:
    """Row numbers of one split, equal keys on one side; `validation_fraction` is of the rows not for testing."""
    fractions = np.fromiter((hash_fraction(str(key)) for key in keys), dtype=float, count=len(keys))
    border = test_fraction + validation_fraction * (1 - test_fraction)
    first, end = {"test": (0.0, test_fraction), "validation": (test_fraction, border), "train": (border, 2.0)}[split]
    return np.flatnonzero((fractions >= first) & (fractions < end))


def rows_by_word(words: Sequence[Any], split: Split, where: str) -> np.ndarray:
    """Row numbers of one split by the words of a column; rows without a word train. DataError for other words."""
    texts = ["" if one is None else one.decode("utf-8", "replace") if isinstance(one, bytes) else str(one)
             for one in words]  # fmt: skip
    sides: dict[str, Split] = {}
    for text in set(texts):
        side = "train" if text == "" else split_named(text)
        if side is None:
            raise DataError(f"{where}: the split column holds {text[:40]!r}; write train, validation or test")
        sides[text] = side
    chosen = present_split(split, sides.values())
    return np.flatnonzero([sides[text] == chosen for text in texts])


def present_split(split: Split, present: Collection[Split | None]) -> Split:
    """The split to read for one: without a test split, validation records are test records, and no others validate."""
    swapped: dict[Split, Split] = {"validation": "test", "test": "validation"}
    return split if "test" in present else swapped.get(split, split)


def split_named(word: str) -> Split | None:
    """The split that a word stands for, if it does."""
    return next((split for split, words in SPLIT_WORDS.items() if word.strip().lower() in words), None)
