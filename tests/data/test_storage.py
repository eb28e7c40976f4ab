from __future__ import annotations

import fsspec
import pytest

from openm6.base.errors import DataError
from openm6.data.storage import TableFolder, find_files, read_bounded


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "data"
    (inside / "sub").mkdir(parents=True)
    (inside / "sub" / "a.png").write_bytes(b"picture")
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (inside / "link.txt").symlink_to(tmp_path / "secret.txt")
    return inside


def test_a_file_beside_the_table(folder):
    assert TableFolder(str(folder / "table.csv"))("sub/a.png", 100) == b"picture"


@pytest.mark.parametrize("name", ["../secret.txt", "sub/../../secret.txt", "link.txt", "/etc/hostname"])
def test_no_name_leads_out_of_the_folder(folder, name):
    with pytest.raises(DataError, match="leads out"):
        TableFolder(str(folder / "table.csv"))(name, 100)


@pytest.mark.parametrize(
    "name, reason", [("b.png", "no file"), ("sub", "no file"), ("a\x00b", "not a file name")]
)
def test_names_of_nothing(folder, name, reason):
    with pytest.raises(DataError, match=reason):
        TableFolder(str(folder / "table.csv"))(name, 100)


def test_size_is_bounded(folder):
    with pytest.raises(DataError, match="larger than 3 bytes"):
        read_bounded(str(folder / "sub" / "a.png"), 3)


def test_remote_names_are_confined_too():
    system = fsspec.filesystem("memory")
    system.pipe("/shop/pictures/a.png", b"picture")
    system.pipe("/other.png", b"secret")
    opener = TableFolder("memory://shop/table.csv")
    assert opener("pictures/a.png", 100) == b"picture"
    for name in ("../other.png", "/other.png", "memory://other.png"):
        with pytest.raises(DataError, match="leads out"):
            opener(name, 100)


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
