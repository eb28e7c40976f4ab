"""What `openm6 evaluate --data` reads in place of the sources that a model was trained on."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openm6.base.errors import DataError
from openm6.data.media import FolderConfig
from openm6.data.parquet import EmbeddedConfig
from openm6.data.records import Fields
from openm6.data.text_tables import CsvConfig
from openm6.data.windows import WindowsConfig
from openm6.evaluate.own_data import open_own_data
from tests.data.pictures import png

SHOP = CsvConfig(path="shop.csv", fields=Fields(text_en="title", label="kind", numbers=["price"]))
ROWS = [{"title": f"cup {n}", "kind": "ab"[n % 2], "price": n} for n in range(12)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows in the format of the ending."""
    names = list(rows[0])
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for number, row in enumerate(rows):
                content = json.dumps(row).encode()
                member = tarfile.TarInfo(f"{number}.json")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    else:
        mark = {".tsv": "\t", ".csv": ";"}[path.suffix]
        lines = [names, *([str(row[name]) for name in names] for row in rows)]
        path.write_text("".join(mark.join(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "tar"])
def test_every_format_is_read_through_the_mapping_of_the_training(tmp_path: Path, ending: str) -> None:
    source = open_own_data(write(tmp_path / f"mine.{ending}", ROWS), {"shop": SHOP})["shop"]
    assert len(source) == 12 and source.name == "shop"
    assert source[3] | {"id": ""} == {"id": "", "text_en": "cup 3", "label": "b", "numbers": {"price": 3.0}}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_test_rows_alone_where_a_column_says_so(tmp_path: Path, ending: str) -> None:
    marked = [{**row, "split": "train" if n % 3 else "test"} for n, row in enumerate(ROWS)]
    source = open_own_data(write(tmp_path / f"mine.{ending}", marked), {"shop": SHOP})["shop"]
    assert source.values("text_en") == ["cup 0", "cup 3", "cup 6", "cup 9"]
    alone = [row for row in marked if row["split"] == "test"]
    assert len(open_own_data(write(tmp_path / f"test.{ending}", alone), {"shop": SHOP})["shop"]) == 4


def test_training_rows_alone_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", [{**row, "split": "train"} for row in ROWS])
    with pytest.raises(DataError, match="column 'split' of .*mine.csv marks no row as test"):
        open_own_data(path, {"shop": SHOP})


def test_settings_of_the_trained_source_are_kept(tmp_path: Path) -> None:
    trained = SHOP.model_copy(
        update={"columns": ["title", "kind", "price"], "limit": 3, "test_path": "gone.csv"}
    )
    path = tmp_path / "mine.csv"
    path.write_text("".join(f"{row['title']},{row['kind']},{row['price']}\n" for row in ROWS))
    assert len(open_own_data(str(path), {"shop": trained})["shop"]) == 12


def test_canonical_names_do_where_the_mapping_does_not_fit(tmp_path: Path) -> None:
    rows = [{"text_en": row["title"], "label": row["kind"]} for row in ROWS]
    path = write(tmp_path / "mine.jsonl", rows)
    for trained in (SHOP, EmbeddedConfig(name="emoji")):
        assert open_own_data(path, {"shop": trained})["shop"][0]["text_en"] == "cup 0"


def test_columns_that_fit_nothing_name_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", [{"titel": "a", "kind": "b", "price": 1}])
    with pytest.raises(
        DataError, match=r"--data .* no source of this model: .* no column 'title'; did you mean 'titel'"
    ):
        open_own_data(path, {"shop": SHOP})


def test_a_folder(tmp_path: Path) -> None:
    for part, kind in (("train", "cat"), ("test", "cat"), ("test", "dog")):
        (tmp_path / part / kind).mkdir(parents=True)
        (tmp_path / part / kind / "1.png").write_bytes(png())
    trained = {"pets": FolderConfig(path="elsewhere", labels=False), "shop": SHOP}
    sources = open_own_data(str(tmp_path), trained)
    assert sources["pets"].values("id") == ["test/cat/1.png", "test/dog/1.png"]
    assert "label" not in sources["pets"][0] and sources["shop"][0]["label"] == "cat"
    assert len(open_own_data(str(tmp_path / "train"), trained)["pets"]) == 1


def test_windows_and_what_has_no_such_columns(tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    path.write_text("day,load\n" + "".join(f"{n},{n}\n" for n in range(20)))
    trained = {
        "load": WindowsConfig(path="x", columns=["load"], time="day", context=4, horizon=2),
        "shop": SHOP,
    }
    sources = open_own_data(str(path), trained)
    assert list(sources) == ["load"] and len(sources["load"]) == 15
