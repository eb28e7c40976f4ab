"""Windows of a time series, and the time columns they are sorted by."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from openm6.core.config import build
from openm6.core.errors import ConfigError, DataError
from openm6.data.source import Source
from openm6.data.sources import open_sources
from openm6.data.windows import WindowsConfig, parse_times
from openm6.modalities.dates import FORMATS
from openm6.tasks.registry import TASKS
from openm6.tasks.slots import Context


def open_windows(split: str = "train", **settings: object) -> Source:
    return open_sources({"w": WindowsConfig(**settings)}, split)["w"]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "t.csv"
    days = [f"2024-{1 + day // 28:02d}-{1 + day % 28:02d},{day},{'' if day == 3 else day * 10}" for day in range(60)]
    path.write_text("day,a,b\n" + "\n".join(reversed(days)) + "\n")  # not in order of time
    return str(path)


SHAPE = {"columns": ["a", "b"], "time": "day", "context": 4, "horizon": 2}
SIX_DAYS = tuple(1704067200.0 + 86400 * n for n in range(6))


def test_covariates_stand_beside_the_past_and_known_ones_go_on(table):
    windows = open_windows(path=table, **{**SHAPE, "columns": ["a"]}, known_covariates=["b"])
    built = TASKS["time_series_forecasting"].build(windows[0], Context("en", np.random.default_rng(0)))
    (past,) = (part.raw for part in built.inputs.values())
    assert (past.name, past.values) == ("a", [0, 1, 2, 3]) and past.clock == (SIX_DAYS, 86400.0)
    assert [(other.name, other.values) for other in past.beside] == [("b", [0, 10, 20, None, 40, 50])]
    assert (built.target.raw.values, built.target.raw.past) == ([4, 5], [0, 1, 2, 3])
    windows = open_windows(path=table, **{**SHAPE, "columns": ["a"]}, past_covariates=["b"])
    built = TASKS["time_series_forecasting"].build(windows[0], Context("en", np.random.default_rng(0)))
    assert built.inputs["series"].raw.beside[0].values == [0, 10, 20, None]
    with pytest.raises(ValueError, match="each once"):
        open_windows(path=table, **SHAPE, known_covariates=["b"])


def test_validation_windows_lie_between(table):
    shape = {**SHAPE, "path": table, "test_fraction": 0.1, "validation_fraction": 0.1}
    train, validation, test = (open_windows(split, **shape) for split in ("train", "validation", "test"))
    assert train[len(train) - 1]["series"]["a"][-1] == 48
    assert [validation[n]["series"]["a"][4:] for n in (0, len(validation) - 1)] == [[49, 50], [52, 53]]
    assert test[0]["series"]["a"] == [50, 51, 52, 53, 54, 55] and "position" not in test[0]["extra"]
    assert len(open_windows("validation", **SHAPE, path=table)) == 0
    assert [train[n]["extra"]["position"] for n in (0, 9)] == [(0, 44), (9, 44)]


def test_training_windows_sometimes_have_no_clock(table):
    window, task = open_windows(path=table, **SHAPE)[0], TASKS["time_series_forecasting"]
    rng = np.random.default_rng(0)
    built = [task.build(window, Context("en", rng, train=True)) for _ in range(60)]
    known = [one.target.raw.clock is not None for one in built]
    assert {one.inputs["series"].raw.clock is not None for one in built} == {True, False}
    assert 0.6 < np.mean(known) < 0.95 and built[0].target.raw.position == (0, 43)
    for _ in range(20):
        raw = task.build(window, Context("en", rng)).target.raw
        assert raw.clock is not None and raw.position is None


def test_a_column_without_later_values_is_not_asked_for(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n" + "".join(f"{n},{n if n < 8 else ''}\n" for n in range(12)))
    windows = open_windows(path=str(tmp_path / "t.csv"), columns=["a", "b"], context=8, horizon=4, test_fraction=0)
    task, rng = TASKS["time_series_forecasting"], np.random.default_rng(0)
    assert {task.build(windows[0], Context("en", rng)).target.raw.name for _ in range(9)} == {"a"}


def test_dates_with_a_format_have_a_clock_and_an_empty_table_a_sentence(tmp_path):
    (tmp_path / "t.csv").write_text("day,a\n" + "".join(f"{n + 1:02d}/01/99,{n}\n" for n in range(12)))
    settings = {"columns": ["a"], "time": "day", "context": 4, "horizon": 2, "path": str(tmp_path / "t.csv")}
    record = open_windows(**settings, time_format="%d/%m/%y")[0]
    first = datetime(1999, 1, 1, tzinfo=UTC).timestamp()
    assert record["extra"]["clock"] == (tuple(first + 86400 * n for n in range(6)), 86400.0)
    (tmp_path / "t.csv").write_text("day,a\n")
    with pytest.raises(DataError):
        open_windows(**settings)


def test_a_window_in_order_of_time(table):
    windows = open_windows(path=table, **SHAPE)
    record = windows[0]
    assert record["series"] == {"a": [0, 1, 2, 3, 4, 5], "b": [0, 10, 20, None, 40, 50]}
    assert record["extra"] == {"context": 4, "horizon": 2, "start": "2024-01-01", "block": "/0"} | {
        "clock": (SIX_DAYS, 86400.0),
        "position": (0, 43),
    }
    blocks = [window["extra"]["block"] for window in windows]
    assert blocks == [f"/{n // 2}" for n in range(len(windows))], "targets of two neighbours overlap"
    assert windows[1]["series"]["a"][0] == 1
    assert open_windows(path=table, stride=3, **SHAPE)[1]["series"]["a"][0] == 3


def test_training_ends_before_what_is_forecast_in_testing_begins(table):
    train, test = (open_windows(split, path=table, test_fraction=0.25, **SHAPE) for split in ("train", "test"))
    last = max(value for index in range(len(train)) for value in train[index]["series"]["a"])
    forecast = [value for index in range(len(test)) for value in test[index]["series"]["a"][4:]]
    assert (last, min(forecast), max(forecast)) == (44, 45, 59)
    assert test[0]["series"]["a"] == [41, 42, 43, 44, 45, 46], "the context may hold training rows"
    assert (len(train), len(test)) == (45 - 6 + 1, 15 - 2 + 1)


def test_a_test_part_shorter_than_its_context_is_forecast(table):
    settings = {**SHAPE, "context": 30, "test_fraction": 0.1}
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
    with pytest.raises(DataError, match='t.csv: the time column .* two ways.* time_format: "%m/%d/%Y" to the source'):
        open_windows(**settings)
    assert open_windows(**settings, time_format="%d/%m/%Y")[0]["series"]["v"] == [0, 1, 2, 3, 4, 5]
    assert open_windows(**settings, time_format="%m/%d/%Y")[0]["series"]["v"] == [0, 12, 24, 36, 48, 60]


def test_several_series_in_one_table_are_not_mixed(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("day,shop,v\n" + "".join(f"{n // 2},{'ab'[n % 2]},{n}\n" for n in range(120)))
    settings = {"path": str(path), "columns": ["v"], "time": "day", "context": 4, "horizon": 2}
    with pytest.raises(DataError, match="occur more than once: name the column that separates the series as `group`"):
        open_windows(**settings)
    assert open_windows(**settings, group="shop")[0]["series"]["v"] == [0, 2, 4, 6, 8, 10]
    # Of two shops, one opened later.
    rows = [f"{n},a,{n}\n" + (f"{n},b,{9 * n}\n" if n >= 80 else "") for n in range(120)]
    path.write_text("day,shop,v\n" + "".join(rows))
    with pytest.raises(DataError, match="many times in column 'day' occur more than once"):
        open_windows(**settings)


def test_a_format_without_a_time_column_is_refused():
    with pytest.raises(ConfigError, match="name that column, too"):
        build(WindowsConfig, {"path": "x", "columns": ["a"], "time_format": "%Y"}, "r.yaml")


def test_short_series_are_named(tmp_path, caplog):
    path = tmp_path / "load.csv"
    rows = [f"{shop},{n}" for shop, count in (("a", 30), ("b", 5), ("c", 4)) for n in range(count)]
    path.write_text("\n".join(["shop,load", *rows]))
    config = WindowsConfig(path=str(path), columns=["load"], group="shop", context=4, horizon=2)
    caplog.set_level("WARNING", "openm6")
    source = open_sources({"w": config}, "train")["w"]
    assert {source[n]["extra"]["group"] for n in range(len(source))} == {"a"}
    assert caplog.messages == [
        "source w leaves out 2 series with fewer than 6 rows to train on: lower context or horizon if they matter"
    ]


def test_groups_are_not_mixed(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("who,v\n" + "".join(f"{'xy'[n % 2]},{n}\n" for n in range(40)))
    windows = open_windows(path=str(path), columns=["v"], group="who", context=2, horizon=1, test_fraction=0.0)
    assert len(windows) == 2 * 18
    for index in range(len(windows)):
        record = windows[index]
        assert {value % 2 for value in record["series"]["v"]} == {"xy".index(record["extra"]["group"])}


def test_groups_of_lists_and_of_nothing(tmp_path):
    path = tmp_path / "t.jsonl"
    names = [["a", 1], ["b"], float("nan"), None]
    path.write_text("".join(json.dumps({"who": names[n % 4], "v": n}) + "\n" for n in range(40)))
    windows = open_windows(path=str(path), columns=["v"], group="who", context=2, horizon=1, test_fraction=0.0)
    assert len(windows) == 8 + 8 + 18, "without a name, all are of one series"


@pytest.mark.parametrize("broken", ["oops", "-1.7976931348623157e308", "1e45"])
def test_broken_and_missing_cells(tmp_path, broken):
    path = tmp_path / "t.csv"
    path.write_text("v\n" + "\n".join(["1", "2", broken, "4", "5", "6", "NA", "NA", "9"]) + "\n")
    windows = open_windows(path=str(path), columns=["v"], context=1, horizon=2, test_fraction=0.0)
    assert len(windows) == 6  # the one whose horizon is all missing is left out
    with pytest.raises(DataError, match="row 2, column 'v'"):
        windows[0]
    assert windows[3]["series"]["v"] == [4, 5, 6]


@pytest.mark.parametrize("group", [None, "who"])
def test_a_broken_line_or_one_without_its_group_breaks_no_other(tmp_path, group):
    path = tmp_path / "t.jsonl"
    lines = [json.dumps({"v": n, "who": "x"}) for n in range(20)]
    lines[4:8] = ['{"v": ', '{"v": 5}', '{"v": 6}', '{"v": 7}']
    path.write_text("\n".join(lines) + "\n")
    windows = open_windows(path=str(path), columns=["v"], group=group, context=1, horizon=1, test_fraction=0.0)
    found = [windows[index] for index in range(len(windows))]
    # Where the broken line is all that is to be forecast, there is no window.
    assert len(found) == (18 if group is None else 3 + 15)
    assert [None, 5.0] in [record["series"]["v"] for record in found]
    assert {record["extra"].get("group") for record in found} == ({None} if group is None else {"x", "None"})


@pytest.mark.parametrize(
    "settings, reason",
    [({"columns": ["c"]}, "no column 'c'"), ({"context": 100}, "lower context"), ({"time": "b"}, "empty cells")],
)
def test_windows_that_cannot_be(table, settings, reason):
    with pytest.raises(DataError, match=reason):
        open_windows(path=table, **{**SHAPE, **settings})


def test_a_short_test_part_is_empty(table):
    assert len(open_windows("test", path=table, test_fraction=0.01, **SHAPE)) == 0


def test_columns_must_be_named_once():
    with pytest.raises(ConfigError, match="each once"):
        build(WindowsConfig, {"path": "x", "columns": ["a", "a"]}, "r.yaml")


def test_the_embedded_weather():
    settings = {"path": "embedded:seattle_weather_daily", "columns": ["temp_max", "wind"], "time": "date"}
    assert len(open_windows(**settings)) == 1130 and len(open_windows("test", **settings)) == 285


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
        ["1950-Dec", "1950-Feb", "1949-Nov"],
        ["1950 Dec", "1950 Feb", "1949 Nov"],
        ["1950M12", "1950M02", "1949M11"],
        ["1950Q4", "1950-Q1", "1949Q3"],
        ["Q4 1950", "Q1/1950", "q3 1949"],
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
        (["2024-01-01", "2024-01-02", "soon"], None, "holds 'soon' in row 2, which is not a number or date like"),
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
