"""Dates: a cell of any form that tables have, as a time that sorts, and as number columns that a model reads."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any

from openm6.core.errors import DataError

LONGEST = 32  # letters of a date
_DATES = ("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y",
          "%d %b %Y", "%d-%b-%Y", "%Y-%b-%d", "%b %d, %Y", "%d %B %Y", "%B %d, %Y")  # fmt: skip
_MONTHS = ("%Y-%m", "%Y/%m", "%m/%Y", "%m.%Y", "%m-%Y", "%YM%m", "%Y-%b", "%Y %b", "%Y %B", "%b %Y", "%b-%Y", "%B %Y",
           "%H:%M", "%H:%M:%S")  # fmt: skip
FORMATS = (*(day + clock for day in _DATES for clock in ("", " %H:%M", " %H:%M:%S")), *_MONTHS)
_DOTTED_MONTH = re.compile(r"(0[1-9]|1[0-2])\.(1[89]|2[01])\d\d")  # 01.2024, which as a number would sort by month
_YEAR = re.compile(r"\d{4}")
_QUARTER = re.compile(r"(?P<year>\d{4})[- ]?Q(?P<quarter>[1-4])|Q(?P<first>[1-4])[- /]?(?P<last>\d{4})", re.IGNORECASE)
_FIRST, _LAST = -62_135_596_800.0, 253_402_300_799.0  # seconds of the years 1 and 9999

Parse = Callable[[str], float]  # a time as text -> a number that sorts by time; ValueError for another form


def is_date(cell: Any) -> bool:
    """Whether a cell holds a date or a month, read in one way or in two; a number alone is no sign of time."""
    if isinstance(cell, date):
        return True
    text = cell.strip() if isinstance(cell, str) else ""
    if len(text) > LONGEST or not _YEAR.search(text):  # most texts are ruled out before any form is tried
        return False
    return not parsed([text], plain_number) and any(parsed([text], parse) for parse in FORMS.values())


def date_formats(cells: Sequence[Any]) -> tuple[str, ...]:
    """The formats that fit most of these dates, one per way to read them; none if they need none, such as ISO."""
    texts = [cell.strip() for cell in cells if isinstance(cell, str)]
    found = {name: [parsed([text], parse) for text in texts] for name, parse in FORMS.items()}
    most = max(sum(map(bool, times)) for times in found.values())
    best = {name: times for name, times in found.items() if sum(map(bool, times)) == most}
    if {"ISO", "quarter"} & best.keys():
        return ()
    return tuple({str(times): name for name, times in reversed(best.items())}.values())


def date_names(column: str) -> list[str]:
    """The number columns that stand for a column of dates."""
    return [f"{column} {part}" for part in ("year", "month", "weekday", "hour")]


def date_columns(cell: Any, column: str, form: str | None = None) -> dict[str, float | None]:
    """A date in UTC as numbers, None if missing: year with its day, month, weekday from 1, and the hour if not 0."""
    if cell is None or str(cell) in ("NaT", "nan"):  # of pandas and NumPy
        return dict.fromkeys(date_names(column)[:-1])
    seconds = _seconds_of(cell, column, form)
    moment = datetime(1970, 1, 1) + timedelta(seconds=min(max(seconds, _FIRST), _LAST))
    parts = [moment.year + (moment.timetuple().tm_yday - 1) / 365.25, moment.month, moment.isoweekday()]
    hour = seconds % 86_400 / 3600
    return dict(zip(date_names(column), map(float, [*parts, hour] if hour else parts), strict=False))


def split_dates(row: Mapping[str, Any], forms: Mapping[str, str | None]) -> dict[str, Any]:
    """A row with columns for the parts of its dates instead of them; `forms` are those of the columns of dates."""
    split = (date_columns(cell, name, forms[name]) if name in forms else {name: cell} for name, cell in row.items())
    return {name: value for columns in split for name, value in columns.items()}


def _seconds_of(cell: Any, column: str, form: str | None) -> float:
    if isinstance(cell, date):
        return to_seconds(cell)
    # 20240131 is a float if other cells of its column are missing.
    text = (f"{cell:.15g}" if isinstance(cell, float) else str(cell)).strip()
    known = [FORMS["ISO"]] if parsed([text], FORMS["ISO"]) else list(FORMS.values())
    parses = [partial(strptime, time_format=form)] if form else known
    times = {time for parse in parses for time in parsed([text], parse) or () if form or len(text) <= LONGEST}
    if len(times) == 1:
        return times.pop()
    problem = "can be read in two ways" if times else f"does not fit its format {form!r}" if form else "is not a date"
    raise DataError(f"column {column!r} holds {text[:40]!r}, which {problem}: fix it, or set its format in `dates`")


def parsed(texts: Sequence[str], parse: Parse) -> list[float] | None:
    """All times of one form, or None if one of them has another."""
    try:
        return [parse(text) for text in texts]
    # A format that names a part twice is a broken pattern.
    except (ValueError, OverflowError, re.error):
        return None


def plain_number(text: str) -> float:
    """A number that is no month with a point; else ValueError."""
    if _DOTTED_MONTH.fullmatch(text):
        raise ValueError(text)
    return float(text)


def _quarter(text: str) -> float:
    found = _QUARTER.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return to_seconds(datetime(int(found["year"] or found["last"]), 3 * int(found["quarter"] or found["first"]) - 2, 1))


def strptime(text: str, time_format: str) -> float:
    """Seconds of a time in a format; ValueError if it has another."""
    return to_seconds(datetime.strptime(text, time_format))


def to_seconds(moment: date) -> float:
    """Seconds since 1970, of a moment without a zone in UTC, of a day its beginning."""
    if not isinstance(moment, datetime):
        moment = datetime(moment.year, moment.month, moment.day)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


FORMS: dict[str, Parse] = {
    "ISO": lambda text: to_seconds(datetime.fromisoformat(text)),
    "quarter": _quarter,
    **{name: partial(strptime, time_format=name) for name in FORMATS},
}
