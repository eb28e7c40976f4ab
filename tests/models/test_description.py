"""What model.json keeps, and that of older checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from openm6.codecs.registry import load_codec, save_codec
from openm6.core.errors import CheckpointError
from openm6.modalities.text import train_tokenizer
from openm6.models.description import build_model, read_description
from tests.small_model import WORDS, loaded


def test_how_sources_are_read_is_kept() -> None:
    description = loaded(prompt_attention="block").description
    assert read_description(description.to_json(), "model.json") == description
    assert description.modalities.prompt_attention == "block"


def test_a_model_that_says_nothing_of_it_reads_its_sources_whole() -> None:
    values = json.loads(loaded().description.to_json())
    del values["modalities"]["prompt_attention"]
    assert read_description(json.dumps(values), "model.json").modalities.prompt_attention == "bidirectional"


def test_dates_of_one_source_that_are_numbers_of_another_are_read_as_numbers() -> None:
    sources = {"shop": {"fields": {"dates": {"price": None, "day": "%d.%m.%Y"}}}, "texts": {"fields": None}}
    description = loaded().description.model_copy(update={"sources": sources})
    _, modalities = build_model(description, train_tokenizer(WORDS, 320).to_str(), "tokenizer.json")
    assert modalities["numbers"].dates == {"day": "%d.%m.%Y"}


def test_a_codec_that_was_trained_again_is_refused(tmp_path: Path) -> None:
    codec, path = load_codec("image-64"), tmp_path / "mine.safetensors"
    save_codec(codec, path)
    description = loaded().description
    image = description.modalities.image.model_copy(update={"codec": str(path)})
    modalities = description.modalities.model_copy(update={"image": image})
    description = description.model_copy(update={"modalities": modalities})
    words = train_tokenizer(WORDS, 320).to_str()
    external = build_model(description, words, "tokenizer.json")[1].external
    assert set(external) == {"image.codec", "audio.codec"}
    description = description.model_copy(update={"external": external})
    build_model(description, words, "tokenizer.json")
    next(codec.parameters()).data += torch.tensor(0.1)
    save_codec(codec, path)
    with pytest.raises(CheckpointError, match=r"modalities\.image\.codec has other weights than in the training"):
        build_model(description, words, "tokenizer.json")
