"""What model.json keeps, and that of older checkpoints."""

from __future__ import annotations

import json

from openm6.models.description import read_description
from tests.small_model import loaded


def test_how_sources_are_read_is_kept() -> None:
    description = loaded(prompt_attention="block").description
    assert read_description(description.to_json(), "model.json") == description
    assert description.modalities.prompt_attention == "block"


def test_a_model_that_says_nothing_of_it_reads_its_sources_whole() -> None:
    values = json.loads(loaded().description.to_json())
    del values["modalities"]["prompt_attention"]
    assert read_description(json.dumps(values), "model.json").modalities.prompt_attention == "bidirectional"
