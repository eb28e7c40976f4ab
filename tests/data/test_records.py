"""Cells become values of record keys, columns fill keys, and what does not fit is an error that names the column."""

from __future__ import annotations

import math
from datetime import date
from decimal import Decimal
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm6.core.config import build
from openm6.core.errors import ConfigError, DataError
from openm6.data import records
from openm6.data.propose import column_of
from openm6.data.records import (
    Fields,
    RowReader,
    as_bytes,
    as_categories,
    as_list,
    as_number,
    as_numbers,
    as_series,
    as_text,
)
from openm6.modalities.regression import MAX_NUMBER
from openm6.tasks.registry import TASKS
from openm6.tasks.slots import PINNED, Context, observed


def no_files(name: str, limit: int) -> bytes:
    raise DataError(f"asked for {name}")


@pytest.mark.parametrize("cell", [None, "", float("nan")])
def test_missing_text_is_absent(cell):
    assert as_text(cell, "x") is None


def test_text_of_other_kinds():
    assert as_text("猫".encode(), "x") == "猫"
    assert as_text(3, "x") == "3"
    assert as_text(date(2024, 5, 1), "x") == "2024-05-01"


@pytest.mark.parametrize("cell", [b"\xff\xfe", ["a"], {"a": 1}, "é" * (records.MAX_TEXT_BYTES // 2 + 1)])
def test_text_that_is_none_is_refused(cell):
    with pytest.raises(DataError, match="'title'"):
        as_text(cell, "title")


def test_longest_text_is_counted_in_bytes():
    longest = "é" * (records.MAX_TEXT_BYTES // 2)
    assert as_text(longest, "x") == longest


@pytest.mark.parametrize("cell", [None, "", " ", "NaN", "n/a", "null", "-", float("nan"), b"NA", np.nan])
def test_missing_number(cell):
    assert as_number(cell, "x") is None


@pytest.mark.parametrize(
    "cell, value", [(" 3.5 ", 3.5), (b"-2e3", -2000.0), (True, 1.0), (Decimal("0.25"), 0.25), (7, 7.0)]
)
def test_number(cell, value):
    assert as_number(cell, "x") == value


@pytest.mark.parametrize("cell", ["abc", "1_000", "inf", float("inf"), "1,5", [1], "٣x", 10**400, -1.8e308, 2e30])
def test_not_a_number(cell):
    with pytest.raises(DataError, match="'price'"):
        as_number(cell, "price")


@given(st.floats(-MAX_NUMBER, MAX_NUMBER))
def test_number_survives_its_text(value):
    assert as_number(repr(value), "x") == value


def test_lists():
    assert as_list("red, round；sweet、ripe", "x") == ["red", "round", "sweet", "ripe"]
    assert as_list('["a, b", "c"]', "x") == ["a, b", "c"]
    assert as_list(["a", None, " b "], "x") == ["a", "b"]
    assert as_list("", "x") is None
    with pytest.raises(DataError, match="JSON"):
        as_list("[broken", "x")


def test_numbers_and_series_from_json():
    assert as_numbers('{"a": 1, "b": null}', "n") == {"a": 1.0, "b": None}
    assert as_series({"a": [1, None, "2"]}, "s") == {"a": [1.0, None, 2.0]}
    with pytest.raises(DataError, match=r"'n\.a'"):
        as_numbers({"a": "x"}, "n")
    with pytest.raises(DataError, match="lists"):
        as_series({"a": 3}, "s")


def test_bytes_come_as_bytes_struct_or_name():
    assert as_bytes(b"abc", "image", 3, no_files) == b"abc"
    assert as_bytes({"bytes": b"abc", "path": "x.png"}, "image", 3, no_files) == b"abc"
    assert as_bytes({"bytes": None, "path": None}, "image", 3, no_files) is None
    assert as_bytes("N/A", "image", 3, no_files) is None
    with pytest.raises(DataError, match=r"asked for x\.png"):
        as_bytes({"bytes": None, "path": "x.png"}, "image", 3, no_files)


@pytest.mark.parametrize("cell, reason", [(b"abcd", "4 bytes"), (b"", "empty|absent"), (5, "int")])
def test_bytes_refused(cell, reason):
    with pytest.raises(DataError, match=reason):
        as_bytes(cell, "image", 3, no_files)


COLUMNS = ["photo", "title", "price", "rating", "category", "id", "seller"]


def read_file(name: str, limit: int) -> bytes:
    return f"file {name}".encode()


def reader(fields: Fields | None, columns: list[str] = COLUMNS) -> RowReader:
    return RowReader(columns, fields, read_file, "shop.csv")


def test_a_row_through_named_columns():
    fields = Fields(image="photo", text_en="title", numbers=["price", "rating"], label="category", extra=["seller"])
    row = {"photo": "a.png", "title": "cup", "price": "3.5", "rating": "", "category": "x", "id": 7, "seller": "Jo"}
    assert reader(fields).read(row) == {
        "id": "7",
        "image": b"file a.png",
        "text_en": "cup",
        "label": "x",
        "numbers": {"price": 3.5, "rating": None},
        "extra": {"seller": "Jo"},
    }


def test_a_word_for_nothing_is_no_class():
    fields = Fields(label="category", label_zh="title", categories=["rating", "seller"])
    row = {"category": "NULL", "title": "-", "rating": b"N/A", "seller": "none"}
    assert reader(fields).read(row) == {"categories": {"rating": None, "seller": "none"}}
    assert as_categories({"a": " ", "b": "Na"}, "c") == {"a": None, "b": "Na"}, "a symbol is a class"
    assert as_categories({"a": 1.0, "b": 1, "c": 1.5}, "c") == {"a": "1", "b": "1", "c": "1.5"}, "pandas has floats"
    column = column_of("seller", ["none", "Jo", "NA"] * 5)
    assert (column.kind, column.missing, column.distinct) == ("category", 5, 2)


def test_dates_are_inputs_and_never_the_target():
    fields = Fields(numbers=["price", "rating"], dates={"sold": "%d.%m.%Y", "made": None})
    dated = RowReader(["price", "rating", "sold", "made"], fields, read_file, "shop.csv")
    assert dated.columns["sold"] == ["numbers"]
    record = dated.read({"price": "3.5", "rating": 4, "sold": b"31.01.2024", "made": "2023-12-24T18:00"})
    assert record["numbers"]["sold month"] == 1 and record["numbers"]["made hour"] == 18
    for task in map(TASKS.get, ("record_regression", "tabular_regression")):
        built = [task.build(record, Context("en", np.random.default_rng(seed))) for seed in range(40)]
        assert {name for one in built for name in one.target.raw} == {"price", "rating"}
        assert all(one.inputs["numbers"].raw["sold weekday"] == 3 for one in built)
    empty = dated.read({"price": "3.5", "rating": None, "sold": "NA", "made": None})
    assert empty["numbers"]["sold year"] is None and observed(empty) == {"price": 3.5}
    with pytest.raises(DataError, match="column 'sold' holds 'soon', which does not fit its format"):
        dated.read({"price": "3.5", "sold": "soon"})


def test_dates_alone_are_nothing_to_predict():
    record = RowReader(["day", "price"], Fields(numbers=["price"], dates={"day": None}), read_file, "t.csv").read(
        {"day": "2024-01-31", "price": ""}
    )
    assert not any(TASKS[name].languages(record) for name in ("record_regression", "tabular_regression"))
    with pytest.raises(DataError, match="t.csv has no column 'dya'; known: day"):
        RowReader(["day"], Fields(numbers=["day"], dates={"dya": None}), read_file, "t.csv")
    with pytest.raises(ConfigError, match="dates"):
        build(Fields, {"dates": ["day"]}, "t.yaml")


@pytest.mark.parametrize(("target", "tasks"), [("price", [True, False]), ("cut", [False, True]), (None, [True, True])])
def test_the_target_of_a_source_is_asked_for_by_tasks_of_its_kind(target, tasks):
    record = {"numbers": {"price": 1.0}, "categories": {"cut": "Ideal"}, "extra": {PINNED: target}}
    names = ("record_regression", "record_classification")
    assert [bool(TASKS[name].languages(record)) for name in names] == tasks


def test_one_column_may_fill_two_keys():
    found = reader(Fields(text_en="title", label="title")).read({"title": "cup"})
    assert (found["text_en"], found["label"]) == ("cup", "cup")


def test_missing_column_names_the_nearest():
    with pytest.raises(DataError, match=r"shop\.csv has no column 'titel'; did you mean 'title'\?"):
        reader(Fields(text_en="titel"))


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="text_en"):
        build(Fields, {"text_eng": "title"}, "shop.yaml")


@pytest.mark.parametrize("key", ["choices", "label_id", "source", "license"])
def test_a_key_that_no_task_reads_is_not_accepted(key):
    with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
        build(Fields, {"text_en": "title", key: "category"}, "shop.yaml")


def test_canonical_columns_need_no_fields():
    row = {"text_en": "a", "num_names": ["x", "y"], "num_values": [1.0, None], "extra": '{"k": 1}', "kind": "text"}
    found = reader(None, list(row)).read(row)
    assert found == {"text_en": "a", "numbers": {"x": 1.0, "y": None}, "extra": {"k": 1}}


@pytest.mark.parametrize("names, values", [(["x", "y"], [1.0]), (["x"], None), (5, 3), ("ab", "12")])
def test_numbers_of_unequal_lengths_are_broken(names, values):
    row = {"text_en": "a", "num_names": names, "num_values": values}
    with pytest.raises(DataError, match="one length"):
        reader(None, list(row)).read(row)


def test_nan_beside_a_record_is_nothing():
    row = {"text_en": "a", "rating": math.nan, "other": np.float64("nan")}
    fields = Fields(text_en="text_en", extra=["rating", "other"])
    assert reader(fields, list(row)).read(row)["extra"] == {"rating": None, "other": None}


def test_a_uuid_is_text():
    name = UUID("12345678123456781234567812345678")
    assert reader(None, ["id", "text_en"]).read({"id": name, "text_en": "a"})["id"] == str(name)


def test_no_usable_column():
    with pytest.raises(DataError, match=r"add `fields:`.*'photo'"):
        reader(None)
