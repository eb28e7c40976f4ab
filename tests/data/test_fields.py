from __future__ import annotations

import pytest

from openm6.base.config import build
from openm6.base.errors import ConfigError, DataError
from openm6.data.records import Fields, RowReader

COLUMNS = ["photo", "title", "price", "rating", "category", "id", "seller"]


def read_file(name: str, limit: int) -> bytes:
    return f"file {name}".encode()


def reader(fields: Fields | None, columns: list[str] = COLUMNS) -> RowReader:
    return RowReader(columns, fields, read_file, "shop.csv")


def test_a_row_through_named_columns():
    fields = Fields(
        image="photo", text_en="title", numbers=["price", "rating"], label="category", extra=["seller"]
    )
    row = {
        "photo": "a.png",
        "title": "cup",
        "price": "3.5",
        "rating": "",
        "category": "x",
        "id": 7,
        "seller": "Jo",
    }
    assert reader(fields).read(row) == {
        "id": "7",
        "image": b"file a.png",
        "text_en": "cup",
        "label": "x",
        "numbers": {"price": 3.5, "rating": None},
        "extra": {"seller": "Jo"},
    }


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
    row = {
        "text_en": "a",
        "num_names": ["x", "y"],
        "num_values": [1.0, None],
        "extra": '{"k": 1}',
        "kind": "text",
    }
    found = reader(None, list(row)).read(row)
    assert found == {"text_en": "a", "numbers": {"x": 1.0, "y": None}, "extra": {"k": 1}}


def test_numbers_of_unequal_lengths_are_broken():
    row = {"text_en": "a", "num_names": ["x", "y"], "num_values": [1.0]}
    with pytest.raises(DataError, match="one length"):
        reader(None, list(row)).read(row)


def test_no_usable_column():
    with pytest.raises(DataError, match=r"add `fields:`.*'photo'"):
        reader(None)
