"""The worked example of docs/own-data.md, taken from the page itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from openm6.cli.main import app
from openm6.core.config import build
from openm6.core.errors import DataError
from openm6.data.parquet import EMBEDDED
from openm6.data.records import CANONICAL_KEYS
from openm6.data.sources import open_sources
from openm6.tasks.registry import TASKS
from openm6.train.recipe import MultimodalRecipe
from tests.data.lists import KINDS
from tests.data.sample_images import png

PAGE = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    for name in ("cups/1", "cups/2", "plates/1", "plates/2"):
        path = tmp_path / "my" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    (tmp_path / "my" / "shop.csv").write_text(block("csv"))
    monkeypatch.chdir(tmp_path)
    inspect = re.search(r"openm6 (data inspect .*)\n", PAGE)[1]
    shown = CliRunner(env={"COLUMNS": "150"}).invoke(app, inspect.split())
    assert shown.exit_code == 0, shown.output
    assert "gone.png" in shown.stdout and "20%, and training stops above 5%" in shown.stdout
    assert (tmp_path / "my.yaml").read_text() == block("yaml")
    return build(MultimodalRecipe, yaml.safe_load(block("yaml")), "my.yaml")


def test_the_example_gives_the_record_shown(recipe):
    shop = open_sources(recipe.sources, "train")["shop"]
    shown = ast.literal_eval(block("python").replace('b"\\x89PNG…"', "None"))
    assert {**shop[0], "image": None} == shown
    assert shop[0]["image"] == png()
    assert shop[1]["numbers"] == {"price": 3.9, "rating": None} and shop[3]["numbers"]["price"] is None
    with pytest.raises(DataError, match="gone"):
        shop[4]


def test_every_task_of_the_example_can_be_posed(recipe):
    record = open_sources(recipe.sources, "train")["shop"][0]
    for component in recipe.mixture:
        example = TASKS[component.task].example(record, np.random.default_rng(0))
        assert example.source and example.task == component.task


def test_the_recipe_is_trained_as_it_stands(recipe, tmp_path):
    """By the page's own command, but for the sizes and the time."""
    words = re.search(r"`openm6 (train my.yaml .*?)`", PAGE)[1].split()
    small = [f"model.overrides.{size}" for size in ("hidden_size=64", "num_layers=1", "num_heads=2", "num_kv_heads=1")]
    small += ["modalities.text.vocab_size=400", "packing.batch_size=1", "loop.steps=12", "loop.tensorboard=false"]
    shown = CliRunner().invoke(app, [*words, *small])
    assert shown.exit_code == 0, shown.output
    run = tmp_path / "runs" / "my"
    assert (run / "report.html").is_file()
    assert "gone.png" in (run / "quarantine.jsonl").read_text()


def test_the_tables_of_the_page_are_complete():
    assert set(re.findall(r"^\| `(\w+)` \| ", PAGE, re.MULTILINE)) >= set(KINDS)
    assert all(f"`{key}`" in PAGE for key in CANONICAL_KEYS if key not in ("source", "license", "series"))
    assert all(name in PAGE for name in EMBEDDED)
