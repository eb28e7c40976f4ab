from __future__ import annotations

import numpy as np
import pytest

from openm6.base.config import build
from openm6.base.errors import ConfigError, DataError
from openm6.data.source import Source
from openm6.data.sources import open_sources
from openm6.data.windows import WindowsConfig


def open_windows(split: str = "train", **settings: object) -> Source:
    return open_sources({"w": WindowsConfig(**settings)}, split)["w"]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "t.csv"
    days = [
        f"2024-{1 + day // 28:02d}-{1 + day % 28:02d},{day},{'' if day == 3 else day * 10}"
        for day in range(60)
    ]
    path.write_text("day,a,b\n" + "\n".join(reversed(days)) + "\n")  # not in order of time
    return str(path)


SHAPE = {"columns": ["a", "b"], "time": "day", "context": 4, "horizon": 2}


def test_a_window_in_order_of_time(table):
    windows = open_windows(path=table, **SHAPE)
    record = windows[0]
    assert record["series"] == {"a": [0, 1, 2, 3, 4, 5], "b": [0, 10, 20, None, 40, 50]}
    assert record["extra"] == {"context": 4, "horizon": 2, "start": "2024-01-01", "block": "/0"}
    blocks = [window["extra"]["block"] for window in windows]
    assert blocks == [f"/{n // 2}" for n in range(len(windows))], "targets of two neighbours overlap"
    assert windows[1]["series"]["a"][0] == 1
    assert open_windows(path=table, stride=3, **SHAPE)[1]["series"]["a"][0] == 3


def test_training_ends_before_what_is_forecast_in_testing_begins(table):
    train, test = (open_windows(split, path=table, test_share=0.25, **SHAPE) for split in ("train", "test"))
    last = max(value for index in range(len(train)) for value in train[index]["series"]["a"])
    forecast = [value for index in range(len(test)) for value in test[index]["series"]["a"][4:]]
    assert (last, min(forecast), max(forecast)) == (44, 45, 59)
    assert test[0]["series"]["a"] == [41, 42, 43, 44, 45, 46], "the context may hold training rows"
    assert (len(train), len(test)) == (45 - 6 + 1, 15 - 2 + 1)


def test_a_test_part_shorter_than_its_context_is_forecast(table):
    settings = {**SHAPE, "context": 30, "test_share": 0.1}
    test = open_windows("test", path=table, **settings)
    assert len(test) == 6 - 2 + 1 and test[0]["series"]["a"][-2:] == [54, 55]


@pytest.mark.parametrize("form", ["{n}", "{month}/{day}/2024", "2024-{month:02d}-{day:02d}T00:00"])
def test_times_are_sorted_as_times_not_as_text(tmp_path, form):
    """As text, 10 comes before 2 and 10/1 before 2/1."""
    rows = [form.format(n=n, month=1 + n // 28, day=1 + n % 28) + f",{n}" for n in range(300)]
    path = tmp_path / "t.csv"
    path.write_text("t,v\n" + "\n".join(np.random.default_rng(0).permutation(rows)) + "\n")
    settings = {"path": str(path), "columns": ["v"], "time": "t", "context": 4, "horizon": 2}
    train, test = (open_windows(split, **settings) for split in ("train", "test"))
    assert [train[n]["series"]["v"] for n in (0, 9)] == [[0, 1, 2, 3, 4, 5], [9, 10, 11, 12, 13, 14]]
    assert max(train[len(train) - 1]["series"]["v"]) < min(test[0]["series"]["v"][4:])


def test_dates_that_can_be_read_in_two_ways_need_a_format(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("t,v\n" + "".join(f"{1 + n % 12:02d}/{1 + n // 12:02d}/2024,{n}\n" for n in range(120)))
    settings = {"path": str(path), "columns": ["v"], "time": "t", "context": 4, "horizon": 2}
    with pytest.raises(
        DataError, match='t.csv: the time column .* two ways.* time_format: "%m/%d/%Y" to the source'
    ):
        open_windows(**settings)
    assert open_windows(**settings, time_format="%d/%m/%Y")[0]["series"]["v"] == [0, 1, 2, 3, 4, 5]
    assert open_windows(**settings, time_format="%m/%d/%Y")[0]["series"]["v"] == [0, 12, 24, 36, 48, 60]


def test_several_series_in_one_table_are_not_mixed(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("day,shop,v\n" + "".join(f"{n // 2},{'ab'[n % 2]},{n}\n" for n in range(120)))
    settings = {"path": str(path), "columns": ["v"], "time": "day", "context": 4, "horizon": 2}
    with pytest.raises(
        DataError, match="occur more than once: name the column that tells the series apart as `group`"
    ):
        open_windows(**settings)
    assert open_windows(**settings, group="shop")[0]["series"]["v"] == [0, 2, 4, 6, 8, 10]


def test_a_format_without_a_time_column_is_refused():
    with pytest.raises(ConfigError, match="name that column, too"):
        build(WindowsConfig, {"path": "x", "columns": ["a"], "time_format": "%Y"}, "r.yaml")


def test_groups_are_not_mixed(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("who,v\n" + "".join(f"{'xy'[n % 2]},{n}\n" for n in range(40)))
    windows = open_windows(path=str(path), columns=["v"], group="who", context=2, horizon=1, test_share=0.0)
    assert len(windows) == 2 * 18
    for index in range(len(windows)):
        record = windows[index]
        assert {value % 2 for value in record["series"]["v"]} == {"xy".index(record["extra"]["group"])}


def test_broken_and_missing_cells(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("v\n" + "\n".join(["1", "2", "oops", "4", "5", "6", "NA", "NA", "9"]) + "\n")
    windows = open_windows(path=str(path), columns=["v"], context=1, horizon=2, test_share=0.0)
    assert len(windows) == 6  # the one whose horizon is all missing is left out
    with pytest.raises(DataError, match="row 2, column 'v'"):
        windows[0]
    assert windows[3]["series"]["v"] == [4, 5, 6]


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"columns": ["c"]}, "no column 'c'"),
        ({"context": 100}, "lower context"),
        ({"time": "b"}, "empty cells"),
    ],
)
def test_windows_that_cannot_be(table, settings, reason):
    with pytest.raises(DataError, match=reason):
        open_windows(path=table, **{**SHAPE, **settings})


def test_a_short_test_part_is_empty(table):
    assert len(open_windows("test", path=table, test_share=0.01, **SHAPE)) == 0


def test_columns_must_be_named_once():
    with pytest.raises(ConfigError, match="each once"):
        build(WindowsConfig, {"path": "x", "columns": ["a", "a"]}, "r.yaml")


def test_the_embedded_weather():
    settings = {"path": "embedded:seattle_weather_daily", "columns": ["temp_max", "wind"], "time": "date"}
    assert len(open_windows(**settings)) == 1130 and len(open_windows("test", **settings)) == 285
