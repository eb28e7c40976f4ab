"""What every source of records is: a name, a length, records by index, and a config that opens it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from openm6.base.config import Config
from openm6.base.errors import DataError
from openm6.data.records import Record

Split = Literal["train", "validation", "test"]
"""`validation` is for the loss that is watched while training; a source need not have any of it."""


class Source(ABC):
    """Records by index; a record is made when asked for, so an open source is small.

    Broken rows raise DataError when read, never when the source is opened.
    """

    name: str
    columns: Mapping[str, Sequence[str]] = MappingProxyType({})
    """The columns of a user's table, each with the keys that it fills: none where it is not read."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    def at(self, index: int, epoch: int) -> Record:
        """The record of an index in an epoch; sources that pair anew each epoch differ between epochs."""
        return self[index]

    def values(self, key: str) -> list[Any]:
        """The value of one key in every record, None where absent or broken; tables read only that column."""
        return [_value_at(self, index, key) for index in range(len(self))]


def _value_at(source: Source, index: int, key: str) -> Any:
    try:
        return source[index].get(key)
    except DataError:
        return None


Neighbour = Callable[[str], Source]
"""Opens another source of the same recipe by name, in the same split."""


class SourceConfig(Config):
    """Parent of the source configs: each names its `kind` and knows how to open itself."""

    kind: str

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        """The records of one split.

        Raises:
            DataError: the data is missing, unreadable as a whole, or lacks a column.
        """
        raise NotImplementedError


def check_index(index: int, length: int) -> int:
    """A non-negative index, counting from the end where negative; IndexError outside."""
    if not -length <= index < length:
        raise IndexError(f"index {index} of {length} records")
    return index % length
