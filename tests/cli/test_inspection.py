"""What `openm6 data inspect` prints of a table with troubles."""

from __future__ import annotations

from pathlib import Path

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
    recipe = yaml.safe_load(shown.stdout.partition("openm6 train my.yaml\n")[2])
    assert recipe["sources"]["shop"]["kind"] == "csv"


def test_nothing_there(tmp_path: Path) -> None:
    shown = runner.invoke(app, ["data", "inspect", str(tmp_path / "nothing")])
    assert shown.exit_code == 1
    assert shown.stderr.startswith("error: there is nothing at ")
