"""Windows of a time series cut out of a table, tested on what lies after the training rows; time columns read."""

# Shapes: R rows of the table in order of time, C columns, L = context + horizon rows of a window

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from functools import partial
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from openm6.core.errors import DataError
from openm6.core.log import get_log
from openm6.data.media import table_config
from openm6.data.records import Record, as_number, is_blank, is_missing
from openm6.data.source import Neighbour, Source, SourceConfig, Split, check_index
from openm6.data.text_tables import CsvConfig
from openm6.modalities.dates import FORMS, Parse, is_date, parsed, plain_number, strptime, to_seconds
from openm6.modalities.regression import MAX_NUMBER, Clock

DISTINCT = 0.9  # of the times of a series, at least
TRIED = 50  # first cells by which the form of most is found, if they have several


def parse_times(cells: Sequence[Any], column: str, where: str, time_format: str | None = None) -> list[float]:
    """One number per cell that sorts by time, of dates seconds; DataError for cells without, or two ways to read."""
    where = f"{where}: the time column {column!r}"
    if any(is_blank(cell) for cell in cells):
        raise DataError(f"{where} has empty cells: fill or drop those rows")
    if all(isinstance(cell, str) for cell in cells):
        times = _parse_texts([cell.strip() for cell in cells], where, time_format)
    elif time_format is not None:
        raise DataError(f"{where} holds {type(cells[0]).__name__} values, which need no time_format: leave it out")
    else:
        times = [_time_number(cell, where) for cell in cells]
    if len({_has_zone(cell) for cell in cells}) > 1:
        raise DataError(f"{where} has times with and without a time zone: write all of them in one way")
    return times


def _parse_texts(texts: list[str], where: str, time_format: str | None) -> list[float]:
    if time_format is not None:
        parse = partial(strptime, time_format=time_format)
        times = parsed(texts, parse)
        if times is None:
            row, text = _first_unlike(texts, parse)
            raise DataError(
                f"{where} holds {text!r} in row {row}, which time_format {time_format!r} does not fit: change either"
            )
        return times
    numbers = parsed(texts, plain_number)
    if numbers is not None:
        return numbers
    found = {name: times for name, parse in FORMS.items() if (times := parsed(texts, parse))}
    if not found:
        # The first cell that the form of most cells does not parse.
        tried = texts[:TRIED]
        best = max((plain_number, *FORMS.values()), key=lambda form: sum(bool(parsed([one], form)) for one in tried))
        row, text = _first_unlike(texts, best)
        raise DataError(
            f"{where} holds {text!r} in row {row}, which is not a number or date like the others: "
            'correct it, or add a form such as time_format: "%m/%d/%Y" to the source'
        )
    first, *others = found.values()  # ISO stands for all forms that agree with it
    if any(times != first for times in others):
        choices = " or ".join(f'time_format: "{name}"' for name in found)
        raise DataError(f"{where} can be read in two ways, such as {texts[0]!r}: add {choices} to the source")
    return first


def _first_unlike(texts: Sequence[str], parse: Parse) -> tuple[int, str]:
    """Row and beginning of the first text of another form."""
    return next((row, text[:40]) for row, text in enumerate(texts) if not parsed([text], parse))


def _time_number(cell: Any, where: str) -> float:
    if isinstance(cell, date):
        return to_seconds(cell)
    if isinstance(cell, time):
        return cell.hour * 3600 + cell.minute * 60 + cell.second + cell.microsecond / 1e6
    if isinstance(cell, (int, float, Decimal)):
        return cell  # type: ignore[return-value]  # a whole number stays exact
    raise DataError(f"{where} holds a {type(cell).__name__} where a number or date is expected: choose another column")


def _has_zone(cell: Any) -> bool:
    if isinstance(cell, str):
        try:
            cell = datetime.fromisoformat(cell.strip())
        except ValueError:
            return False
    return isinstance(cell, datetime) and cell.tzinfo is not None


class WindowsConfig(SourceConfig):
    """Sliding windows over the number columns of a table (Parquet, CSV or JSONL; `embedded:NAME` too).

    Split by time: in each group the last `test_fraction` of the rows are forecast by test windows, and the last
    `validation_fraction` of those before by validation windows; their contexts may reach back into training rows.
    """

    kind: Literal["windows"] = "windows"
    path: str
    columns: list[str]
    past_covariates: list[str] = []  # number columns that are seen beside the past of those to forecast
    known_covariates: list[str] = []  # those whose later values are known, too: prices, holidays
    time: str | None = None  # the column to sort by; the order of the table if not set
    decimal: Literal[",", "."] | None = None  # the decimal mark of a CSV, where it can be read in two ways
    time_format: str | None = None  # such as "%m/%d/%Y", for dates that can be read in two ways
    group: str | None = None  # one series per value of this column; windows never cross groups
    context: int = Field(default=32, ge=1, le=65536)
    horizon: int = Field(default=8, ge=1, le=65536)
    stride: int = Field(default=1, ge=1)
    test_fraction: float = Field(default=0.2, ge=0.0, le=0.9)
    validation_fraction: float = Field(default=0.0, ge=0.0, le=0.5)  # of the training rows, the last ones

    @model_validator(mode="after")
    def _columns_once(self) -> Self:
        if not self.columns or len(set(self.numbers)) != len(self.numbers):
            raise ValueError("columns must name at least one column, each once, and no covariate")
        if self.time_format is not None and self.time is None:
            raise ValueError("time_format describes the column `time`: name that column, too")
        return self

    @property
    def numbers(self) -> list[str]:
        return [*self.columns, *self.past_covariates, *self.known_covariates]

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        return self._source(name, split)

    def open_held_out(self, name: str) -> Source:
        return self.model_copy(update={"test_fraction": 0.0, "validation_fraction": 0.0})._source(
            name, "train", trains=False
        )

    def _source(self, name: str, split: Split, trains: bool = True) -> Source:
        config = table_config(self.path)
        if self.decimal is not None and not isinstance(config, CsvConfig):
            raise DataError(f"{name}: decimal describes a CSV, and {self.path} is none: leave it out")
        table = config.model_copy(update={} if self.decimal is None else {"decimal": self.decimal}).load(self.path)
        needed = list(dict.fromkeys([*self.numbers, *filter(None, (self.time, self.group))]))
        table.read(needed)
        if table.unreadable and split == "train":
            some = f"{len(table.unreadable):,} rows that cannot be read, such as: {table.unreadable[0]}"
            get_log().warning(f"source {name} leaves out of {self.path} {some}")
        # Rows that cannot be read come last, without cells.
        cells = {column: table.column(column)[: len(table) - len(table.unreadable)] for column in needed}
        values = np.array([[_number(cell, column) for cell in cells[column]] for column in self.numbers]).T  # R C
        named = {"start": self.time, "group": self.group}
        described = {key: cells[column] for key, column in named.items() if column is not None}
        length = self.context + self.horizon
        windows: list[tuple[np.ndarray, dict[str, Any]]] = []
        times: np.ndarray | None = None  # None: the rows are in order as they are
        if self.time is not None:
            times = np.asarray(parse_times(cells[self.time], self.time, self.path, self.time_format))
        dated = self.time_format is not None or any(map(is_date, described.get("start", ())[:1]))
        short = 0
        for rows in self._groups(described.get("group", [None] * len(values)), times):
            tested = len(rows) - round(len(rows) * self.test_fraction)
            validated = tested - round(tested * self.validation_fraction)
            borders = {"train": (0, validated), "validation": (validated, tested), "test": (tested, len(rows))}
            first, last = borders[split]
            short += last - first < length
            for begin in range(max(0, first - (split != "train") * self.context), last - length + 1, self.stride):
                covered = rows[begin : begin + length]
                # Without a value there is nothing to forecast.
                if np.isnan(values[covered[self.context :], : len(self.columns)]).all():
                    continue
                about: dict[str, Any] = {key: str(column[covered[0]]) for key, column in described.items()}
                # Targets of windows that start within one horizon overlap: they are no independent evidence.
                about["block"] = f"{about.get('group', '')}/{begin // self.horizon}"
                if split == "train":
                    about["position"] = begin, last - length + 1
                windows.append((covered, about))
        if not windows and split == "train":
            raise DataError(f"{name}: {self.path} has fewer than {length} rows to train on: lower context or horizon")
        if short and split == "train" and trains:
            get_log().warning(
                f"source {name} leaves out {short:,} series with fewer than {length} rows to train on: "
                "lower context or horizon if they matter"
            )
        return WindowSource(name, self, values, windows, times if dated else None)

    def _groups(self, names: Sequence[Any], times: np.ndarray | None) -> list[np.ndarray]:
        groups: dict[Any, list[int]] = defaultdict(list)
        for row, value in enumerate(names):
            known = value if isinstance(value, Hashable) else str(value)
            groups[None if is_missing(known) else known].append(row)
        if times is None:
            return [np.array(rows) for rows in groups.values()]
        for rows in groups.values():
            if 1 < len({times[row] for row in rows}) < DISTINCT * len(rows):
                raise DataError(
                    f"{self.path}: many times in column {self.time!r} occur more than once: name the column that "
                    "separates the series as `group`, or leave `time` out to keep the order of the table"
                )
        return [np.array(sorted(rows, key=times.__getitem__)) for rows in groups.values()]


def clock_of(seconds: np.ndarray) -> Clock:
    """The times of a window and its median step, in seconds."""
    return tuple(seconds.tolist()), float(np.median(np.diff(seconds)))


@dataclass(eq=False)
class WindowSource(Source):
    """Windows of L rows: `series` holds L values per column, of which the last `horizon` are to be forecast.

    `extra` holds `context`, `horizon`, `block` (windows of one block have overlapping targets), for training windows
    `position` (the first row, and how many rows a window of this group can begin with) and, if the table has them,
    `start`, `group` and, of dates, `clock`: the times and the median step, in seconds.
    """

    name: str
    config: WindowsConfig
    cells: np.ndarray  # R C, NaN if missing, infinite if the cell is broken
    windows: list[tuple[np.ndarray, dict[str, Any]]]  # the rows of the table of each, L, and what `extra` says of them
    seconds: np.ndarray | None  # R, None if the times are unknown or no dates

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Record:
        config = self.config
        rows, about = self.windows[check_index(index, len(self))]
        values = self.cells[rows]  # L C
        broken = np.argwhere(np.isinf(values))
        if len(broken):
            row, column = broken[0]
            where = f"row {rows[row]}, column {config.numbers[column]!r} of {config.path}"
            raise DataError(f"{self.name}, {where}: not a number of at most {MAX_NUMBER:g}")
        cells = values.astype(object)
        cells[np.isnan(values)] = None
        series = dict(zip(config.numbers, cells.T.tolist(), strict=True))
        extra = {"context": config.context, "horizon": config.horizon, **about}
        if self.seconds is not None:
            extra["clock"] = clock_of(self.seconds[rows])
        if len(config.numbers) > len(config.columns):
            extra |= {"past_covariates": config.past_covariates, "known_covariates": config.known_covariates}
        return {"id": f"{self.name}/{int(rows[0])}", "series": series, "extra": extra}


def _number(cell: Any, column: str) -> float:
    """A cell as a number: NaN if it is missing, infinite if it is broken or too large."""
    try:
        number = as_number(cell, column)
    except DataError:
        return np.inf
    return np.nan if number is None else number
