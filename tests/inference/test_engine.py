"""Answers of a single pass (numbers, candidates, embeddings) are the same alone, in a batch and without a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openm6.core.errors import ConfigError, DataError
from openm6.evaluate.likelihood import sequence_nll
from openm6.inference import engine
from openm6.inference.engine import embed, predict_distributions, score_rows
from openm6.inference.prefill import Prompt, passes_of, prefill
from openm6.modalities.batch import build_sequence
from openm6.modalities.interface import Part, Segment
from openm6.modalities.registry import PromptAttention, opened, source_segments, split_opening
from openm6.modalities.series import NumberSeries
from tests.data.sample_images import png, wav
from tests.inference.reference import hidden_states
from tests.small_model import embedding_model, loaded, modalities

MODEL = loaded(7)
PROMPTS = [
    source_segments(parts, modalities())
    for parts in (
        [Part("text", "how heavy?")],
        [Part("numbers", {"length": 3.1}), Part("text", " What is its mass, and what else is there to say?")],
        [Part("numbers", NumberSeries("temp_max", [12.0, None, 14.0] * 9))],
        [],
    )
]
WANTED = [
    modalities()["numbers"].target(raw)
    for raw in (
        {"mass": 9.0},
        {"mass": 11.0},
        NumberSeries("temp_max", [14.0, None, 15.0, 16.0, 11.0, 12.0, 13.0, 14.0, 9.0, 8.0]),
        {"length": 2.0},
    )
]


def test_a_batch_equals_each_alone() -> None:
    together = predict_distributions(MODEL.omni, PROMPTS, WANTED)
    for row in range(len(PROMPTS)):
        (alone,) = predict_distributions(MODEL.omni, [PROMPTS[row]], [WANTED[row]])
        np.testing.assert_allclose(together[row].probability, alone.probability, rtol=1e-4, atol=1e-7)
        assert np.array_equal(together[row].loc, alone.loc)


def test_only_what_is_asked_for_is_answered() -> None:
    assert [len(found.probability) for found in predict_distributions(MODEL.omni, PROMPTS, WANTED)] == [
        1,
        1,
        9,
        1,
    ]
    np.testing.assert_allclose(predict_distributions(MODEL.omni, PROMPTS, WANTED)[2].probability.sum(1), 1, rtol=1e-5)


def uncached(prompt: Prompt, segment: Segment) -> np.ndarray:
    """Probabilities of the bins from one pass over prompt and queries."""
    hidden = hidden_states(MODEL, prompt, segment)
    arrays = {name: torch.from_numpy(array) for name, array in segment.arrays.items()}
    (found,) = MODEL.omni.adapter(segment.kind).histograms(hidden[None], arrays)  # type: ignore[operator]
    return found.probability


@pytest.mark.parametrize("row", range(3))
def test_cached_equals_uncached(row: int) -> None:
    (found,) = predict_distributions(MODEL.omni, [PROMPTS[row]], [WANTED[row]])
    np.testing.assert_allclose(found.probability, uncached(PROMPTS[row], WANTED[row]), rtol=1e-4, atol=1e-7)


def test_answers_are_in_the_columns_own_units() -> None:
    (found,) = predict_distributions(MODEL.omni, PROMPTS[:1], WANTED[:1])
    assert found.loc.tolist() == [10.0] and found.scale.tolist() == [2.0]
    low, high = found.interval(0.8)
    assert low < found.median() < high


CANDIDATES = ("zero", "seven apples", "", "an image of something long", "zero")


@pytest.mark.parametrize("prompt_attention", ["bidirectional", "block", "causal"])
@pytest.mark.parametrize("row", [512, 20, 1])
def test_candidates_have_the_likelihood_that_each_has_alone(
    prompt_attention: PromptAttention, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "ROW_TOKENS", row)
    model = loaded(prompt_attention=prompt_attention)
    prompt = source_segments([Part("image", png("red", 40)), Part("text", " What?")], model.modalities)
    prompt, opening = split_opening(prompt)
    wanted = [opened(model.text.target(words), opening) for words in CANDIDATES]
    cache = model.omni.backbone.new_cache(2, 64)
    position, _ = prefill(model.omni, prompt, cache, 1)
    before = cache.take(1)
    found = score_rows(model.omni, cache, [1], [position], [wanted])[0].tolist()
    alone = sequence_nll(model.omni, [build_sequence([*prompt, tokens]) for tokens in wanted])
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert len(set(np.round(found, 3))) == len(CANDIDATES) - 1, "equal candidates alone are equal"
    assert all(torch.equal(part, again) for part, again in zip(before, cache.take(1), strict=True))


INPUTS = [
    [Part("text", "seven")],
    [Part("image", png(side=40))],
    [Part("audio", wav(seconds=0.4))],
    [Part("text", "a cup"), Part("image", png(side=24))],
    [Part("numbers", {"mass": 3.0})],
]


def test_every_modality_has_a_vector_of_length_one() -> None:
    model = embedding_model()
    vectors = embed(model, INPUTS)
    assert vectors.shape == (len(INPUTS), model.pool.size)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(INPUTS)), abs=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


@pytest.mark.parametrize("row", [512, 20])  # tokens: one pass, and several
def test_a_crowd_changes_nothing(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ROW_TOKENS", row)
    crowd = embed(embedding_model(), [*INPUTS, *INPUTS * 3])
    alone = [embed(embedding_model(), [parts])[0] for parts in INPUTS]
    assert crowd[: len(INPUTS)] == pytest.approx(np.stack(alone), abs=1e-5)


def test_nothing_in_gives_nothing_out() -> None:
    assert embed(embedding_model(), []).shape == (0, 16)


def test_passes_keep_the_order_and_their_bound() -> None:
    lengths = [200, 100, 300, 400, 10, 550, 1, 500, 500, 500]
    passes = passes_of(lengths, int, 500)
    assert [length for few in passes for length in few] == lengths
    assert all(sum(few) <= 500 or len(few) == 1 for few in passes) and len(passes) < len(lengths)


def test_a_model_without_the_lesson_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="needs training on image_text_retrieval"):
        embed(loaded(), INPUTS)


def test_a_broken_image_is_refused() -> None:
    with pytest.raises(DataError, match="image is broken"):
        embed(embedding_model(), [[Part("image", b"no image")]])
