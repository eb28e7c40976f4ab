"""CSV, TSV and JSON Lines: dialects, and broken rows that are broken alone."""

from __future__ import annotations

import json
import re

import fsspec
import numpy as np
import pytest

from openm6.core.config import build
from openm6.core.errors import ConfigError, DataError
from openm6.data.media import load_table
from openm6.data.records import Fields
from openm6.data.source import Source
from openm6.data.sources import open_sources
from openm6.data.text_tables import SAMPLE_BYTES, CsvConfig, JsonlConfig, sniff_separator
from openm6.data.windows import WindowsConfig
from openm6.evaluate.run import open_own_data
from openm6.tasks.registry import TASKS
from tests.data.sample_images import png

FIELDS = Fields(text_en="title", numbers=["price"])


def open_csv(path: object, split: str = "train", **settings: object) -> Source:
    values = {"fields": FIELDS, "test_fraction": 0.0, **settings}
    return open_sources({"shop": CsvConfig(path=str(path), **values)}, split)["shop"]


def test_quotes_breaks_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_bytes(b'\xef\xbb\xbftitle,price\n"a ""cup"", red",3\n"two\nlines",\n\xe7\x8c\xab,NaN\n')
    source = open_csv(path)
    assert [source[index]["text_en"] for index in range(3)] == ['a "cup", red', "two\nlines", "猫"]
    assert [source[index]["numbers"]["price"] for index in range(3)] == [3.0, None, None]


def test_whole_numbers_beyond_those_of_float32_are_read_exactly(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text(f"title,price\na,{2**40 + 1}\nb,16777217\n")
    assert [open_csv(path)[row]["numbers"]["price"] for row in range(2)] == [2**40 + 1, 16777217]


def test_broken_rows_are_broken_alone(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_bytes(b"title,price\nok,1\n\xff\xfe,2\nmany,3,4\nwords,cheap\nl\xc3\xa4st,5\n")
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


@pytest.mark.parametrize("header", ["title,price\n", "\n\ntitle,price\n\n", None])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_broken_row_is_named_by_its_line_as_an_editor_counts_them(tmp_path, header, end):
    path, rows = tmp_path / "shop.csv", '"a ""b"",\nc",1\nd,2,3\n\ne,cheap\nf\n'
    path.write_bytes(((header or "") + rows).replace("\n", end).encode())
    above, columns = (header or "").count("\n"), None if header else ["title", "price"]
    source = open_csv(path, fields=Fields(text_en="title", numbers=["price"]), columns=columns)
    for row, sentence in ((1, "line 5 of .*'cheap'"), (2, "line 3 has 3 cells"), (3, "line 6 has 1 cells")):
        with pytest.raises(DataError, match=re.sub(r"\d", lambda found: str(int(found[0]) + above), sentence, count=1)):
            source[row]


def test_rows_are_counted_where_lines_cannot_be(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text(f"title,price\n{'x' * 200_000},1\na,cheap\n")
    with pytest.raises(DataError, match="row 1 of .*'cheap'"):
        open_csv(path, fields=Fields(text_en="title", numbers=["price"]))[1]


def test_separator_and_identical_rows_after_a_hash_split(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text("title;price\n" + "".join(f"thing {n};{n}\n" for n in range(300)))
    train = open_csv(path, separator=";", test_fraction=0.2)
    test = open_csv(path, "test", separator=";", test_fraction=0.2)
    assert len(train) + len(test) == 300 and 30 < len(test) < 90
    assert not set(train.values("text_en")) & set(test.values("text_en"))


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "cannot be read as CSV"),
        (b"caf\xe9,price\na,\xc3\xa4\n", "the first line of .*shop.csv is not UTF-8: if it is a CSV, save it again"),
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


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_found(tmp_path, separator):
    path = tmp_path / "shop.csv"
    rows = [["title", "price"], *([f"thing {n}", str(n)] for n in range(30)), ["too", "many", "cells"]]
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    source = open_csv(path)
    assert source[7]["text_en"] == "thing 7" and source[7]["numbers"] == {"price": 7.0}
    with pytest.raises(DataError, match="shop, line 32 of .*: line 32 has 3 cells where the header has 2"):
        source[30]


@pytest.mark.parametrize(
    ("content", "separator"),
    [
        ("name,first;price\nDoe, John;3\nX;4\n", ";"),
        ('"a;b",c\n"1;2",3\n', ","),
        ("a;b\n1,5;2,5\n", ";"),
        ("a|b,c\n1|2,3\n", ","),
        ("text\nred, round\n", ","),
        ("a\tb\nx, y\tz\n", "\t"),
        ("\ufeffa;b\n\n1;2\n", ";"),
        ('a;b\n"two\nlines; x";2\n', ";"),
        ("", ","),
    ],
)
def test_what_decides_between_separators(tmp_path, content, separator):
    path = tmp_path / "x.csv"
    path.write_text(content)
    assert sniff_separator(str(path)) == separator


def test_a_decimal_comma_is_read(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text("title;price;note\na, b;3,5;1,2,3\nc;-1.234,5;x\nd;NA;y\ne;7;z\nf;cheap;z\n")
    source = open_csv(path, fields=Fields(text_en="title", numbers=["price"], extra=["note"]))
    assert [source[n]["numbers"]["price"] for n in range(4)] == [3.5, -1234.5, None, 7.0]
    assert source[0]["text_en"] == "a, b" and source[0]["extra"] == {"note": "1,2,3"}
    with pytest.raises(DataError, match="'cheap'"):
        source[4]


@pytest.mark.parametrize(
    "prices", [("1,234", "2,500"), ("3,5", "3.5"), ("1,234", "999"), ("1,234 EUR", "2 EUR"), ("1.234", "466")]
)
def test_numbers_of_two_readings_are_refused_until_told(tmp_path, prices):
    path = tmp_path / "shop.csv"
    path.write_text("title;price\n" + "".join(f"x;{price}\n" for price in prices))
    with pytest.raises(DataError, match="shop.csv: numbers of column 'price' can be read in two ways .*add decimal"):
        open_csv(path)


@pytest.mark.parametrize(
    ("prices", "values"),
    [
        (("1,234,567", "3.5"), [1234567, 3.5]),
        (("1,234.5", "1,234"), [1234.5, 1234]),
        (("3,5", "1.234"), [3.5, 1234]),
        (("1.234.567", "5"), [1234567, 5]),
        (("12 %", "3.5%", "NA", "4"), [12, 3.5, None, 4]),
        (("$1,234.50", "-$3", "$ 12"), [1234.5, -3, 12]),
        (("$1,234", "$3"), [1234, 3]),
        (("3.50 EUR", "1200.00 EUR"), [3.5, 1200]),
        (("3,50 €", "1.200,00 €"), [3.5, 1200]),
        (("1\u202f234,5", "12 345 678", "1'000"), [1234.5, 12345678, 1000]),
        (("1e-3", " 2 ", "1,5"), [0.001, 2, 1.5]),
        (("1,23E+05", "-4,5e-1"), [123000, -0.45]),
        ((",5", "1.234"), [0.5, 1234]),
        (("1,234", "1.5E+03"), [1234, 1500]),
    ],
)
def test_numbers_as_people_write_them(tmp_path, prices, values):
    path = tmp_path / "shop.csv"
    path.write_text("title;price\n" + "".join(f"x;{price}\n" for price in prices))
    source = open_csv(path)
    assert [source[n]["numbers"]["price"] for n in range(len(values))] == values
    # Without fields, the column must be one of numbers.
    table = load_table(str(path))
    cells = [table.row(row, ["price"])["price"] for row in range(len(values))]
    assert [None if value is None else float(cell) for cell, value in zip(cells, values, strict=True)] == values


@pytest.mark.parametrize(
    ("prices", "reviews", "values"),
    [
        (["12.50"] * 30, ["1,204", "7"] * 15, [12.5, 1204]),
        (["12,50"] * 30, ["1.204", "7"] * 15, [12.5, 1204]),
        (["12,50"] * 30, ["1.204 km", "7 km"] * 15, [12.5, "1.204 km"]),
        (["12,50 €"] * 30, ["1.204 €", "7 €"] * 15, [12.5, 1204]),
        (["12.50"] * 29 + ["3,5"], ["1.204", "7"] * 15, [12.5, 1.204]),
    ],
)
def test_a_column_that_shows_no_mark_has_that_of_the_others(tmp_path, prices, reviews, values):
    path = tmp_path / "shop.csv"
    path.write_text("title;reviews;price\n" + "".join(f"x;{b};{a}\n" for a, b in zip(prices, reviews, strict=True)))
    cells = load_table(str(path)).row(0, ["price", "reviews"])
    assert [float(cells["price"]), cells["reviews"]] == [values[0], str(values[1])]
    if prices[-1] == "3,5":
        with pytest.raises(DataError, match="row|line 31.*'3,5', which is not a number"):
            open_csv(path)[29]


def test_a_column_of_several_units_is_not_one_of_numbers(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text("title;price\n" + "a;$3\nb;3 EUR\nc;12 %\n" * 5)
    assert load_table(str(path)).row(0, ["price"])["price"] == "$3"
    with pytest.raises(DataError, match="3 EUR"):
        open_csv(path)[1]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-8-sig"])
def test_other_encodings(tmp_path, encoding, caplog):
    path = tmp_path / "shop.csv"
    path.write_bytes("Größe;title\n3,5;café\n4;déjà vu\nx;y;z\n".encode(encoding))
    caplog.set_level("WARNING", "openm6")
    source = open_csv(path, fields=Fields(text_en="title", numbers=["Größe"]))
    open_csv(path, fields=Fields(text_en="title"))
    assert source[1]["text_en"] == "déjà vu" and [source[n]["numbers"]["Größe"] for n in range(2)] == [3.5, 4.0]
    with pytest.raises(DataError, match="3 cells where the header has 2"):
        source[2]
    assert len(caplog.messages) == (encoding in ("cp1252", "latin-1"))
    assert all("is read as Windows-1252" in message for message in caplog.messages)


@pytest.mark.parametrize(("decimal", "values"), [(",", [1.234, 1234.0, 3.5, 12.0]), (".", [1234.0, 1.234, 3.5, 12.0])])
def test_a_decimal_mark_that_is_told(tmp_path, decimal, values):
    path = tmp_path / "shop.csv"
    half = f"3{decimal}5"
    path.write_text(f"title;price\na;1,234\nb;1.234\nc;{half}\nd;12\n")
    source = open_csv(path, decimal=decimal)
    assert [source[n]["numbers"]["price"] for n in range(4)] == values


def test_a_test_table_is_read_with_the_marks_of_the_training_table(tmp_path):
    path, held_out = tmp_path / "cities.csv", tmp_path / "more.csv"
    path.write_text("title;price\na;1.234.567\nb;512.300\n")
    held_out.write_text("title;price\nc;98.450\n")
    assert open_csv(path, "test", test_path=str(held_out))[0]["numbers"]["price"] == 98450
    trained = CsvConfig(path=str(path), fields=FIELDS)
    assert open_own_data(str(held_out), {"shop": trained})["shop"][0]["numbers"]["price"] == 98450
    whole = tmp_path / "whole.csv"
    whole.write_text("title;price\na;3\nb;4\n")
    for written in ("3,5", "3,5 €"):
        held_out.write_text(f"title;price\nc;{written}\n")
        assert open_csv(whole, "test", test_path=str(held_out))[0]["numbers"]["price"] == 3.5
        whole.write_text("title;price\na;3 €\nb;4 €\n")
    held_out.write_text("title;price\nc;98.450\n")
    path.unlink()
    assert open_own_data(str(held_out), {"shop": trained})["shop"][0]["numbers"]["price"] == 98.45


def test_texts_of_a_training_table_are_not_read_as_numbers_for_a_test_table(tmp_path):
    paths = [tmp_path / f"{part}.csv" for part in ("train", "test")]
    for path in paths:
        path.write_text('question,answer\nHow many?,"1,234"\nAnd now?,"2,345"\n')
    test = open_csv(paths[0], "test", test_path=str(paths[1]), fields=None)
    assert test.values("answer") == ["1,234", "2,345"]


def test_labels_and_answers_stay_as_written(tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text('question,answer,label,price\nHow many?,"1,234",5 €,"3,5"\nAnd now?,15,10 €,"4,5"\n')
    source = open_csv(path, fields=None, task_fields=Fields(numbers=["price"]))
    assert source.values("answer") == ["1,234", "15"] and source.values("label") == ["5 €", "10 €"]
    assert source[0]["numbers"] == {"price": 3.5}


def test_a_decimal_comma_in_a_series_and_in_a_table_that_is_inspected(tmp_path):
    path = tmp_path / "load.csv"
    path.write_text("day;load;place\n" + "".join(f"{n};{n},5;in 1,5 rooms\n" for n in range(60)))
    config = WindowsConfig(path=str(path), columns=["load"], time="day", context=2, horizon=1)
    assert open_sources({"w": config}, "train")["w"][3]["series"] == {"load": [3.5, 4.5, 5.5]}
    table = load_table(str(path))
    assert table.row(3, ["load", "place"]) == {"load": "3.5", "place": "in 1,5 rooms"}


@pytest.mark.parametrize("day", ["{}", "01.20{:02}"])
def test_numbers_of_two_readings_in_a_series_are_told(tmp_path, day):
    """The points of months are no decimal marks."""
    path = tmp_path / "load.csv"
    path.write_text("day;load\n" + "".join(f"{day.format(n)};1,20{n % 10}\n" for n in range(30)))
    settings = {"path": str(path), "columns": ["load"], "time": "day", "context": 2, "horizon": 1}
    with pytest.raises(DataError, match='add decimal: ","'):
        open_sources({"w": WindowsConfig(**settings)}, "train")
    source = open_sources({"w": WindowsConfig(**settings, decimal=",")}, "train")["w"]
    assert source[0]["series"] == {"load": [1.2, 1.201, 1.202]}
    (tmp_path / "load.jsonl").write_text('{"load": 1}\n' * 30)
    with pytest.raises(DataError, match="decimal describes a CSV"):
        open_sources({"w": WindowsConfig(**{**settings, "path": str(tmp_path / "load.jsonl")}, decimal=",")}, "train")


@pytest.mark.parametrize("time", [None, "day"])
def test_rows_of_another_length_are_left_out_of_a_series(tmp_path, time, caplog):
    path = tmp_path / "load.csv"
    path.write_text("day,load\n" + "".join(f"{n},{n}{',x' if n % 10 == 3 else ''}\n" for n in range(40)))
    config = WindowsConfig(path=str(path), columns=["load"], time=time, context=2, horizon=1, test_fraction=0.0)
    source = open_sources({"w": config}, "train")["w"]
    values = [source[row]["series"]["load"] for row in range(len(source))]
    assert len(values) == 34 and values[-1] == [37, 38, 39] and [2, 4, 5] in values
    assert "leaves out of" in caplog.text and "4 rows that cannot be read, such as: line 5 has 3 cells" in caplog.text


def test_blank_ids_are_split_as_missing_ones_are(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,v\n" + "".join(f"{'' if n % 2 else n},{n}\n" for n in range(400)))
    test = open_sources({"t": CsvConfig(path=str(path), fields=Fields(numbers=["v"]))}, "test")["t"]
    blank = [test[row]["numbers"]["v"] % 2 for row in range(len(test))]
    assert 0.3 < np.mean(blank) < 0.7


def test_only_the_target_is_asked_for(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("price,rating,size\n" + "".join(f"{n if n % 3 else ''},{n % 5},{n}\n" for n in range(60)))
    fields = Fields(numbers=["price", "rating", "size"])
    for target, columns in (("price", {"price"}), ("pricce", set())):
        config = CsvConfig(path=str(path), fields=fields, target=target, test_fraction=0.0)
        source = open_sources({"t": config}, "train")["t"]
        task, rng = TASKS["record_regression"], np.random.default_rng(0)
        records = [record for record in (source[row] for row in range(len(source))) if task.languages(record)]
        assert {name for record in records for name in task.example(record, rng).target.raw} == columns
        assert len(records) == (40 if columns else 0)


def test_a_file_without_a_header_is_refused_until_its_columns_are_named(tmp_path):
    path = tmp_path / "iris.csv"
    path.write_text("5.1,3.5\n4.9,3.0\n")
    with pytest.raises(
        DataError, match=r"first line of .*iris.csv holds only numbers \(5.1, 3.5\).*`columns: \[...\]`"
    ):
        open_csv(path, fields=Fields(numbers=["5.1"]))
    source = open_csv(path, fields=Fields(numbers=["length", "width"]), columns=["length", "width"])
    assert [source[n]["numbers"] for n in range(2)] == [{"length": 5.1, "width": 3.5}, {"length": 4.9, "width": 3.0}]
    with pytest.raises(DataError, match="no row of .* fits: line 1 has 2 cells where `columns` names 3"):
        open_csv(path, fields=Fields(numbers=["length"]), columns=["length", "width", "kind"])


def test_columns_are_named_once():
    with pytest.raises(ConfigError, match="each column once"):
        build(CsvConfig, {"path": "x", "columns": ["a", "a"]}, "r.yaml")


@pytest.mark.parametrize("separator", [None, ";"])
def test_a_long_cell_in_the_first_rows_hides_no_header(tmp_path, separator):
    path = tmp_path / "long.csv"
    path.write_text(f'title;price\na;1\n"{"word " * 40_000}";2\nb;3\n')
    source = open_csv(path, separator=separator)
    assert [len(text) for text in source.values("text_en")] == [1, 200_000, 1]
    assert source[2]["numbers"] == {"price": 3.0}


def test_a_header_longer_than_the_sample(tmp_path):
    path = tmp_path / "wide.csv"
    names = [f"{'a column with a long name, ' * 40}number {number:04}" for number in range(1200)]
    path.write_text("title\tprice\t" + "\t".join(names) + "\n" + ("a\t1" + "\t2" * len(names) + "\n") * 2)
    assert path.stat().st_size > SAMPLE_BYTES and sniff_separator(str(path)) == "\t"
    source = open_csv(path)
    assert len(source) == 2 and source[1]["numbers"] == {"price": 1.0}


def open_jsonl(path: object, **settings: object) -> Source:
    return open_sources({"x": JsonlConfig(path=str(path), test_fraction=0.0, **settings)}, "train")["x"]


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
    path.write_bytes(b'{"text_en": "a"}\n{"text_en": \n[1]\n{"text_en": "\xff"}\n' + deep + b'\n\n{"text_en": "b"}\n')
    source = open_jsonl(path)
    assert len(source) == 6
    for index, reason in ((1, "line 2 .*not JSON"), (2, "line 3 .*not a JSON object"), (3, "not UTF-8"), (4, "line 5")):
        with pytest.raises(DataError, match=reason):
            source[index]
    assert source.values("text_en") == ["a", None, None, None, None, "b"]


def test_columns_come_from_lines_at_equal_distances(tmp_path, monkeypatch):
    monkeypatch.setattr("openm6.data.text_tables.HEADER_LINES", 2)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text_en": "a"}\n' * 3 + '{"text_en": "a", "label": "b"}\n' * 3)
    assert open_jsonl(path)[5] == {"id": "x/5", "text_en": "a", "label": "b"}
    path.write_text('{"name": "a"}\n{"name": "b", "price": 3}\n')
    assert open_jsonl(path, fields=Fields(text_en="name", numbers=["price"]))[1]["numbers"] == {"price": 3.0}
    with pytest.raises(DataError, match="did you mean 'price'"):
        open_jsonl(path, fields=Fields(numbers=["prize"]))


@pytest.mark.parametrize(
    "content, reason", [("", "is empty"), ("\n \n", "is empty"), ("hello\n", "no line of a sample")]
)
def test_not_json_lines(tmp_path, content, reason):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=reason):
        open_jsonl(tmp_path / "x.jsonl")


def test_an_address_of_jsonl():
    fsspec.filesystem("memory").pipe("/lines/x.jsonl", b'{"text_en": "a"}\n')
    assert open_jsonl("memory://lines/x.jsonl")[0]["text_en"] == "a"
