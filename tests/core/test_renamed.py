"""Names of version 0.1: each leads to a name that exists, and an error says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openm6.core.config import Config, build
from openm6.core.errors import ConfigError
from openm6.core.files import read_table, renamed
from openm6.serve import config as serve_config
from openm6.tasks.registry import TASKS, task_named
from openm6.train.audio_codec import AudioCodecRecipe
from openm6.train.image_codec import ImageCodecRecipe
from openm6.train.recipe import MultimodalRecipe

KINDS = {row["kind"] for row in read_table("renamed")} - {"task", "option"}
REPLICAS = "ReplicaConfig"  # in a module that needs Ray


def config_classes(parent: type[Config] = Config) -> dict[str, type[Config]]:
    found = {child.__name__: child for child in parent.__subclasses__()}
    return found | {name: one for child in parent.__subclasses__() for name, one in config_classes(child).items()}


@pytest.mark.parametrize("name", sorted(KINDS - {REPLICAS}))
def test_an_old_key_leads_to_a_key_that_exists(name: str) -> None:
    assert serve_config.EngineConfig and MultimodalRecipe and AudioCodecRecipe and ImageCodecRecipe
    fields = config_classes()[name].model_fields
    for old, new in renamed(name).items():
        assert new in fields, f"{old} -> {new}"
        assert old not in fields


def test_the_keys_of_replicas_are_those_of_its_module() -> None:
    text = (Path(serve_config.__file__).parent / "replicas.py").read_text(encoding="utf-8")
    for old, new in renamed(REPLICAS).items():
        assert f"    {new}: " in text and f"\n    {old}: " not in text


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"packing": {"rows": 2}}, "the key 'packing.rows' was renamed to 'batch_size'"),
        ({"loop": {"streaming": {}}}, "the key 'loop.streaming' was renamed to 'offload'"),
        ({"loop": {"offload": {"resident": 1}}}, "'loop.offload.resident' was renamed to 'num_gpu_layers'"),
        ({"judge": {}}, "the key 'judge' was renamed to 'eval'"),
        ({"mixture": [{"source": "a", "task": "draw"}]}, "the task 'draw' was renamed to 'text_to_image'"),
    ],
)
def test_an_old_name_gets_one_sentence(values: dict[str, Any], sentence: str) -> None:
    recipe: dict[str, Any] = {
        "sources": {"a": {"kind": "embedded", "name": "digits"}},
        "mixture": [{"source": "a", "task": "text_to_image"}],
    }
    with pytest.raises(ConfigError, match=sentence):
        build(MultimodalRecipe, recipe | values, "my.yaml")


def test_an_old_task_leads_to_one_that_exists() -> None:
    for old, new in renamed("task").items():
        assert new in TASKS and old not in TASKS
        with pytest.raises(ConfigError, match=f"was renamed to '{new}'"):
            task_named(old)
