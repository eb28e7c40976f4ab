"""Times as numbers that sort: what is parsed, and what is refused with which advice."""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from openm6.base.errors import DataError
from openm6.data.windows import FORMATS, is_date, parse_times

DAYS = [date(2023, 11, 5), date(2023, 12, 31), date(2024, 1, 31), date(2024, 2, 1), date(2024, 10, 2)]


def parse(cells: list[Any], time_format: str | None = None) -> list[float]:
    return parse_times(cells, "day", "t.csv", time_format)


@pytest.mark.parametrize("cells", [["2", "10", "1", "11"], [2, 10, 1, 11], ["2.0", "1e1", "1", "11"]])
def test_numbers_sort_as_numbers(cells: list[Any]) -> None:
    assert np.argsort(parse(cells)).tolist() == [2, 0, 1, 3]


def test_whole_numbers_stay_exact() -> None:
    nanoseconds = [1_700_000_000_000_000_001, 1_700_000_000_000_000_000]
    assert sorted(parse(nanoseconds)) == nanoseconds[::-1]


@pytest.mark.parametrize(
    "time_format",
    ["%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%Y-%m-%dT%H:%M", "%d %b %Y", "%b %d, %Y",
     "%Y%m%d"],
)  # fmt: skip
def test_dates_of_many_forms_sort_by_time(time_format: str) -> None:
    shuffled = [DAYS[n] for n in (3, 0, 4, 2, 1)]
    order = np.argsort(parse([day.strftime(time_format) for day in shuffled])).tolist()
    assert [shuffled[n] for n in order] == DAYS


@pytest.mark.parametrize("time_format", FORMATS)
def test_every_form_gives_back_its_own_times(time_format: str) -> None:
    moments = [datetime(2024, 1, 31, 13, 5), datetime(2023, 12, 13, 22, 7), datetime(2024, 5, 14, 9, 40)]
    texts = [moment.strftime(time_format) for moment in moments]
    wanted = [datetime.strptime(text, time_format).replace(tzinfo=UTC).timestamp() for text in texts]
    assert parse(texts) == wanted


@pytest.mark.parametrize(
    "cells",
    [
        ["1950-12", "1950-02", "1949-11"],
        ["Dec 1950", "Feb 1950", "Nov 1949"],
        ["12.1950", "02.1950", "11.1949"],
        ["1950Q4", "1950-Q1", "1949Q3"],
    ],
)
def test_months_and_quarters(cells: list[str]) -> None:
    assert np.argsort(parse(cells)).tolist() == [2, 1, 0]


def test_typed_cells() -> None:
    assert parse([date(1970, 1, 2), datetime(1970, 1, 1, 1)]) == [86400.0, 3600.0]
    assert parse([time(0, 1), time(0, 0, 2)]) == [60, 2]
    assert parse([Decimal("1.5"), 2]) == [Decimal("1.5"), 2]


def test_months_before_days_or_after_is_asked_for() -> None:
    cells = ["01/02/2024", "02/02/2024", "03/02/2024"]
    with pytest.raises(DataError) as caught:
        parse(cells)
    assert str(caught.value) == (
        "t.csv: the time column 'day' can be read in two ways, such as '01/02/2024': "
        'add time_format: "%d/%m/%Y" or time_format: "%m/%d/%Y" to the source'
    )
    by_month = parse(cells, "%m/%d/%Y")
    assert by_month == parse(["2024-01-02", "2024-02-02", "2024-03-02"])


@pytest.mark.parametrize(
    ("cells", "time_format", "sentence"),
    [
        (
            ["2024-01-01", "2024-01-02", "soon"],
            None,
            "holds 'soon' in row 2, which is not a number or date like",
        ),
        (["1", "2", "x"], None, "holds 'x' in row 2"),
        (["13/01/2024", "01/13/2024"], None, 'such as time_format: "%m/%d/%Y"'),
        (["1/1/24", "x"], "%m/%d/%y", "holds 'x' in row 1, which time_format '%m/%d/%y' does not fit"),
        (["1", ""], None, "has empty cells: fill or drop those rows"),
        (["1", "NA"], None, "has empty cells"),
        ([1.0, float("nan")], None, "has empty cells"),
        ([[1], [2]], None, "holds a list where a number or date is expected"),
        ([1, 2], "%Y", "need no time_format: leave it out"),
        (["2024-01-01T00:00Z", "2024-01-02T00:00"], None, "with and without a time zone"),
    ],
)
def test_what_is_refused(cells: list[Any], time_format: str | None, sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(cells, time_format)
    assert sentence in str(caught.value)


def test_zones_are_compared_in_one_clock() -> None:
    late, early = parse(["2024-01-01T02:00+00:00", "2024-01-01T02:00+05:00"])
    assert late - early == 5 * 3600


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("1949-01", True),
        ("01/02/2024", True),
        ("Jan 2024", True),
        ("2024Q1", True),
        ("2024-01-31T10:00:00.5+01:00", True),
        (date(2024, 1, 1), True),
        ("2024", False),
        ("20240131", False),
        (1, False),
        ("a cup of 2024", False),
        ("word " * 100 + "2024", False),
    ],
)
def test_dates_are_recognised(cell: Any, expected: bool) -> None:
    assert is_date(cell) is expected
