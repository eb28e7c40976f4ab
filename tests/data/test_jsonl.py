from __future__ import annotations

import json

import fsspec
import pytest

from openm6.base.errors import DataError
from openm6.data.records import Fields
from openm6.data.source import Source
from openm6.data.sources import open_sources
from openm6.data.text_tables import JsonlConfig
from tests.data.pictures import png


def open_jsonl(path: object, **settings: object) -> Source:
    return open_sources({"x": JsonlConfig(path=str(path), test_share=0.0, **settings)}, "train")["x"]


def test_lines_as_records(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    lines = [
        {"id": "1", "text_en": "cup", "image": "a.png", "numbers": {"price": 2}, "tags_en": ["a", "b"]},
        {"id": "2", "text_zh": "猫", "series": {"t": [1, None]}, "extra": {"k": [1]}},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")  # no break at the end
    source = open_jsonl(path)
    assert source[0] == {**lines[0], "image": png(), "numbers": {"price": 2.0}}
    assert source[1] == {**lines[1], "series": {"t": [1.0, None]}}


def test_broken_lines_are_broken_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(
        b'{"text_en": "a"}\n{"text_en": \n[1]\n{"text_en": "\xff"}\n' + deep + b'\n\n{"text_en": "b"}\n'
    )
    source = open_jsonl(path)
    assert len(source) == 6
    for index, reason in (
        (1, "line 2 .*not JSON"),
        (2, "line 3 .*not a JSON object"),
        (3, "not UTF-8"),
        (4, "line 5"),
    ):
        with pytest.raises(DataError, match=reason):
            source[index]
    assert source.values("text_en") == ["a", None, None, None, None, "b"]


def test_columns_come_from_the_first_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"name": "a"}\n{"name": "b", "price": 3}\n')
    assert open_jsonl(path, fields=Fields(text_en="name", numbers=["price"]))[1]["numbers"] == {"price": 3.0}
    with pytest.raises(DataError, match="did you mean 'price'"):
        open_jsonl(path, fields=Fields(numbers=["prize"]))


@pytest.mark.parametrize(
    "content, reason", [("", "is empty"), ("\n \n", "is empty"), ("hello\n", "none of the first")]
)
def test_not_json_lines(tmp_path, content, reason):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=reason):
        open_jsonl(tmp_path / "x.jsonl")


def test_an_address():
    fsspec.filesystem("memory").pipe("/lines/x.jsonl", b'{"text_en": "a"}\n')
    assert open_jsonl("memory://lines/x.jsonl")[0]["text_en"] == "a"
