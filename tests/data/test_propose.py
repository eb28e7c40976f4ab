"""What columns hold, and which of them no task reads."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from openm6.data.propose import column_of, propose_fields, propose_images, unused_columns
from openm6.data.records import Fields
from openm6.data.sources import open_sources
from openm6.data.text_tables import CsvConfig
from openm6.tasks.registry import TASKS
from tests.data.sample_images import png, wav

TITLES = ["a red cup", "two blue plates", "the last green bowl", "one fork", "a set of six knives"]


@pytest.mark.parametrize(
    "name, cells, kind",
    [
        ("photo", ["a.PNG", "b/c.jpeg", None], "image"),
        ("photo", [png(), None], "image"),
        ("photo", [{"bytes": png(), "path": None}], "image"),
        ("clip", ["a.wav", "b.flac"], "audio"),
        ("clip", [wav()], "audio"),
        ("price", ["1.5", "", "-2e3", "NA", None], "number"),
        ("price", [1, 2, 2.5, float("nan")], "number"),
        ("colour", ["red", "blue", "red", "blue", "red"], "category"),
        ("label", [0, 1, 0, 2] * 5, "category"),
        ("sex", ["1", "2", "1", "NA"] * 10, "category"),
        ("survived", [1, 0] * 8, "category"),
        ("survived", [1, 0] * 7, "number"),
        ("sign", [-1.0, 1.0] * 10, "category"),
        ("stars", [1, 2, 3, 4, 5] * 8, "category"),
        ("rooms", list(range(1, 10)) * 20, "number"),
        ("cylinders", [4, 6, 8, 12] * 20, "number"),
        ("share", [0.0, 0.5, 1.0] * 20, "number"),
        ("year", [2007, 2008, 2009] * 20, "number"),
        ("open", [True, False] * 10, "category"),
        ("open", ["yes", "no", "yes"] * 10, "category"),
        ("title", TITLES, "free text"),
        ("id", [3, 1, 2], "identifier"),
        ("sku", [f"AB-{number}" for number in range(20)], "identifier"),
        ("day", ["2024-01-01", "2024-01-02"], "date"),
        ("day", [datetime(2024, 1, 1)], "date"),
        ("split", ["train", "test", "train"], "split"),
        ("tags", [["a"], ["b", "c"]], "list"),
        ("about", [{"a": 1}], "mapping"),
        ("nothing", [None, "", "n/a"], "empty"),
        ("id", [UUID(int=number) for number in range(3)], "identifier"),
        ("lasted", [timedelta(seconds=3), None], "other"),
        ("hash", [b"\xff\xfe", b"\xff\x00"], "other"),
    ],
)
def test_kinds(name, cells, kind):
    assert column_of(name, cells).kind == kind


def test_what_is_said_of_a_column():
    column = column_of("price", [1, 3, "", "cheap", 2] + [2] * 15)
    assert (column.kind, column.missing) == ("number", 1)
    assert column.summary == "1 to 3, mean 2"
    assert column_of("colour", ["red"] * 3 + ["blue"] * 3).summary == "red (3), blue (3)"
    assert column_of("colour", ["red"] * 3 + ["blue"] * 3).distinct == 2


def test_languages():
    assert column_of("t", ["一只红色的杯子", "两个蓝色的盘子，很大"]).language == "zh"
    assert column_of("t", TITLES).language == "en"
    assert column_of("price", [1, 2]).language is None


def test_whole_numbers_as_categories() -> None:
    columns = [column_of("sex", [1, 2] * 20), column_of("age", list(range(40)))]
    assert [column.coded for column in columns] == [True, False]
    fields = propose_fields(columns)
    assert fields is not None and (fields.categories, fields.numbers, fields.label) == (["sex"], ["age"], None)
    # Classes of texts may be numbered, too, but names come first.
    texts = column_of("review", [f"{title} of shelf {shelf}" for shelf in range(8) for title in TITLES])
    fields = propose_fields([*columns, texts])
    assert fields is not None and fields.label == "sex"
    fields = propose_fields([*columns, texts, column_of("colour", ["red", "blue"] * 20)])
    assert fields is not None and fields.label == "colour"


def test_years_of_eight_digits_are_numbers_and_half_broken_columns_are_text():
    assert column_of("n", ["20240101", "20240102"]).kind == "number"
    assert column_of("n", ["1", "2", "x y z", "long words here", "5"]).kind == "free text"


FIELDS = Fields(text_en="title", tags_en="tags", label="kind", numbers=["price"], extra=["selling_points", "shelf"])
HEADER = "title,tags,kind,price,selling_points,shelf,seller,split"


def unused(folder: Path, *tasks: str, fields: Fields | None = FIELDS, header: str = HEADER) -> list[str]:
    path = folder / "shop.csv"
    rows = [f'cup {n},"red, round","{"ab"[n % 2]}",{n}.5,it holds tea,s{n},Jo,train' for n in range(12)]
    path.write_text("\n".join([header, *rows]) + "\n")
    source = open_sources({"shop": CsvConfig(path=str(path), fields=fields)}, "train")["shop"]
    records = [source[index] for index in range(len(source))]
    return unused_columns(source, records, [TASKS[task] for task in tasks])


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (["text_classification"], ["tags", "price", "selling_points", "shelf", "seller"]),
        (["selling_point_generation"], ["price", "shelf", "seller"]),
        (["text_classification", "text_regression"], ["tags", "selling_points", "shelf", "seller"]),
        ([], ["title", "tags", "kind", "price", "selling_points", "shelf", "seller"]),
    ],
)
def test_what_no_task_reads(tmp_path: Path, tasks: list[str], expected: list[str]) -> None:
    found = unused(tmp_path, *tasks)
    assert [column for column in found if column != "kind" or not tasks] == expected


def test_languages_of_later_records_are_read(tmp_path: Path) -> None:
    rows = ["text_en,text_zh,label,label_zh,split", *(f"cup {n},,a,,train" for n in range(6))]
    rows += [f",杯{n},,甲,train" for n in range(6)]
    (tmp_path / "shop.csv").write_text("\n".join(rows), encoding="utf-8")
    source = open_sources({"shop": CsvConfig(path=str(tmp_path / "shop.csv"))}, "train")["shop"]
    assert unused_columns(source, [source[n] for n in range(12)], [TASKS["text_classification"]]) == []


def test_canonical_columns_are_judged_alike(tmp_path: Path) -> None:
    header = "text_en,tags_en,label,price,notes,shelf,seller,split"
    assert unused(tmp_path, "text_classification", fields=None, header=header) == [
        "tags_en",
        "price",
        "notes",
        "shelf",
        "seller",
    ]


def test_a_task_that_compares_reads_through_others(tmp_path: Path) -> None:
    assert "title" not in unused(tmp_path, "text_tabular_regression", "text_denoising")


@pytest.mark.parametrize(
    "records, flips",
    [
        ([{"label": "cat"}, {"label": "dog"}], True),
        ([{"label": "motorcycle left"}, {"label": "rocket"}], True),
        ([{"label": "turn left"}, {"label": "turn right"}], False),
        ([{"label_zh": "左转"}, {"label_zh": "右转"}], False),
        ([{"categories": {"kind": "Clockwise"}}, {"categories": {"kind": "anticlockwise"}}], False),
        ([{"label": "seven"}], False),
        ([{"label": "letter b"}], False),
        ([{"text_en": "the cup on the left"}], False),
    ],
)
def test_images_are_mirrored_unless_a_label_or_text_forbids_it(records, flips):
    found = propose_images([{"image": png("red"), **record} for record in records])
    assert found.get("flips", False) == flips
