"""Sources that are tables: one row becomes Python objects only when it is asked for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from openm6.core.errors import DataError
from openm6.core.lru_cache import LRUCache
from openm6.data.records import Fields, Record, RowReader, check_columns, is_missing, unless_broken
from openm6.data.source import Neighbour, Source, SourceConfig, Split, check_index, rows_by_hash, rows_by_word
from openm6.data.storage import read_beside
from openm6.tasks.slots import PINNED

CACHE_BYTES = 32 * 2**20  # of the records of one source


class UnreadableRowError(DataError):
    """A row that could not be parsed when the table was opened."""


class Table(ABC):
    """Rows and named columns, whatever they are stored as; `where` names the table in error sentences."""

    where: str
    names: list[str]
    units: Mapping[str, str] = MappingProxyType({})  # that stand beside the numbers of some columns
    unreadable: Sequence[str] = ()  # why some rows cannot be parsed, if that shows on opening

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """The cells of one row, the columns named at least; DataError if the row is broken."""

    def read(self, columns: Sequence[str]) -> None:
        """Load these columns, of which rows are read later; DataError if one is not there."""
        check_columns(columns, self.names, self.where)

    def column(self, column: str) -> list[Any]:
        """A whole column as Python values, None for rows that cannot be read."""
        rows = (unless_broken(self.row, row, (column,)) or {} for row in range(len(self)))
        return [cells.get(column) for cells in rows]

    def row_name(self, row: int) -> str:
        """Which row it is, for a person."""
        return f"row {row}"


class ArrowTable(Table):
    """Columns in Arrow memory."""

    def __init__(self, arrow: pa.Table, where: str) -> None:
        self.arrow, self.where, self.names = with_known_zones(arrow), where, list(arrow.column_names)

    def __len__(self) -> int:
        return int(self.arrow.num_rows)

    def read(self, columns: Sequence[str]) -> None:
        super().read(columns)
        self.arrow = self.arrow.select(list(columns))

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        try:
            return {name: self.arrow.column(name)[row].as_py() for name in columns}
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date beyond the calendar
            raise DataError(f"a cell cannot be read: {error}") from None

    def column(self, column: str) -> list[Any]:
        try:
            return list(self.arrow.column(column).to_pylist())
        except (ValueError, OverflowError):
            return super().column(column)


def with_known_zones(arrow: pa.Table) -> pa.Table:
    """The table with times of zones that this machine does not have in UTC, in which the moments are the same."""
    for number, (name, column) in enumerate(zip(arrow.column_names, arrow.columns, strict=True)):
        kind = column.type
        if not pa.types.is_timestamp(kind) or kind.tz is None:
            continue
        try:
            pa.scalar(0, kind).as_py()
        except (KeyError, ValueError):
            arrow = arrow.set_column(number, name, column.cast(pa.timestamp(kind.unit, "UTC")))
    return arrow


class TableSource(Source):
    """The rows of a table that belong to one split, read through a RowReader."""

    target: str | None = None  # the column that tasks hold out; they pass over rows without it

    def __init__(self, name: str, table: Table, reader: RowReader, rows: np.ndarray) -> None:
        self.name, self._table, self._reader, self._rows = name, table, reader, rows
        # Most of the time of a small table's record is to make Python values of its cells.
        self._records = LRUCache[Record](CACHE_BYTES)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = int(self._rows[check_index(index, len(self))])
        return dict(self._records.get_or_compute(row, lambda: self._read(row)))

    def _read(self, row: int) -> Record:
        try:
            record = self._reader.read(self._table.row(row, list(self._reader.columns)))
        except DataError as error:
            where = f"{self.name}, {self._table.row_name(row)} of {self._table.where}"
            raise type(error)(f"{where}: {error}") from None
        record.setdefault("id", f"{self.name}/{row}")
        if self.target is not None:
            record["extra"] = {**record.get("extra", {}), PINNED: self.target}
        return record

    def values(self, key: str) -> list[Any]:
        if key not in self._reader.single:
            return super().values(key)
        column, convert = self._reader.single[key]
        cells = self._table.column(column)
        return [unless_broken(convert, cells[row], column) for row in self._rows]


class TableConfig(SourceConfig):
    """Settings that every table shares: the columns, and how it is split."""

    endings: ClassVar[tuple[str, ...]] = ()  # of the files of this kind
    path: str
    fields: Fields | None = None
    task_fields: Fields | None = None  # columns that own tasks name, read if they are there; set by the recipe
    split: str | None = None  # the column that holds train or test; `split` if the table has one
    test_path: str | None = None  # a second table with the test rows; `path` is then all training
    test_fraction: float = Field(default=0.1, ge=0.0, le=0.9)  # by a stable hash, if neither is set
    validation_fraction: float = Field(default=0.0, ge=0.0, le=0.5)  # of the training rows, if no column marks any
    test_by: str | None = None  # rows with equal values here stay on one side (a speaker, a patient)
    target: str | None = None  # the number or category that is predicted; without one, each of them in turn
    limit: int | None = Field(default=None, ge=1)  # at most so many records of a split, the first ones

    def load(self, path: str) -> Table:
        """The table at a path, of which only the columns passed to `Table.read` are needed."""
        raise NotImplementedError

    def reader(self, table: Table, path: str) -> RowReader:
        """What makes records of the rows of a table."""
        beside = str(Path(path, "any")) if Path(path).expanduser().is_dir() else path  # of a folder, files are in it
        return RowReader(table.names, self.fields, partial(read_beside, beside), path, self.task_fields)

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        path = self.test_path if self.test_path is not None and split == "test" else self.path
        needed = (self.split, self.test_by) if path == self.path else ()
        return self._source(name, path, lambda table: self._rows(table, split)[: self.limit], needed)

    def open_held_out(self, name: str) -> Source:
        """The rows that a column marks as test, or all without such a column; DataError if it marks none."""
        return self._source(name, self.test_path or self.path, self._held_out_rows)

    def _held_out_rows(self, table: Table) -> np.ndarray:
        column = self._split_column(table.names)
        if column is None:
            return np.arange(len(table))
        rows = rows_by_word(table.column(column), "test", table.where)
        if not len(rows):
            raise DataError(f"column {column!r} of {table.where} marks no row as test: mark some, or drop the column")
        return rows

    def _source(
        self, name: str, path: str, choose_rows: Callable[[Table], np.ndarray], needed: Sequence[str | None] = ()
    ) -> Source:
        table = self.load(path)
        reader = self.reader(table, path)
        split_column = self._split_column(table.names)
        read = {*reader.columns, *filter(None, (split_column, self._hash_column(table.names), *needed))}
        table.read(sorted(read))
        source = TableSource(name, table, reader, choose_rows(table))
        source.target = self.target
        shown = (column for column in table.names if column not in (split_column, self.test_by))
        source.columns = {column: reader.columns.get(column, ()) for column in shown}
        return source

    def _split_column(self, names: Sequence[str]) -> str | None:
        return next((column for column in (self.split, "split") if column in names), None)

    def _hash_column(self, names: Sequence[str]) -> str | None:
        own = self.fields.id if self.fields is not None else None
        return next((column for column in (self.test_by, own, "id") if column in names), None)

    def _rows(self, table: Table, split: Split) -> np.ndarray:
        rows, test_fraction = np.arange(len(table)), 0.0
        split_column = self._split_column(table.names)
        if self.test_path is not None:
            if split == "test":
                return rows
        elif split_column is not None:
            words = table.column(split_column)
            if split == "test" or len(rows_by_word(words, "validation", table.where)):
                return rows_by_word(words, split, table.where)
            rows = rows_by_word(words, "train", table.where)
        else:
            test_fraction = self.test_fraction
        column = self._hash_column(table.names)
        cells = [None] * len(table) if column is None else table.column(column)
        keys = [row if is_missing(cells[row]) else cells[row] for row in rows]
        return rows[rows_by_hash(keys, test_fraction, split, self.validation_fraction)]
