"""A source made of records in memory, for tests; the kinds of sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from openm6.core.errors import DataError
from openm6.data.records import Record
from openm6.data.source import Neighbour, Source, SourceConfig, Split, check_index
from openm6.data.sources import AnySourceConfig

KINDS = [config.model_fields["kind"].default for config in get_args(get_args(AnySourceConfig)[0])]


class ListSource(Source):
    """Records in a list; None stands for a broken row."""

    def __init__(self, name: str, records: Sequence[Record | None]) -> None:
        self.name = name
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        record = self.records[check_index(index, len(self))]
        if record is None:
            raise DataError(f"{self.name}, row {index}: broken")
        return dict(record)


class ListConfig(SourceConfig):
    """Opens a ListSource; the same records train and test."""

    kind: str = "list"
    records: list[dict | None]

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        return ListSource(name, self.records)
