"""Candidates judged after one reading of the prompt are as if each was read with a prompt of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openm6.evaluate.likelihood import sequence_nats
from openm6.generate import candidates
from openm6.generate.candidates import candidate_nats
from openm6.generate.decode import Speaker
from openm6.generate.reading import read_into
from openm6.modalities.batch import build_sequence
from openm6.modalities.interface import Part
from openm6.modalities.registry import Reading, source_segments
from tests.data.pictures import png
from tests.small_model import loaded

WORDS = ("zero", "seven apples", "", "a picture of something long", "zero")


@pytest.mark.parametrize("reading", ["whole", "parts"])
@pytest.mark.parametrize("row", [512, 20, 1])
def test_candidates_have_the_likelihood_that_each_has_alone(
    reading: Reading, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "ROW", row)
    model = loaded(reading=reading)
    prompt = source_segments([Part("image", png("red", 40)), Part("text", " What?")], model.modalities)
    wanted = [model.text.target(words) for words in WORDS]
    cache = Speaker.of(model.omni, model.text).new_slots(2, 64)
    place, _ = read_into(model.omni, prompt, cache, 1)
    before = cache.take(1)
    found = candidate_nats(model.omni, cache, 1, place, wanted)
    alone = sequence_nats(model.omni, [build_sequence([*prompt, tokens]) for tokens in wanted])
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert len(set(np.round(found, 3))) == len(WORDS) - 1, "equal candidates alone are equal"
    assert all(torch.equal(part, again) for part, again in zip(before, cache.take(1), strict=True))
