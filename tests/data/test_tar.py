from __future__ import annotations

import io
import json
import tarfile

import fsspec
import pytest

from openm6.base.errors import DataError
from openm6.data.media import TarConfig, shards
from openm6.data.records import Fields
from openm6.data.source import Source
from openm6.data.sources import open_sources
from tests.data.pictures import png, wav


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
        f"shop/{number}.cls": b"7",
        f"shop/{number}.json": json.dumps(about).encode(),
    }


def open_tar(path: object, **settings: object) -> Source:
    return open_sources({"x": TarConfig(path=str(path), test_share=0.0, **settings)}, "train")["x"]


def test_samples_of_several_shards(tmp_path):
    for number in range(3):
        (tmp_path / f"s-{number:03d}.tar").write_bytes(tar_of(sample(number)))
    source = open_tar(tmp_path / "s-{000..002}.tar")
    assert len(source) == 3
    assert source[2] == {"id": "shop/2", "image": png(), "text_en": "thing 2", "label": "7"}
    mapped = open_tar(tmp_path, fields=Fields(text_zh="txt", numbers=["price"], extra=["seller"]))
    assert mapped[1] == {
        "id": "shop/1",
        "text_zh": "thing 1",
        "numbers": {"price": 1.0},
        "extra": {"seller": "Jo"},
    }


def test_names_with_dots_and_parts_that_are_missing(tmp_path):
    (tmp_path / "x.tar").write_bytes(
        tar_of({"a/b.left.wav": wav(), "a/b.txt": b"beep", "a/c.txt": b"", "readme": b"x"})
    )
    source = open_tar(tmp_path / "x.tar", fields=Fields(audio="left.wav", text_en="txt"))
    assert source[0] == {"id": "a/b", "audio": wav(), "text_en": "beep"}
    assert source[1] == {"id": "a/c"}


def test_broken_samples_are_broken_alone(tmp_path):
    files = {"1.txt": b"good", "1.json": b"{}", "2.txt": b"\xff", "3.json": b"{broken", "3.txt": b"x"}
    (tmp_path / "x.tar").write_bytes(tar_of(files))
    source = open_tar(tmp_path / "x.tar")
    assert source[0]["text_en"] == "good"
    for index, reason in ((1, "sample '2' .*UTF-8"), (2, r"3\.json is not JSON")):
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
