"""Predictors that see no input, against direct counting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from openm6.evaluate.baselines import fit_prior, training_examples
from openm6.evaluate.priors import AnswerFrequencies, CodeFrequencies, NoPrior, ValueFrequencies
from openm6.inference.load import Loaded
from openm6.modalities.interface import Part, Segment
from openm6.modalities.numbers import NumberSeries
from openm6.modalities.registry import target_segment
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Example
from tests.data.lists import ListSource
from tests.data.pictures import png
from tests.small_model import loaded

SIZE = 6


def text(answer: str, language: str = "en") -> Example:
    return Example("name_picture", language, [], Part("text", answer), answer, answer)


def codes(values: np.ndarray, learn: np.ndarray | None = None) -> Segment:
    learned = np.ones(len(values), bool) if learn is None else learn
    return Segment("image_out", {"codes": values}, np.zeros((len(values), 3), np.int32), 1, learned, "block")


def test_answers_by_language() -> None:
    prior = AnswerFrequencies([text("cat")] * 3 + [text("dog")] + [text("猫", "zh")] * 4, [])
    bits = prior.bits([text("cat"), text("dog"), text("猫", "zh"), text("cow"), text("cat", "zh")], [])
    # Add-half over the answers seen and one that was not.
    assert bits[:3] == pytest.approx(-np.log2([3.5 / 5.5, 1.5 / 5.5, 4.5 / 5.0]))
    assert np.isinf(bits[3:]).all()
    assert (prior.most_frequent("en"), prior.most_frequent("fr")) == ("cat", "")
    assert prior.knows([text("cat"), text("猫", "zh")]) and not prior.knows([text("cat", "zh")])


def test_codes_are_predicted_by_position() -> None:
    """Every image shows the code of its position: pooled frequencies cost log2(6) bits, those by position few."""
    own = np.tile(np.arange(SIZE)[:, None], (1, 2))
    train = [codes(own)] * 40
    prior = CodeFrequencies([], train, SIZE)
    per_code = prior.bits([None], [codes(own)])[0] / own.size  # type: ignore[list-item]
    assert per_code < 0.3 < np.log2(SIZE)


def test_codes_without_a_habit_of_position_are_pooled() -> None:
    rng = np.random.default_rng(0)
    train = [codes(rng.choice(SIZE, (9, 2), p=[0.7, 0.1, 0.1, 0.05, 0.03, 0.02])) for _ in range(24)]
    seen = np.concatenate([target.arrays["codes"] for target in train])  # M*P G
    counts = np.stack([np.bincount(group, minlength=SIZE) for group in seen.T]) + 0.5
    share = counts / counts.sum(1, keepdims=True)
    test = rng.integers(0, SIZE, (9, 2))
    found = CodeFrequencies([], train, SIZE).bits([None], [codes(test)])[0]  # type: ignore[list-item]
    pooled = -np.log2([share[g, code] for row in test for g, code in enumerate(row)]).sum()
    assert found == pytest.approx(pooled, rel=0.35)


def test_only_codes_that_carry_a_loss_count() -> None:
    train = [codes(np.arange(4)[:, None] % 3)] * 8
    prior = CodeFrequencies([], train, 3)
    test = np.array([[2], [1], [2], [0]])
    whole = prior.bits([None], [codes(test)])[0]  # type: ignore[list-item]
    parts = [
        prior.bits([None], [codes(test, np.arange(4) == n)])[0]
        for n in range(4)  # type: ignore[list-item]
    ]
    assert sum(parts) == pytest.approx(whole) and parts[1] < parts[0]


def number(raw: Any) -> Example:
    return Example("predict_number", "en", [], Part("numbers", raw), raw, "x")


def test_values_are_counted_by_column() -> None:
    model = loaded()
    train = [number({"mass": 10.0})] * 30 + [number({"length": 3.0})] * 30
    targets = [target_segment(example.target, model.modalities) for example in train]
    prior = ValueFrequencies(train, targets)
    test = [number({"mass": 10.0}), number({"mass": 14.0}), number(NumberSeries("length", [3.0, None, 3.0]))]
    bits = prior.bits(test, [target_segment(example.target, model.modalities) for example in test])
    seen = -np.log2(30.125 / (30 + 160 * 0.125))
    assert bits == pytest.approx([seen, -np.log2(0.125 / 50), 2 * seen])


@pytest.fixture(scope="module")
def model() -> Loaded:
    return loaded()


def test_nothing_is_known_without_training_records(model: Loaded) -> None:
    prior = fit_prior(TASKS["draw"], [], [], model)
    assert isinstance(prior, NoPrior) and np.isinf(prior.bits([number({"mass": 1.0})], [])).all()


def test_images_alike_cost_few_bits(model: Loaded) -> None:
    records = [{"id": f"{n}", "label": "x", "text_en": "x", "image": png("red", 64)} for n in range(20)]
    examples, targets = training_examples(TASKS["draw"], ListSource("s", records), 0, model.modalities)
    prior = fit_prior(TASKS["draw"], examples, targets, model)
    noise = Part("image", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    near, far = (
        prior.bits([], [targets[0], target_segment(noise, model.modalities)])
        / targets[0].arrays["codes"].size
    )
    assert near < 2 < 6 < far
