"""Windows: pieces of a time series cut out of a table; what is tested on lies after what is trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from openm6.base.errors import DataError
from openm6.data.fields import check_columns
from openm6.data.records import Record, as_number
from openm6.data.source import Neighbour, Source, SourceConfig, Split, check_index
from openm6.data.table import Table
from openm6.data.tables import load_table
from openm6.data.times import parse_times

# Letters: R rows of the table in order of time, C columns, L = context + horizon rows in a window


class WindowSource(Source):
    """Windows of L rows: `series` holds L values a column, of which the last `horizon` are to be forecast.

    `extra` holds `context`, `horizon`, `block` (windows of one block have overlapping targets) and, where the table
    has them, `start` and `group`.
    """

    def __init__(self, name: str, config: WindowsConfig, values: np.ndarray, starts: list[_Start]) -> None:
        self.name = name
        self._config = config
        self._values = values  # R C, NaN where missing, infinite where the cell could not be read
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        config = self._config
        start = self._starts[check_index(index, len(self))]
        window = self._values[start.rows]  # L C
        broken = np.isinf(window)
        if broken.any():
            row, column = np.argwhere(broken)[0]
            place = f"row {start.rows[row]}, column {config.columns[column]!r}"
            raise DataError(f"{self.name}, {place} of {config.path}: not a finite number")
        series = {
            column: [None if np.isnan(value) else float(value) for value in window[:, number]]
            for number, column in enumerate(config.columns)
        }
        extra = {"context": config.context, "horizon": config.horizon, **start.about}
        return {"id": f"{self.name}/{int(start.rows[0])}", "series": series, "extra": extra}


class _Start:
    """Where a window lies: the rows of the table it covers and what is said about it."""

    def __init__(self, rows: np.ndarray, about: dict[str, Any]) -> None:
        self.rows = rows
        self.about = about


class WindowsConfig(SourceConfig):
    """Sliding windows over the number columns of a table (Parquet, CSV or JSONL; `embedded:NAME` too).

    Split by time: in each group the last `test_share` of the rows are forecast by test windows, whose context may
    reach back into the training rows; training windows hold training rows alone.
    """

    kind: Literal["windows"] = "windows"
    path: str
    columns: list[str]
    time: str | None = None  # the column to sort by; the order of the table where not given
    time_format: str | None = None  # such as "%m/%d/%Y", for dates that can be read in two ways
    group: str | None = None  # one series per value of this column; windows never cross groups
    context: int = Field(default=32, ge=1, le=65536)
    horizon: int = Field(default=8, ge=1, le=65536)
    stride: int = Field(default=1, ge=1)
    test_share: float = Field(default=0.2, ge=0.0, le=0.9)

    @field_validator("columns")
    @classmethod
    def _some(cls, columns: list[str]) -> list[str]:
        if not columns or len(set(columns)) != len(columns):
            raise ValueError("columns must name at least one column, each once")
        return columns

    @model_validator(mode="after")
    def _format_has_a_column(self) -> WindowsConfig:
        if self.time_format is not None and self.time is None:
            raise ValueError("time_format says how the column `time` is written: name that column, too")
        return self

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        """The windows of one split; see SourceConfig.open."""
        return self._source(name, split, self.test_share)

    def _source(self, name: str, split: Split, test_share: float) -> Source:
        table = load_table(self.path, self._needed)
        values = np.stack([_numbers(table, column) for column in self.columns], axis=1)  # R C
        starts = [
            start
            for rows in self._groups(table)
            for start in self._windows(table, values, rows, split, test_share)
        ]
        if not starts and split == "train":
            length = self.context + self.horizon
            raise DataError(
                f"{name}: {self.path} has fewer than {length} rows to train on: lower context or horizon"
            )
        return WindowSource(name, self, values, starts)

    def open_held_out(self, name: str) -> Source:
        """The windows of all rows."""
        return self._source(name, "train", 0.0)

    def _needed(self, names: Sequence[str]) -> list[str]:
        needed = list(dict.fromkeys([*self.columns, *filter(None, (self.time, self.group))]))
        check_columns(needed, names, self.path)
        return needed

    def _groups(self, table: Table) -> list[np.ndarray]:
        """Row numbers of each group in order of time."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for row, value in enumerate(table.column(self.group) if self.group else [None] * len(table)):
            groups[value].append(row)
        if self.time is None:
            return [np.array(rows) for rows in groups.values()]
        times = parse_times(table.column(self.time), self.time, self.path, self.time_format)
        for rows in groups.values():
            if 1 < len({times[row] for row in rows}) <= len(rows) / 2:
                raise DataError(
                    f"{self.path}: most times in column {self.time!r} occur more than once: name the column that tells "
                    "the series apart as `group`, or leave `time` out to keep the order of the table"
                )
        return [np.array(sorted(rows, key=times.__getitem__)) for rows in groups.values()]

    def _windows(
        self, table: Table, values: np.ndarray, rows: np.ndarray, split: Split, test_share: float
    ) -> list[_Start]:
        length = self.context + self.horizon
        border = len(rows) - round(len(rows) * test_share)
        if split == "validation":
            return []
        if split == "train":
            first, last = 0, border - length
        else:
            first, last = max(0, border - self.context), len(rows) - length
        starts = []
        for begin in range(first, last + 1, self.stride):
            covered = rows[begin : begin + length]
            if not np.isnan(values[covered[self.context :]]).all():  # nothing to forecast otherwise
                about = self._about(table, int(covered[0]))
                # Targets of windows that start within one horizon overlap: they are no independent evidence.
                about["block"] = f"{about.get('group', '')}/{begin // self.horizon}"
                starts.append(_Start(covered, about))
        return starts

    def _about(self, table: Table, row: int) -> dict[str, Any]:
        named = {"start": self.time, "group": self.group}
        return {
            key: str(table.row(row, (column,))[column]) for key, column in named.items() if column is not None
        }


def _numbers(table: Table, column: str) -> np.ndarray:
    """A column as float64: NaN where missing, infinite where the cell is broken."""
    return np.array([_number(cell, column) for cell in table.column(column)], dtype=np.float64)


def _number(cell: Any, column: str) -> float:
    try:
        number = as_number(cell, column)
    except DataError:
        return np.inf
    return np.nan if number is None else number
