from __future__ import annotations

import pytest

from openm6.base.errors import DataError
from openm6.data.media import FolderConfig
from openm6.data.sources import open_sources
from tests.data.pictures import png, wav


def open_folder(path: object, split: str = "train", **settings: object):
    return open_sources({"pets": FolderConfig(path=str(path), **settings)}, split)["pets"]


@pytest.fixture
def pets(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for number in range(30):
            (tmp_path / kind / f"{number}.png").write_bytes(png())
    (tmp_path / "cat" / "3.txt").write_text("a red cat\n")
    (tmp_path / "cat" / ".hidden.png").write_bytes(png())
    return tmp_path


def test_label_and_caption(pets):
    source = open_folder(pets, test_share=0.0)
    assert len(source) == 60
    records = {record["id"]: record for record in (source[index] for index in range(60))}
    assert records["cat/3.png"] == {"id": "cat/3.png", "image": png(), "label": "cat", "text_en": "a red cat"}
    assert records["dog/3.png"] == {"id": "dog/3.png", "image": png(), "label": "dog"}
    bare = open_folder(pets, test_share=0.0, labels=False, captions=False)
    assert set(bare[0]) == {"id", "image"}


def test_split_by_hash_and_by_folder(pets, tmp_path):
    train, test = open_folder(pets, test_share=0.2), open_folder(pets, "test", test_share=0.2)
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


def test_broken_files_are_broken_alone(pets, tmp_path):
    (pets / "cat" / "empty.png").write_bytes(b"")
    outside = tmp_path.parent / "outside.png"
    outside.write_bytes(png())
    (pets / "cat" / "link.png").symlink_to(outside)
    source = open_folder(pets, test_share=0.0)
    reasons = {}
    for index in range(len(source)):
        try:
            source[index]
        except DataError as error:
            reasons[source._files[index].name] = str(error)
    assert set(reasons) == {"empty.png", "link.png"}
    assert "is empty" in reasons["empty.png"] and "leads out" in reasons["link.png"]


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        open_folder(tmp_path / "none")
    with pytest.raises(DataError, match="no pictures or sounds"):
        open_folder(tmp_path)
