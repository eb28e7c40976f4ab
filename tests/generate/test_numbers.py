"""Numbers for many prompts equal numbers for each alone, and the naive twin without a cache."""

from __future__ import annotations

import numpy as np
import pytest

from openm6.generate.numbers import predict
from openm6.modalities.batch import build_sequence, collate
from openm6.modalities.interface import Part, Segment
from openm6.modalities.numbers import NumberSeries
from openm6.modalities.registry import source_segments
from tests.small_model import loaded, modalities

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
    together = predict(MODEL.omni, PROMPTS, WANTED)
    for row in range(len(PROMPTS)):
        (alone,) = predict(MODEL.omni, [PROMPTS[row]], [WANTED[row]])
        np.testing.assert_allclose(together[row].probability, alone.probability, rtol=1e-4, atol=1e-7)
        assert np.array_equal(together[row].centre, alone.centre)


def test_only_what_is_asked_for_is_answered() -> None:
    assert [len(found.probability) for found in predict(MODEL.omni, PROMPTS, WANTED)] == [1, 1, 9, 1]
    np.testing.assert_allclose(predict(MODEL.omni, PROMPTS, WANTED)[2].probability.sum(1), 1, rtol=1e-5)


def naive(prompt: list[Segment], tokens: Segment) -> np.ndarray:
    """Probabilities of the bins from one pass over prompt and queries."""
    sequence = build_sequence([*prompt, tokens])
    batch = collate([[sequence]], len(sequence))
    hidden = MODEL.omni(batch.kinds, batch.layout)[0][0, len(sequence) - len(tokens) :]
    probability = MODEL.omni.adapter("numbers_out").logits(hidden).softmax(-1)  # type: ignore[operator]
    return probability.flatten(0, 1).numpy()[tokens.arrays["observed"].reshape(-1)]


@pytest.mark.parametrize("row", range(3))
def test_cached_equals_uncached(row: int) -> None:
    (found,) = predict(MODEL.omni, [PROMPTS[row]], [WANTED[row]])
    np.testing.assert_allclose(found.probability, naive(PROMPTS[row], WANTED[row]), rtol=1e-4, atol=1e-7)


def test_answers_are_in_the_columns_own_units() -> None:
    (found,) = predict(MODEL.omni, PROMPTS[:1], WANTED[:1])
    assert found.centre.tolist() == [10.0] and found.spread.tolist() == [2.0]
    low, high = found.interval(0.8)
    assert low < found.median() < high
