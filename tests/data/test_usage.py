"""Columns that no task reads, by what the tasks really ask of a record."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm6.data.propose import unused_columns
from openm6.data.records import Fields
from openm6.data.sources import open_sources
from openm6.data.text_tables import CsvConfig
from openm6.tasks.registry import TASKS

FIELDS = Fields(
    text_en="title", tags_en="tags", label="kind", numbers=["price"], extra=["selling_points", "shelf"]
)
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
        (["classify_text"], ["tags", "price", "selling_points", "shelf", "seller"]),
        (["write_selling_points"], ["price", "shelf", "seller"]),
        (["classify_text", "number_from_text"], ["tags", "selling_points", "shelf", "seller"]),
        ([], ["title", "tags", "kind", "price", "selling_points", "shelf", "seller"]),
    ],
)
def test_what_no_task_reads(tmp_path: Path, tasks: list[str], expected: list[str]) -> None:
    found = unused(tmp_path, *tasks)
    assert [column for column in found if column != "kind" or not tasks] == expected


def test_canonical_columns_are_judged_alike(tmp_path: Path) -> None:
    header = "text_en,tags_en,label,price,notes,shelf,seller,split"
    assert unused(tmp_path, "classify_text", fields=None, header=header) == [
        "tags_en",
        "price",
        "notes",
        "shelf",
        "seller",
    ]


def test_a_task_that_compares_reads_through_others(tmp_path: Path) -> None:
    assert "title" not in unused(tmp_path, "predict_from_all", "denoise")
