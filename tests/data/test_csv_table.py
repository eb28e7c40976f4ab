from __future__ import annotations

import fsspec
import pytest

from openm6.base.errors import DataError
from openm6.data.csv_table import CsvConfig
from openm6.data.fields import Fields
from openm6.data.source import Source
from openm6.data.sources import open_sources

FIELDS = Fields(text_en="title", numbers=["price"])


def open_csv(path: object, split: str = "train", **settings: object) -> Source:
    values = {"fields": FIELDS, "test_share": 0.0, **settings}
    return open_sources({"shop": CsvConfig(path=str(path), **values)}, split)["shop"]


def test_quotes_breaks_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_bytes(b'\xef\xbb\xbftitle,price\n"a ""cup"", red",3\n"two\nlines",\n\xe7\x8c\xab,NaN\n')
    source = open_csv(path)
    assert [source[index]["text_en"] for index in range(3)] == ['a "cup", red', "two\nlines", "猫"]
    assert [source[index]["numbers"]["price"] for index in range(3)] == [3.0, None, None]


def test_broken_rows_are_broken_alone(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_bytes(b"title,price\nok,1\n\xff\xfe,2\nmany,3,4\nwords,cheap\nlast,5\n")
    source = open_csv(path)
    assert len(source) == 5
    reasons = []
    for index in range(5):
        try:
            source[index]
        except DataError as error:
            reasons.append(str(error))
    assert len(reasons) == 3
    assert any("'title' is not UTF-8" in reason for reason in reasons)
    assert any("'cheap'" in reason for reason in reasons)
    assert any("3 cells where the header has 2" in reason for reason in reasons)
    assert source.values("text_en")[0] == "ok"


def test_rows_of_uneven_length_that_are_not_utf8(tmp_path, capfd):
    """Neither may take the other rows with it, and Arrow must have nothing to complain of."""
    path = tmp_path / "shop.csv"
    path.write_bytes("\ufefftitle,价\n猫,1\n".encode() + b"caf\xe9,2,3\n\xff,4\n" + "é,5\n".encode())
    source = open_csv(path, fields=Fields(text_en="title", numbers=["价"]))
    assert [source[n]["text_en"] for n in (0, 2)] == ["猫", "é"] and source[2]["numbers"] == {"价": 5.0}
    with pytest.raises(DataError, match="column 'title' is not UTF-8 at byte 0: save the file as UTF-8"):
        source[1]
    with pytest.raises(DataError, match="line 3 has 3 cells where the header has 2"):
        source[3]
    assert capfd.readouterr().err == ""


def test_separator_and_identical_rows_after_a_hash_split(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text("title;price\n" + "".join(f"thing {n};{n}\n" for n in range(300)))
    train = open_csv(path, separator=";", test_share=0.2)
    test = open_csv(path, "test", separator=";", test_share=0.2)
    assert len(train) + len(test) == 300 and 30 < len(test) < 90
    assert not set(train.values("text_en")) & set(test.values("text_en"))


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "cannot be read as CSV"),
        (b"caf\xe9,price\na,b\n", "the first line of .*shop.csv is not UTF-8: if it is a CSV, save it anew"),
        (b"title,title\na,b\n", "two columns called 'title'"),
        (b"name,price\n", "'title'"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, content, reason):
    path = tmp_path / "shop.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        open_csv(path)


def test_header_alone_has_no_training_records(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text("title,price\n")
    with pytest.raises(DataError, match="no training records"):
        open_csv(path)


def test_an_address(tmp_path):
    fsspec.filesystem("memory").pipe("/csv/shop.csv", b"title,price\ncup,2\n")
    assert open_csv("memory://csv/shop.csv")[0]["numbers"] == {"price": 2.0}
