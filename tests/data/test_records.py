from __future__ import annotations

from datetime import date
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm6.base.errors import DataError
from openm6.data import records
from openm6.data.records import as_bytes, as_list, as_number, as_numbers, as_series, as_text


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


@pytest.mark.parametrize("cell", ["abc", "1_000", "inf", float("inf"), "1,5", [1], "٣x", 10**400])
def test_not_a_number(cell):
    with pytest.raises(DataError, match="'price'"):
        as_number(cell, "price")


@given(st.floats(allow_nan=False, allow_infinity=False))
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
    with pytest.raises(DataError, match=r"asked for x\.png"):
        as_bytes({"bytes": None, "path": "x.png"}, "image", 3, no_files)


@pytest.mark.parametrize("cell, reason", [(b"abcd", "4 bytes"), (b"", "empty|absent"), (5, "int")])
def test_bytes_refused(cell, reason):
    with pytest.raises(DataError, match=reason):
        as_bytes(cell, "image", 3, no_files)
