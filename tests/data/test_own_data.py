"""The worked example of docs/own-data.md, taken from the page itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from openm6.base.config import build
from openm6.base.errors import DataError
from openm6.data.parquet import EMBEDDED
from openm6.data.records import CANONICAL_KEYS
from openm6.data.sources import SOURCES, open_sources
from openm6.tasks.registry import TASKS
from openm6.train.recipe import MultimodalRecipe
from tests.data.pictures import png

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
    for lecture in recipe.mixture:
        example = TASKS[lecture.task].example(record, np.random.default_rng(0))
        assert example.source and example.task == lecture.task


def test_the_tables_of_the_page_are_complete():
    assert set(re.findall(r"^\| `(\w+)` \| ", PAGE, re.MULTILINE)) >= set(SOURCES)
    assert all(f"`{key}`" in PAGE for key in CANONICAL_KEYS if key not in ("source", "license", "series"))
    assert all(name in PAGE for name in EMBEDDED)
