"""Entry points of other packages: tasks, sources, metrics and codecs are found by name; a broken one is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from openm6.codecs.base import Codec
from openm6.codecs.registry import load_codec
from openm6.core.config import build
from openm6.core.errors import ConfigError
from openm6.core.extensions import installed
from openm6.evaluate.metrics import Scored, all_metrics, known_metrics
from openm6.tasks.registry import _installed, all_tasks, task_named
from openm6.train.recipe import MultimodalRecipe

MODULE = """
from typing import Literal

import numpy as np

from openm6.codecs.registry import load_codec
from openm6.data.text_tables import JsonlConfig
from openm6.data.table import TableConfig
from openm6.evaluate.metrics import Metric
from openm6.tasks.slots import LABEL, Text
from openm6.tasks.task import Task

rhyme = Task(summary="Rhyme", inputs={"word": Text("label")}, target=LABEL, prompts={"de": ("{word} reimt sich auf",)})


class Lines(TableConfig):
    kind: Literal["lines"] = "lines"

    def load(self, path):
        return JsonlConfig(path=path).load(path)


length = Metric("length", "length", "letters", "lower", lambda scored: np.ones(len(scored.examples)))


def codec():
    return load_codec("image-64")
"""
POINTS = """
[openm6.tasks]
rhyme = plugin_of_test:rhyme
image_captioning = plugin_of_test:rhyme
length = plugin_of_test:length
gone = plugin_of_test:gone

[openm6.sources]
lines = plugin_of_test:Lines

[openm6.metrics]
length = plugin_of_test:length

[openm6.codecs]
mine = plugin_of_test:codec
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    about = tmp_path / "plugin_of_test-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-test\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    (tmp_path / "plugin_of_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    installed.cache_clear()
    _installed.cache_clear()
    yield
    installed.cache_clear()
    _installed.cache_clear()


def test_an_installed_task_is_known_and_replaces_none() -> None:
    assert task_named("rhyme").name == "rhyme" and task_named("rhyme").prompts["de"]
    assert all_tasks()["image_captioning"].summary != "Rhyme"


def test_what_does_not_load_or_is_of_another_kind_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="openm6"):
        assert not {"gone", "length"} & set(all_tasks())
    assert "'gone' of openm6.tasks in package plugin-of-test does not load" in caplog.text
    assert "'length' of openm6.tasks in package plugin-of-test is no Task" in caplog.text


def test_a_recipe_uses_installed_sources_metrics_and_tasks() -> None:
    task = {"inputs": {"text": "text"}, "target": {"category": "label"}, "prompts": {"en": "{text}"}}
    recipe = build(
        MultimodalRecipe,
        {
            "tasks": {"own": {**task, "metrics": ["length", "exact_match"]}},
            "sources": {"a": {"kind": "lines", "path": "x.jsonl"}},
            "mixture": [{"source": "a", "task": "own"}, {"source": "a", "task": "rhyme"}],
        },
        "recipe",
    )
    assert type(recipe.sources["a"]).__name__ == "Lines" and recipe.task("rhyme").output_modality == "text"
    assert known_metrics()["length"].better == "lower"
    example = task_named("rhyme").example({"id": "a", "label": "x"}, np.random.default_rng(0))
    assert all_metrics(("length",), Scored([example] * 2, ["", ""]))["length"].tolist() == [1.0, 1.0]


def test_an_installed_codec_has_a_name() -> None:
    codec = load_codec("mine")
    assert isinstance(codec, Codec) and not any(parameter.requires_grad for parameter in codec.parameters())
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        load_codec("mines")
