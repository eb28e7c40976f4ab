"""The time column of a series as numbers that sort: numbers, ISO dates, and dates that can be read in one way only."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from functools import partial
from typing import Any

from openm6.base.errors import DataError
from openm6.data.records import MISSING_WORDS

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
        [_number(cell, column, where) for cell in cells], cells, f"{where}: the time column {column!r}"
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
    """What to say of a column that no form parses: the first cell that the most fitting form does not."""
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


def _number(cell: Any, column: str, where: str) -> float:
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
