"""Windows of a time series cut out of a table, tested on what lies after the training rows; time columns parsed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from openm6.core.errors import DataError
from openm6.data.media import load_table
from openm6.data.records import MISSING_WORDS, Record, as_number, check_columns
from openm6.data.source import Neighbour, Source, SourceConfig, Split, check_index
from openm6.data.table import Table

TRIED = 50  # first cells that rule out most forms before a whole column is parsed
LONGEST = 32  # letters of a date
_CLOCKS = ("", " %H:%M", " %H:%M:%S")
_DATES = (
    "%Y-%m-%d",
    "%Y/%m/%d",
    "%Y.%m.%d",
    "%d.%m.%Y",
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%d-%m-%Y",
    "%m-%d-%Y",
    "%d %b %Y",
    "%d-%b-%Y",
    "%b %d, %Y",
    "%d %B %Y",
    "%B %d, %Y",
)
_MONTHS = ("%Y-%m", "%Y/%m", "%m/%Y", "%m.%Y", "%m-%Y", "%b %Y", "%b-%Y", "%B %Y", "%H:%M", "%H:%M:%S")
FORMATS = (*(day + clock for day in _DATES for clock in _CLOCKS), *_MONTHS)
_DOTTED_MONTH = re.compile(
    r"(0[1-9]|1[0-2])\.(1[89]|2[01])\d\d"
)  # 01.2024, which as a number would sort by month
_YEAR = re.compile(r"\d{4}")
_QUARTER = re.compile(r"(\d{4})[- ]?Q([1-4])")

Parse = Callable[[str], float]
"""A time as text -> a number that sorts by time; ValueError where the text has another form."""


def parse_times(cells: Sequence[Any], column: str, where: str, time_format: str | None = None) -> list[float]:
    """One number per cell, in order of time: seconds for dates, the numbers themselves for numbers.

    Raises:
        DataError: an empty cell, a cell that is no time, or dates that can be read in two ways.
    """
    if any(_is_empty(cell) for cell in cells):
        raise DataError(f"{where}: the time column {column!r} has empty cells: fill or drop those rows")
    if all(isinstance(cell, str) for cell in cells):
        texts = [cell.strip() for cell in cells]
        return _parse_texts(texts, f"{where}: the time column {column!r}", time_format)
    if time_format is not None:
        raise DataError(
            f"{where}: the time column {column!r} holds {type(cells[0]).__name__} values, which need no time_format: "
            "leave it out"
        )
    return _one_clock(
        [_time_number(cell, column, where) for cell in cells], cells, f"{where}: the time column {column!r}"
    )


def is_date(cell: Any) -> bool:
    """Whether a cell holds a date or a month, read in one way or in two; a number alone is no sign of time."""
    if isinstance(cell, (date, datetime)):
        return True
    text = cell.strip() if isinstance(cell, str) else ""
    if len(text) > LONGEST or not _YEAR.search(text):  # most texts are ruled out before any form is tried
        return False
    return not _all_parse([text], _plain_number) and bool(_fitting([text]))


def _is_empty(cell: Any) -> bool:
    return cell is None or cell != cell or (isinstance(cell, str) and cell.strip().lower() in MISSING_WORDS)


def _parse_texts(texts: list[str], where: str, time_format: str | None) -> list[float]:
    if time_format is not None:
        return [_by_format(text, row, where, time_format) for row, text in enumerate(texts)]
    if _all_parse(texts, _plain_number):
        return [float(text) for text in texts]
    fitting = _fitting(texts)
    if not fitting:
        raise DataError(_no_time(texts, where))
    found = [[parse(text) for text in texts] for parse in fitting.values()]
    if any(one != found[0] for one in found[1:]):
        choices = " or ".join(f'time_format: "{name}"' for name in fitting)
        raise DataError(f"{where} can be read in two ways, such as {texts[0]!r}: add {choices} to the source")
    return _one_clock(found[0], texts, where)


def _fitting(texts: Sequence[str]) -> dict[str, Parse]:
    """The forms that parse every text, by name; ISO stands for all forms that agree with it."""
    forms: dict[str, Parse] = {"ISO": _iso, "quarter": _quarter}
    forms |= {name: partial(_strptime, time_format=name) for name in FORMATS}
    tried = {name: parse for name, parse in forms.items() if _all_parse(texts[:TRIED], parse)}
    return {name: parse for name, parse in tried.items() if _all_parse(texts[TRIED:], parse)}


def _all_parse(texts: Sequence[str], parse: Parse) -> bool:
    try:
        for text in texts:
            parse(text)
    except (ValueError, OverflowError):
        return False
    return True


def _plain_number(text: str) -> float:
    if _DOTTED_MONTH.fullmatch(text):
        raise ValueError(text)
    return float(text)


def _iso(text: str) -> float:
    return _seconds(datetime.fromisoformat(text))


def _quarter(text: str) -> float:
    found = _QUARTER.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return _seconds(datetime(int(found[1]), 3 * int(found[2]) - 2, 1))


def _strptime(text: str, time_format: str) -> float:
    return _seconds(datetime.strptime(text, time_format))


def _by_format(text: str, row: int, where: str, time_format: str) -> float:
    try:
        return _strptime(text, time_format)
    except ValueError:
        raise DataError(
            f"{where} holds {text[:40]!r} in row {row}, which time_format {time_format!r} does not fit: change either"
        ) from None


def _no_time(texts: Sequence[str], where: str) -> str:
    """The error of a column that no format parses: the first cell that the best format does not."""
    forms: list[Parse] = [
        _plain_number,
        _iso,
        _quarter,
        *(partial(_strptime, time_format=name) for name in FORMATS),
    ]
    best = max(forms, key=lambda parse: sum(_all_parse([text], parse) for text in texts[:TRIED]))
    row = next((row for row, text in enumerate(texts) if not _all_parse([text], best)), 0)
    return (
        f"{where} holds {texts[row][:40]!r} in row {row}, which is not a number or date like the others: "
        'correct it, or add a form such as time_format: "%m/%d/%Y" to the source'
    )


def _seconds(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _time_number(cell: Any, column: str, where: str) -> float:
    if isinstance(cell, datetime):
        return _seconds(cell)
    if isinstance(cell, date):
        return _seconds(datetime(cell.year, cell.month, cell.day))
    if isinstance(cell, time):
        return cell.hour * 3600 + cell.minute * 60 + cell.second + cell.microsecond / 1e6
    if isinstance(cell, (int, float, Decimal)):
        return cell  # type: ignore[return-value]  # a whole number stays exact
    raise DataError(
        f"{where}: the time column {column!r} holds a {type(cell).__name__} where a number or date is expected: "
        "choose another column"
    )


def _one_clock(numbers: list[float], cells: Sequence[Any], where: str) -> list[float]:
    """The numbers, unless some of the times have a zone and others none, so that they cannot be compared."""
    zones = {_has_zone(cell) for cell in cells}
    if len(zones) > 1:
        raise DataError(f"{where} has times with and without a time zone: write all of them in one way")
    return numbers


def _has_zone(cell: Any) -> bool:
    if isinstance(cell, str):
        try:
            return datetime.fromisoformat(cell).tzinfo is not None
        except ValueError:
            return False
    return isinstance(cell, datetime) and cell.tzinfo is not None


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
    """Where a window lies: the rows of the table it covers and their description."""

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
            raise ValueError("time_format describes the column `time`: name that column, too")
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
