"""Files found, read within bounds and inside their folder; files that are no table are named."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import fsspec
import pytest

from openm6.core.errors import DataError
from openm6.data.inspect import inspect_path
from openm6.data.media import load_table
from openm6.data.parquet import ParquetConfig
from openm6.data.records import Fields
from openm6.data.sources import open_sources
from openm6.data.storage import find_files, read_beside
from openm6.data.text_tables import CsvConfig, JsonlConfig
from tests.data.sample_images import png, wav


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "data"
    (inside / "sub").mkdir(parents=True)
    (inside / "sub" / "a.png").write_bytes(b"image")
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (inside / "link.txt").symlink_to(tmp_path / "secret.txt")
    return inside


def test_a_file_beside_the_table(folder):
    assert read_beside(str(folder / "table.csv"), "sub/a.png", 100) == b"image"


@pytest.mark.parametrize("name", ["../secret.txt", "sub/../../secret.txt", "link.txt", "/etc/hostname"])
def test_no_name_leads_out_of_the_folder(folder, name):
    with pytest.raises(DataError, match="leads out"):
        read_beside(str(folder / "table.csv"), name, 100)


@pytest.mark.parametrize("name, reason", [("b.png", "no file"), ("sub", "no file"), ("a\x00b", "not a file name")])
def test_names_of_nothing(folder, name, reason):
    with pytest.raises(DataError, match=reason):
        read_beside(str(folder / "table.csv"), name, 100)


@pytest.mark.parametrize("name", ["A" * 400, "a\ud800"])
def test_a_cell_that_can_be_no_file_name(folder, name):
    with pytest.raises(DataError, match="not a file name"):
        read_beside(str(folder / "table.csv"), name, 100)


def test_size_is_bounded(folder):
    with pytest.raises(DataError, match="larger than 3 bytes"):
        read_beside(str(folder / "table.csv"), "sub/a.png", 3)


def test_remote_names_are_confined_too():
    system = fsspec.filesystem("memory")
    system.pipe("/shop/images/a.png", b"image")
    system.pipe("/other.png", b"secret")
    table = "memory://shop/table.csv"
    assert read_beside(table, "images/a.png", 100) == b"image"
    for name in ("../other.png", "/other.png", "memory://other.png"):
        with pytest.raises(DataError, match="leads out"):
            read_beside(table, name, 100)


def test_files_of_a_folder_a_glob_and_an_address(folder):
    (folder / "2.csv").write_text("a\n1\n")
    (folder / "1.csv").write_text("a\n1\n")
    names = [str(folder / "1.csv"), str(folder / "2.csv")]
    assert find_files(str(folder), (".csv",)) == names
    assert find_files(str(folder / "*.csv"), (".csv",)) == names
    fsspec.filesystem("memory").pipe("/many/1.csv", b"a\n1\n")
    assert find_files("memory://many/*.csv", (".csv",)) == ["memory:///many/1.csv"]
    with pytest.raises(DataError, match="nothing to read"):
        find_files(str(folder / "none"), (".csv",))


def test_unknown_protocol_is_a_sentence():
    with pytest.raises(DataError, match="nowhere://"):
        find_files("nowhere://a/b.csv", (".csv",))


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "x")
    return file.getvalue()


FILES = {
    "sheet.xlsx": (zipped(), "a spreadsheet: export the sheet as CSV"),
    "all.zip": (zipped(), "an archive: unpack it"),
    "cup.png": (png(), "an image: put images into a folder and read it with kind: folder"),
    "cup.dat": (png(), "an image"),
    "word.wav": (wav(), "an audio file: put audio files into a folder"),
    "shop.csv.gz": (gzip.compress(b"a,b\n"), "compressed: unpack it first"),
    "shop.tar.gz": (gzip.compress(b"a,b\n"), "compressed: unpack it first"),
    "list.json": (json.dumps([{"a": 1}]).encode(), "JSON: write one object per line and call the file .jsonl"),
    "notes.txt": (b"some words\n", "a text: call it .csv if it is a table"),
    "model.pkl": (b"\x80\x04\x95", "a pickle, which may run any code and is never opened"),
    "paper.pdf": (b"%PDF-1.7", "a PDF"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_is_and_what_to_do(tmp_path: Path, name: str) -> None:
    content, sentence = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_table(str(path))
    assert f"{name} is no table but {sentence}" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="can be trained on as it is: .*is no table but"):
        inspect_path(str(path)).usable_recipe()


@pytest.mark.parametrize("kind", [CsvConfig, JsonlConfig, ParquetConfig])
def test_a_wrong_ending_deceives_no_reader(tmp_path: Path, kind: type) -> None:
    path = tmp_path / "table"
    path.write_bytes(zipped())
    with pytest.raises(DataError, match="is no table but an archive"):
        kind(path=str(path)).load(str(path))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'[{"a": 1}]', "is no table but JSON: write one object per line"),
        (b"a,b\n1,2\n", "name the file by what it is"),
    ],
)
def test_a_file_without_an_ending(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "table"
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load_table(str(path))


def test_an_ending_is_no_reason_where_the_kind_is_told(tmp_path: Path) -> None:
    path = tmp_path / "shop.txt"
    path.write_text("a;b\n1;2\n")
    assert open_sources({"x": CsvConfig(path=str(path), fields=Fields(text_en="b"))}, "train")["x"].values(
        "text_en"
    ) == ["2"]


def test_an_array_in_a_jsonl_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps([{"a": 1}, {"a": 2}], indent=1))
    with pytest.raises(DataError, match="write one object per line, not one array"):
        load_table(str(path))


def test_a_folder_with_a_sheet_alone(tmp_path: Path) -> None:
    (tmp_path / "sheet.xlsx").write_bytes(zipped())
    with pytest.raises(DataError, match="sheet.xlsx is no table but a spreadsheet: export the sheet as CSV"):
        inspect_path(str(tmp_path))
