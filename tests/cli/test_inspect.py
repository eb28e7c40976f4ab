"""What `openm6 data inspect` prints of a table with troubles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from openm6.cli.main import app

runner = CliRunner(env={"COLUMNS": "200"})


def test_a_table_with_a_broken_row(tmp_path: Path) -> None:
    path = tmp_path / "shop.csv"
    rows = [f"{index},{'cheap' if index % 2 else 'dear'} [b]thing[/b],{index * 1.5}" for index in range(60)]
    path.write_text("\n".join(["id,name,price", *rows, "60,odd,not a number", ""]))
    shown = runner.invoke(app, ["data", "inspect", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "shop (csv," in shown.stdout
    assert "61 rows" in shown.stdout and "price" in shown.stdout
    assert "[b]" in shown.stdout  # the user's own brackets, not markup
    recipe = yaml.safe_load(shown.stdout.partition("openm6 train my.yaml trains:\n")[2])
    assert recipe["sources"]["shop"]["kind"] == "csv"


def test_whole_numbers_as_categories(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("size;smoker;price\n" + "".join(f"{n * 7 % 31};{n % 2};${n * 1500:,}.00\n" for n in range(60)))
    shown = runner.invoke(app, ["data", "inspect", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "category (whole numbers)" in shown.stdout and "mean 4.425e+04 ($)" in shown.stdout
    assert "smoker. To predict one as a number, move it from `categories` to `numbers`" in shown.stdout
    recipe = yaml.safe_load(shown.stdout.partition("openm6 train my.yaml trains:\n")[2])
    assert recipe["sources"]["x"]["fields"] == {"numbers": ["size", "price"], "categories": ["smoker"]}


def test_the_recipe_is_written_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data, out = tmp_path / "x.csv", tmp_path / "my.yaml"
    data.write_text("text,label\n" + "".join(f"words of number {n},{'ab'[n % 2]}\n" for n in range(30)))
    words = ["data", "inspect", str(data), "--out", str(out)]
    shown = runner.invoke(app, words)
    assert shown.exit_code == 0 and f"wrote {out}; train it with: openm6 train {out}" in shown.stdout
    assert yaml.safe_load(out.read_text())["mixture"] == [{"source": "x", "task": "text_classification"}]
    monkeypatch.setattr("openm6.data.inspect.inspect_path", None)  # refused before it is called
    again = runner.invoke(app, words)
    assert again.exit_code == 1 and "exists already: name another file" in again.stderr


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\x8c\xff\n\x00\xfe,\x80\n", "the first line of .* is not UTF-8"),
        ("\ufefftitle\n".encode() + b"caf\xe9\n" * 9, "line 2: column 'title' is not UTF-8 at byte 3"),
        (b"title,price\n", "no cell holds anything that can be read"),
        (b'title\n""\n', "no cell holds anything"),
    ],
)
def test_what_cannot_be_trained_on_is_an_error(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    shown = runner.invoke(app, ["data", "inspect", str(path), "--out", str(tmp_path / "my.yaml")])
    assert shown.exit_code == 1 and shown.stderr.count("\n") == 1
    assert re.search(rf"^error: nothing at .* can be trained on as it is: .*{sentence}", shown.stderr)
    assert not (tmp_path / "my.yaml").exists()


def test_nothing_there(tmp_path: Path) -> None:
    shown = runner.invoke(app, ["data", "inspect", str(tmp_path / "nothing")])
    assert shown.exit_code == 1
    assert shown.stderr.startswith("error: there is nothing at ")
