"""Dates are read in whatever form they have, and become number columns named after their own."""

from __future__ import annotations

import math
from datetime import date, datetime
from typing import Any

import pandas as pd
import pytest

from openm6.core.errors import DataError
from openm6.modalities.dates import date_columns, date_formats, is_date, split_dates


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("1949-01", True),
        ("01/02/2024", True),
        ("Jan 2024", True),
        ("1977-Jan", True),
        ("1977 January", True),
        ("2024Q1", True),
        ("Q1 2024", True),
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


WEDNESDAY = {"day year": 2024 + 30 / 365.25, "day month": 1.0, "day weekday": 3.0}


@pytest.mark.parametrize(
    ("cell", "form"),
    [
        ("2024-01-31", None),
        (" 31.01.2024 ", None),
        ("31/01/2024", None),
        ("2024-01-31", "%Y-%m-%d"),
        ("01/31/24", "%m/%d/%y"),
        ("20240131", "%Y%m%d"),
        (20240131, "%Y%m%d"),
        (20240131.0, "%Y%m%d"),
        (date(2024, 1, 31), None),
        (datetime(2024, 1, 31), "%d.%m.%Y"),
        (pd.Timestamp("2024-01-31", tz="UTC"), None),
    ],
)
def test_a_date_becomes_numbers(cell: Any, form: str | None) -> None:
    assert date_columns(cell, "day", form) == pytest.approx(WEDNESDAY)


@pytest.mark.parametrize(
    ("cell", "hour"),
    [
        ("2024-01-31 13:30", 13.5),
        ("2024-01-31T13:30:00Z", 13.5),
        ("2024-01-31T13:30+05:00", 8.5),
        (datetime(2024, 1, 31, 0, 15), 0.25),
    ],
)
def test_times_of_a_day_have_an_hour(cell: Any, hour: float) -> None:
    assert date_columns(cell, "day") == pytest.approx(WEDNESDAY | {"day hour": hour})


def test_the_years_go_on_evenly_and_months_are_their_first_day() -> None:
    years = [date_columns(cell, "t")["t year"] for cell in ("1969-12-31", "1970-01", "1970Q3", "2024-12-31")]
    assert years == sorted(years) and years[1] == 1970.0 and years[3] < 2025
    assert date_columns("0001-01-01T00:00+10:00", "t")["t year"] == 1.0


@pytest.mark.parametrize("cell", [None, pd.NaT])
def test_a_missing_date_is_missing_in_all_its_parts(cell: Any) -> None:
    assert date_columns(cell, "day") == dict.fromkeys(WEDNESDAY)


@pytest.mark.parametrize(
    ("cell", "form", "sentence"),
    [
        ("soon", None, "'soon', which is not a date"),
        ("2024-02-30", None, "'2024-02-30', which is not a date"),
        ("", None, "'', which is not a date"),
        (3.5, None, "which is not a date"),
        (math.inf, None, "which is not a date"),
        (["2024-01-31"], None, "which is not a date"),
        ("01/02/2024", None, "'01/02/2024', which can be read in two ways: fix it, or set its format in `dates`"),
        ("2024-01-31", "%d.%m.%Y", "'2024-01-31', which does not fit its format '%d.%m.%Y'"),
        ("31.01.2024", "dd.mm.yyyy", "does not fit its format 'dd.mm.yyyy'"),
        ("3131", "%d%d", "does not fit its format '%d%d'"),
        ("1" * 400, None, "which is not a date"),
    ],
)
def test_what_is_no_date_is_refused_in_one_sentence(cell: Any, form: str | None, sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        date_columns(cell, "day", form)
    assert str(caught.value).startswith("column 'day' holds ") and sentence in str(caught.value)


@pytest.mark.parametrize(
    ("cells", "formats"),
    [
        (["2024-01-31", "2024-02-01T10:00"], ()),
        ([date(2024, 1, 31)], ()),
        (["2024Q1", "Q2 2024"], ()),
        (["31.01.2024", "01.02.2024"], ("%d.%m.%Y",)),
        (["31/01/2024", "01/02/2024", "broken"], ("%d/%m/%Y",)),
        (["May 2024", "Jan 2024"], ("%b %Y",)),
        (["31.01.2024 10:00", "01.02.2024 11:30"], ("%d.%m.%Y %H:%M",)),
        (["01/02/2024", "03/02/2024"], ("%m/%d/%Y", "%d/%m/%Y")),
    ],
)
def test_the_format_of_a_column(cells: list[Any], formats: tuple[str, ...]) -> None:
    assert date_formats(cells) == formats


def test_dates_of_a_row_are_replaced() -> None:
    row = {"price": 3.5, "day": "31.01.2024"}
    assert split_dates(row, {"day": "%d.%m.%Y", "other": None}) == pytest.approx({"price": 3.5} | WEDNESDAY)
    assert split_dates(row, {}) == row
