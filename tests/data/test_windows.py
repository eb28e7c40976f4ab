from __future__ import annotations

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
    assert record["extra"] == {"context": 4, "horizon": 2, "start": "2024-01-01"}
    assert windows[1]["series"]["a"][0] == 1
    assert open_windows(path=table, stride=3, **SHAPE)[1]["series"]["a"][0] == 3


def test_training_ends_before_testing_begins(table):
    train, test = (open_windows(split, path=table, test_share=0.25, **SHAPE) for split in ("train", "test"))
    last = max(value for index in range(len(train)) for value in train[index]["series"]["a"])
    first = min(value for index in range(len(test)) for value in test[index]["series"]["a"])
    assert (last, first) == (44, 45)
    assert (len(train), len(test)) == (45 - 6 + 1, 15 - 6 + 1)


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
    assert len(open_windows(**settings)) == 1130 and len(open_windows("test", **settings)) == 253
