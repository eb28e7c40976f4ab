"""Times of series in DataFrames: read as in the training, and gone on with."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from openm6.api.times import frequency, read_times, same_times, times_ahead
from openm6.core.errors import DataError

MONTHS = ["2024-01-01", "2024-02-01", "2024-03-01"]


def read(texts: list[str], time_format: str | None = None) -> pd.Series:
    return read_times(pd, pd.Series(texts, name="timestamp"), time_format)


@pytest.mark.parametrize(
    ("texts", "time_format", "expected"),
    [
        (["13.01.2024", "13.02.2024", "13.03.2024"], None, ["2024-01-13", "2024-02-13", "2024-03-13"]),
        (["01/01/2024", "01/02/2024", "01/03/2024"], "%d/%m/%Y", MONTHS),
        (["01.2024", "02.2024", "03.2024"], "%m.%Y", MONTHS),
        (["2024M01", "2024M02", "2024M03"], None, MONTHS),
        (["2024-01-01", "2024-02-01", "2024-03-01"], None, MONTHS),
        (["2024-01-01", "2024-02-01", "2024-03-01"], "%d/%m/%Y", MONTHS),
        (["20240101", "20240201", "20240301"], None, MONTHS),
        (["20240101", "20240102", "20240103"], "%Y%d%m", MONTHS),
    ],
)
def test_texts_are_read_as_in_the_training(texts: list[str], time_format: str | None, expected: list[str]) -> None:
    assert read(texts, time_format).tolist() == [pd.Timestamp(one) for one in expected]


def test_numbers_in_a_column_of_objects_are_numbers_and_refused_beside_dates() -> None:
    years = read_times(pd, pd.Series([2023, 2024], dtype=object, name="year"), None)
    assert years.tolist() == [2023, 2024] and years.dtype == np.int64
    dates = pd.Series([pd.Timestamp("2023-01-01"), None, np.nan], dtype=object, name="year")
    assert read_times(pd, dates, None).isna().tolist() == [False, True, True]
    with pytest.raises(DataError, match="'year'"):
        read_times(pd, pd.Series([pd.Timestamp("2023-01-01"), 2024], dtype=object, name="year"), None)


def test_zones_are_kept_and_summer_time_is_read() -> None:
    assert str(read(["2024-01-01T00:00+01:00", "2024-01-02T00:00+01:00"])[0].tz) == "UTC+01:00"
    mixed = read(["2024-03-30T00:00+01:00", "2024-04-01T00:00+02:00"])
    assert mixed.tolist() == [pd.Timestamp("2024-03-29T23:00Z"), pd.Timestamp("2024-03-31T22:00Z")]
    assert read(["2024-04-01T00:00+02:00"])[0] == mixed[1], "also if the others have another zone"
    assert read(["1", "2"]).tolist() == [1, 2]
    assert isinstance(read(["10:00", "11:00"])[0], pd.Timestamp)


@pytest.mark.parametrize("texts", [["01/02/2024", "02/02/2024"], ["soon", "later"]])
def test_what_can_be_read_in_two_ways_or_none_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="df holds times that cannot be read .*: write them as 2024-05-31"):
        read(texts)


def test_missing_steps_are_not_taken_for_neighbours() -> None:
    months = [one for one in pd.date_range("2023-01-01", periods=24, freq="MS") if one.month != 7]
    assert times_ahead(pd, months, 1, "MS", set(), "item")[0] == list(
        pd.date_range("2023-01-01", periods=24, freq="MS")
    )
    with pytest.raises(DataError, match="the times of item do not fit freq='D': resample them"):
        times_ahead(pd, [pd.Timestamp("2024-01-01"), pd.Timestamp("2024-01-03T12:00")], 1, "D", set(), "item")
    middles = list(pd.date_range("2023-01-15", periods=12, freq="30D"))
    assert times_ahead(pd, middles, 1, "MS", set(), "item")[1] == [pd.Timestamp("2024-01-01")]


def test_numbers_go_on_by_their_step() -> None:
    times = (np.arange(20) / 10).tolist()
    _, ahead = times_ahead(pd, times, 3, None, set(), "item")
    assert same_times([2.0, 2.1, 2.2], ahead) and not same_times([2.0, 2.1, 2.3], ahead)
    assert not same_times([1_700_003_600], [1_700_000_000]) and not same_times([pd.Timestamp("2024-01-01")], [1.0])
    assert times_ahead(pd, [7], 2, None, {frequency(pd, [0, 2, 4])}, "item") == ([7], [9, 11])
    with pytest.raises(DataError, match="no regular frequency"):
        times_ahead(pd, [0.0, 1.0, 3.0], 1, None, set(), "item")
