"""Which columns of a source no task reads: left out of `fields`, or mapped to a key that no task asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from openm6.base.errors import DataError
from openm6.data.prepare import with_others
from openm6.data.records import Record
from openm6.data.source import Source
from openm6.tasks.slots import Context
from openm6.tasks.task import Task

POSED = 3  # records that each task is posed on; every prompt of a task shows all that is given
ALWAYS_READ = ("id", "source", "license", "spoken_language", "extra", "series")  # whatever the tasks are


class _Watched(dict[str, Any]):
    """A record that notes which of its keys are read; those of `extra` are noted apart."""

    def __init__(self, record: Record, read: set[str]) -> None:
        super().__init__(record)
        self._read = read
        if isinstance(record.get("extra"), dict):
            self["extra"] = _Watched(record["extra"], read)

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as read."""
        self._read.add(key)
        return super().get(key, default)


def unused_columns(source: Source, records: Sequence[Record], tasks: Iterable[Task]) -> list[str]:
    """The columns of the source that none of the tasks reads, judged by a sample of its records."""
    read = set(ALWAYS_READ)
    for task in tasks:
        read |= _keys_read(source, records, task)
    return [column for column, keys in source.columns.items() if not read & set(keys)]


def _keys_read(source: Source, records: Sequence[Record], task: Task) -> set[str]:
    read: set[str] = set()
    rng = np.random.default_rng(0)
    fitting = [record for record in records if task.languages(record)][:POSED]
    for record in fitting:
        try:
            shown = with_others(record, source, rng) if task.compares else record
            for language in task.languages(shown):
                task.build(_Watched(shown, read), Context(language, rng))
        except DataError:  # a broken picture or sound: the quarantine names it when it is drawn
            continue
    return read
