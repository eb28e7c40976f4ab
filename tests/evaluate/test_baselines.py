"""Baselines against direct computation, and what becomes of broken training records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from openm6.evaluate.baselines import (
    baseline_values,
    find_season,
    numbers_reference,
    spreads,
    training_examples,
)
from openm6.evaluate.metrics import Scored
from openm6.evaluate.priors import AnswerFrequencies, NoPrior
from openm6.inference.load import Loaded
from openm6.modalities.interface import Part
from openm6.modalities.numbers import NumberSeries
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Example
from tests.data.lists import ListSource
from tests.data.pictures import png
from tests.small_model import SCALES, loaded


@pytest.fixture(scope="module")
def model() -> Loaded:
    return loaded()


def text(answer: str, language: str = "en") -> Example:
    return Example("name_picture", language, [], Part("text", answer), answer, answer)


def number(raw: Any, source: list[Part] | None = None) -> Example:
    return Example("predict_number", "en", source or [], Part("numbers", raw), raw, "x")


def window(past: list[float | None], future: list[float | None]) -> Example:
    return number(
        NumberSeries("temp_max", future), [Part("text", "x"), Part("numbers", NumberSeries("temp_max", past))]
    )


def test_the_most_frequent_answer_of_the_language() -> None:
    train = [text("cat")] * 3 + [text("dog")] * 2 + [text("猫", "zh")] * 5
    scored = Scored([text("cat"), text("dog"), text("猫", "zh"), text("狗", "zh")], ["?"] * 4)
    found = baseline_values("exact_match", scored, AnswerFrequencies(train, []))
    assert found is not None and found.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert baseline_values("exact_match", scored, NoPrior()) is None


def test_a_column_is_guessed_by_its_median(model: Loaded) -> None:
    examples = [number({"mass": 3.0}), number({"length": 5.0})]
    (found,) = numbers_reference(TASKS["predict_number"], examples, [], model)
    assert found.name == "column median"
    assert [float(v[0]) for v in found.predictions] == [SCALES["mass"][0], SCALES["length"][0]]
    assert [float(v[0]) for v in spreads(examples, model)] == [SCALES["mass"][1], SCALES["length"][1]]


def test_a_series_is_guessed_by_its_last_value(model: Loaded) -> None:
    example = window([5.0, 7.0, None], [8.0, None, 9.0])
    (found,) = numbers_reference(TASKS["forecast"], [example], [], model)
    assert found.name == "last value"
    assert found.predictions[0].tolist() == [7.0, 7.0], "one prediction for each truth that is there"
    (spread,) = spreads([example], model)
    assert spread.tolist() == [SCALES["temp_max"][1]] * 2


def test_a_series_with_a_season_is_also_guessed_by_its_last_season(model: Loaded) -> None:
    rng = np.random.default_rng(0)
    series = np.tile([1.0, 5.0, 2.0, 9.0, 4.0, 7.0, 3.0], 8) + rng.normal(0, 0.1, 56)
    train = [window(list(series[n : n + 21]), list(series[n + 21 : n + 29])) for n in range(20)]
    assert find_season(train) in (7, 14), "a multiple of the period is as good"
    example = window([1.0, None, 2.0, 9.0, 4.0, 7.0, 3.0] * 3, list(range(8)))
    last, seasonal = numbers_reference(TASKS["forecast"], [example], train, model)
    assert (last.name, seasonal.name[:23]) == ("last value", "seasonal naive, period ")
    assert last.predictions[0].tolist() == [3.0] * 8
    assert seasonal.predictions[0].tolist() == [1.0, 1.0, 2.0, 9.0, 4.0, 7.0, 3.0, 1.0], (
        "a gap takes the value before"
    )


def test_a_series_that_was_never_observed_is_guessed_at_zero(model: Loaded) -> None:
    (found,) = numbers_reference(TASKS["forecast"], [window([None, None], [1.0])], [], model)
    assert found.predictions[0].tolist() == [0.0]


def test_numbers_are_measured_in_units_of_their_baseline() -> None:
    scored = Scored(
        [number({"mass": 3.0}), number({"mass": 9.0})],
        [],
        spread=[np.ones(1)] * 2,
        reference=[np.full(1, 4.0)] * 2,
    )
    found = baseline_values("crps_share", scored, NoPrior())
    assert found is not None and found == pytest.approx([1 / 3, 5 / 3]) and found.mean() == pytest.approx(1.0)


def test_broken_training_records_are_left_out(model: Loaded) -> None:
    good = {"id": "a", "label": "x", "text_en": "x", "image": png()}
    source = ListSource("s", [good, None, {**good, "image": b"broken"}, {"id": "b"}])
    examples, targets = training_examples(TASKS["draw"], source, 0, model.modalities)
    assert [example.record_id for example in examples] == ["a"] and len(targets) == 1


def test_a_baseline_that_does_not_exist_is_none() -> None:
    assert baseline_values("recognised", Scored([], []), NoPrior()) is None
