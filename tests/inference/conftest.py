"""The model and the prompts of the tests of text decoding and prefill."""

from __future__ import annotations

import pytest

from openm6.inference.load import LoadedModel
from openm6.inference.prefill import Prompt
from openm6.modalities.interface import Part
from openm6.modalities.registry import source_segments
from tests.small_model import loaded

WORDS = ("draw the digit seven", "a", "an image of something long", "x", "What is this?")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(5)


@pytest.fixture(scope="module")
def prompts(model: LoadedModel) -> list[Prompt]:
    return [source_segments([Part("text", words)], model.modalities) for words in WORDS]
