"""Folders of images and audio, and WebDataset tars."""

from __future__ import annotations

import codecs
import io
import json
import tarfile

import fsspec
import pytest

from openm6.core.errors import DataError
from openm6.data.media import FolderConfig, TarConfig, shards
from openm6.data.records import Fields
from openm6.data.source import Source
from openm6.data.sources import open_sources
from tests.data.sample_images import png, wav


def open_folder(path: object, split: str = "train", **settings: object):
    return open_sources({"pets": FolderConfig(path=str(path), **settings)}, split)["pets"]


@pytest.fixture
def pets(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for number in range(30):
            (tmp_path / kind / f"{number}.png").write_bytes(png())
    (tmp_path / "cat" / "3.txt").write_text("a red cat\n", encoding="utf-8-sig")  # as some editors write it
    (tmp_path / "cat" / ".hidden.png").write_bytes(png())
    return tmp_path


def test_label_and_caption(pets):
    source = open_folder(pets, test_fraction=0.0)
    assert len(source) == 60
    records = {record["id"]: record for record in (source[index] for index in range(60))}
    assert records["cat/3.png"] == {"id": "cat/3.png", "image": png(), "label": "cat", "text_en": "a red cat"}
    assert records["dog/3.png"] == {"id": "dog/3.png", "image": png(), "label": "dog"}
    bare = open_folder(pets, test_fraction=0.0, labels=False, captions=False)
    assert set(bare[0]) == {"id", "image"}


def test_split_by_hash_and_by_folder(pets, tmp_path):
    train, test = open_folder(pets, test_fraction=0.2), open_folder(pets, "test", test_fraction=0.2)
    assert len(train) + len(test) == 60 and len(test) > 0
    for part in ("train", "val"):
        (tmp_path / "own" / part / "cat").mkdir(parents=True)
        (tmp_path / "own" / part / "cat" / f"{part}.wav").write_bytes(wav())
    held = open_folder(tmp_path / "own", "test")
    assert [held[index]["id"] for index in range(len(held))] == ["val/cat/val.wav"]
    assert held[0]["label"] == "cat" and held[0]["audio"] == wav()


def test_a_validation_folder_is_a_split_of_its_own(tmp_path):
    for part in ("train", "validation", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "1.png").write_bytes(png())
    for part in ("train", "validation", "test"):
        assert open_folder(tmp_path, part).values("id") == [f"{part}/cat/1.png"]
    (tmp_path / "test" / "cat" / "1.png").unlink()
    assert open_folder(tmp_path, "test").values("id") == ["validation/cat/1.png"]
    assert not len(open_folder(tmp_path, "validation"))
    assert open_folder(tmp_path, "validation", validation_fraction=0.5).values("id") in ([], ["train/cat/1.png"])


def test_a_class_called_as_a_split_is_a_class(tmp_path):
    for kind in ("bus", "car", "train"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "1.png").write_bytes(png())
    labels = ["bus", "car", "train"]
    assert open_folder(tmp_path, test_fraction=0.0).values("label") == labels
    assert FolderConfig(path=str(tmp_path)).open_held_out("pets").values("label") == labels


def test_broken_files_are_broken_alone(pets, tmp_path):
    (pets / "cat" / "empty.png").write_bytes(b"")
    outside = tmp_path.parent / "outside.png"
    outside.write_bytes(png())
    (pets / "cat" / "link.png").symlink_to(outside)
    source = open_folder(pets, test_fraction=0.0)
    reasons = {}
    for index in range(len(source)):
        try:
            source[index]
        except DataError as error:
            reasons[str(error).split(" of ")[0]] = str(error)
    assert set(reasons) == {"pets, file cat/empty.png", "pets, file cat/link.png"}
    assert "empty file" in reasons["pets, file cat/empty.png"]
    assert "leads out" in reasons["pets, file cat/link.png"]


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        open_folder(tmp_path / "none")
    with pytest.raises(DataError, match="no images or audio clips"):
        open_folder(tmp_path)


def tar_of(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def sample(number: int) -> dict[str, bytes]:
    about = {"price": number, "seller": "Jo"}
    return {
        f"shop/{number}.png": png(),
        f"shop/{number}.txt": f"thing {number}".encode(),
        f"shop/{number}.cls": codecs.BOM_UTF8 + b"7",
        f"shop/{number}.json": json.dumps(about).encode(),
    }


def open_tar(path: object, **settings: object) -> Source:
    return open_sources({"x": TarConfig(path=str(path), test_fraction=0.0, **settings)}, "train")["x"]


def test_samples_of_several_shards(tmp_path):
    for number in range(3):
        (tmp_path / f"s-{number:03d}.tar").write_bytes(tar_of(sample(number)))
    source = open_tar(tmp_path / "s-{000..002}.tar")
    assert len(source) == 3
    assert source[2] == {"id": "shop/2", "image": png(), "text_en": "thing 2", "label": "7"}
    mapped = open_tar(tmp_path, fields=Fields(text_zh="txt", numbers=["price"], extra=["seller"]))
    assert mapped[1] == {"id": "shop/1", "text_zh": "thing 1", "numbers": {"price": 1.0}, "extra": {"seller": "Jo"}}


def test_keys_of_later_samples_are_columns(tmp_path, monkeypatch):
    monkeypatch.setattr("openm6.data.media.HEADER_LINES", 2)
    files = {f"{n}.json": json.dumps({"name": "a"} | ({"price": 3} if n > 1 else {})).encode() for n in range(4)}
    (tmp_path / "x.tar").write_bytes(tar_of(files))
    assert open_tar(tmp_path / "x.tar", fields=Fields(numbers=["price"]))[3]["numbers"] == {"price": 3.0}


def test_names_with_dots_and_parts_that_are_missing(tmp_path):
    (tmp_path / "x.tar").write_bytes(
        tar_of({"a/b.left.wav": wav(), "a/b.txt": b"beep", "a/c.txt": b"", "readme": b"x"})
    )
    source = open_tar(tmp_path / "x.tar", fields=Fields(audio="left.wav", text_en="txt"))
    assert source[0] == {"id": "a/b", "audio": wav(), "text_en": "beep"}
    assert source[1] == {"id": "a/c"}


def test_broken_samples_are_broken_alone(tmp_path):
    files = {
        "0.json": b"{broken",
        "0.txt": b"x",
        "1.txt": b"good\n",
        "1.json": b'{"id": "same", "by": "Jo"}',
        "2.txt": b"\xff",
    }
    (tmp_path / "x.tar").write_bytes(tar_of(files))
    source = open_tar(tmp_path / "x.tar", fields=Fields(text_en="txt", extra=["by"]))
    assert source[1] == {"id": "1", "text_en": "good", "extra": {"by": "Jo"}}, "without its line end, by its own key"
    for index, reason in ((0, r"0\.json is not JSON"), (2, "sample '2' .*UTF-8")):
        with pytest.raises(DataError, match=reason):
            source[index]


def test_a_shard_cut_off_and_one_that_is_no_tar(tmp_path):
    whole = tar_of({"1.txt": b"a" * 2000, "2.txt": b"b" * 2000})
    (tmp_path / "cut.tar").write_bytes(whole[:4000])
    (tmp_path / "zip.tar").write_bytes(b"PK" + b"\0" * 2000)
    with pytest.raises(DataError, match="plain tar|incomplete"):
        open_tar(tmp_path / "cut.tar")[1]
    with pytest.raises(DataError, match=r"zip\.tar"):
        open_tar(tmp_path / "zip.tar")


def test_shards_by_range(tmp_path):
    with pytest.raises(DataError, match="smaller number first"):
        shards(str(tmp_path / "x-{5..1}.tar"))
    with pytest.raises(DataError, match=r"x-01\.tar"):
        shards(str(tmp_path / "x-{01..02}.tar"))


def test_an_address():
    fsspec.filesystem("memory").pipe("/tars/x.tar", tar_of(sample(4)))
    assert open_tar("memory://tars/x.tar")[0]["text_en"] == "thing 4"
