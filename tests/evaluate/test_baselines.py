"""Baselines and priors against direct computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from openm6.evaluate import likelihood
from openm6.evaluate.likelihood import (
    AnswerFrequencies,
    CodeFrequencies,
    TargetPrior,
    ValueFrequencies,
    baseline_values,
    column_medians,
    column_scales,
    find_season,
    fit_prior,
    numbers_references,
    training_examples,
)
from openm6.evaluate.metrics import Scored
from openm6.inference.load import LoadedModel
from openm6.modalities.interface import Part, Segment
from openm6.modalities.registry import target_segment
from openm6.modalities.series import NumberSeries
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Example
from tests.data.lists import ListSource
from tests.data.sample_images import png
from tests.small_model import SCALES, loaded

FORECAST = TASKS["time_series_forecasting"]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded()


def text(answer: str, language: str = "en") -> Example:
    return Example("image_classification", language, [], Part("text", answer), answer, answer)


def number(raw: Any, source: list[Part] | None = None) -> Example:
    return Example("tabular_regression", "en", source or [], Part("numbers", raw), raw, "x")


def window(past: list[float | None], future: list[float | None], name: str = "temp_max") -> Example:
    return number(NumberSeries(name, future), [Part("text", "x"), Part("numbers", NumberSeries(name, past))])


def test_the_most_frequent_answer_of_the_language() -> None:
    train = [text("cat")] * 3 + [text("dog")] * 2 + [text("猫", "zh")] * 5
    scored = Scored([text("cat"), text("dog"), text("猫", "zh"), text("狗", "zh")], ["?"] * 4)
    found = baseline_values("exact_match", scored, AnswerFrequencies(train))
    assert found is not None and found.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert baseline_values("exact_match", scored, TargetPrior()) is None
    unseen = baseline_values("exact_match", Scored([text("chat", "fr")], ["?"]), AnswerFrequencies(train))
    assert unseen is not None and unseen.tolist() == [0.0]


def test_a_column_is_guessed_by_its_median(model: LoadedModel) -> None:
    examples = [number({"mass": 3.0}), number({"length": 5.0})]
    found = numbers_references(TASKS["tabular_regression"], examples, [], model)
    assert list(found) == ["column median"]
    assert [float(v[0]) for v in found["column median"]] == [SCALES["mass"][0], SCALES["length"][0]]
    assert [float(v[0]) for v in column_scales(examples, model)] == [SCALES["mass"][1], SCALES["length"][1]]


def test_the_median_is_that_of_the_training_records_of_the_source(model: LoadedModel) -> None:
    """Whatever the scale of the model, which is that of all sources: of values asked for, and of those shown."""
    shown = {"length": 4.0, "digit": None, "kind": "oak"}
    train = [number({"mass": 1.0}), replace(number({"mass": 2.0}), target=Part("numbers", {}, {"given": shown}))]
    train += [number({"mass": 60.0}), number({"mass": None})]
    asked = [number({name: 3.0}) for name in ("mass", "length", "digit")]
    found = numbers_references(TASKS["tabular_regression"], asked, train, model)["column median"]
    assert [float(v[0]) for v in found] == [2.0, 4.0, SCALES["digit"][0]]


def test_a_series_is_guessed_by_its_last_value(model: LoadedModel) -> None:
    example = window([5.0, 7.0, None], [8.0, None, 9.0])
    ((name, predictions),) = numbers_references(FORECAST, [example], [], model).items()
    assert name == "last value"
    assert predictions[0].tolist() == [7.0, 7.0], "one prediction per observed truth"
    (scale,) = column_scales([example], model)
    assert scale.tolist() == [SCALES["temp_max"][1]] * 2


def test_a_series_with_a_season_is_also_guessed_by_its_last_season(model: LoadedModel) -> None:
    rng = np.random.default_rng(0)
    series = np.tile([1.0, 5.0, 2.0, 9.0, 4.0, 7.0, 3.0], 8) + rng.normal(0, 0.1, 56)
    train = [window(list(series[n : n + 21]), list(series[n + 21 : n + 29])) for n in range(20)]
    assert find_season(train) in (7, 14), "a multiple of the period is as good"
    example = window([1.0, None, 2.0, 9.0, 4.0, 7.0, 3.0] * 3, list(range(8)))
    found = numbers_references(FORECAST, [example], train, model)
    (last, last_values), (seasonal, season_values) = found.items()
    assert (last, seasonal[:23]) == ("last value", "seasonal naive, period ")
    assert last_values[0].tolist() == [3.0] * 8
    filled = [1.0, 1.0, 2.0, 9.0, 4.0, 7.0, 3.0, 1.0]
    assert season_values[0].tolist() == filled, "a gap takes the value before"


def test_each_column_has_a_season_of_its_own(model: LoadedModel) -> None:
    """In whatever units: those of the larger one do not choose for both."""
    seasons = {"temp_max": [1.0, 5.0, 2.0], "mass": [9e5, 1e5, 4e5, 7e5, 0.0]}
    train = [
        window(list(np.resize(season, 14 + n)[n:]), list(np.resize(season, 18 + n)[14 + n :]), name)
        for name, season in seasons.items()
        for n in range(4)
    ]
    found = numbers_references(FORECAST, train, train, model)
    assert list(found) == ["last value", "seasonal naive, period 3 to 5"]
    for example, forecast in zip(train, found["seasonal naive, period 3 to 5"], strict=True):
        assert forecast.tolist() == example.answer.values


def test_a_season_is_that_of_the_smallest_mean_error_and_reads_each_window_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(1)
    train = [window(list(rng.normal(size=20 + n)), [1.0, None, *rng.normal(size=6)]) for n in range(5)]
    errors = {}
    for period in range(2, 21):
        pasts = [(one, np.asarray(one.source[1].raw.values)) for one in train]
        naive = [(np.resize(past[-period:], 8), np.array(one.answer.values, float)) for one, past in pasts]
        errors[period] = np.mean([np.nanmean(np.abs(found - true)) for found, true in naive])
    read = Mock(side_effect=likelihood._past)
    monkeypatch.setattr(likelihood, "_past", read)
    assert find_season(train) == min(errors, key=errors.__getitem__)
    assert read.call_count <= 2 * len(train)


def test_a_series_that_was_never_observed_is_guessed_at_zero(model: LoadedModel) -> None:
    found = numbers_references(FORECAST, [window([None, None], [1.0])], [], model)
    assert found["last value"][0].tolist() == [0.0]


def test_numbers_are_measured_in_units_of_their_baseline() -> None:
    scored = Scored(
        [number({"mass": 3.0}), number({"mass": 9.0})],
        [],
        scale=[np.ones(1)] * 2,
        reference=[np.full(1, 4.0)] * 2,
    )
    found = baseline_values("relative_crps", scored, TargetPrior())
    assert found is not None and found == pytest.approx([1 / 3, 5 / 3]) and found.mean() == pytest.approx(1.0)


def test_broken_training_records_are_left_out(model: LoadedModel) -> None:
    good = {"id": "a", "label": "x", "text_en": "x", "image": png()}
    source = ListSource("s", [good, None, {**good, "image": b"broken"}, {"id": "b"}])
    examples, targets = training_examples(TASKS["text_to_image"], source, 0, model.modalities)
    assert [example.record_id for example in examples] == ["a"] and len(targets) == 1


def test_a_baseline_that_does_not_exist_is_none() -> None:
    assert baseline_values("knn_accuracy", Scored([], []), TargetPrior()) is None


SIZE = 6  # of the codebook


def codes(values: np.ndarray, learn: np.ndarray | None = None) -> Segment:
    learned = np.ones(len(values), bool) if learn is None else learn
    return Segment("image_out", {"codes": values}, np.zeros((len(values), 3), np.int32), 1, learned, "block")


def test_answers_by_language() -> None:
    prior = AnswerFrequencies([text("cat")] * 3 + [text("dog")] + [text("猫", "zh")] * 4)
    bits = prior.bits([text("cat"), text("dog"), text("猫", "zh"), text("cow"), text("cat", "zh")], [])
    # Add-half over the answers seen and one that was not.
    assert bits[:3] == pytest.approx(-np.log2([3.5 / 5.5, 1.5 / 5.5, 4.5 / 5.0]))
    assert np.isinf(bits[3:]).all()
    assert prior.covers([text("cat"), text("猫", "zh")]) and not prior.covers([text("cat", "zh")])


def test_codes_are_predicted_by_position() -> None:
    """Every image shows the code of its position: pooled frequencies cost log2(6) bits, those by position few."""
    own = np.tile(np.arange(SIZE)[:, None], (1, 2))
    train = [codes(own)] * 40
    prior = CodeFrequencies(train, SIZE)
    per_code = prior.bits([None], [codes(own)])[0] / own.size  # type: ignore[list-item]
    assert per_code < 0.3 < np.log2(SIZE)


def test_codes_without_a_habit_of_position_are_pooled() -> None:
    rng = np.random.default_rng(0)
    train = [codes(rng.choice(SIZE, (9, 2), p=[0.7, 0.1, 0.1, 0.05, 0.03, 0.02])) for _ in range(24)]
    seen = np.concatenate([target.arrays["codes"] for target in train])  # M*P G
    counts = np.stack([np.bincount(group, minlength=SIZE) for group in seen.T]) + 0.5
    share = counts / counts.sum(1, keepdims=True)
    test = rng.integers(0, SIZE, (9, 2))
    found = CodeFrequencies(train, SIZE).bits([None], [codes(test)])[0]  # type: ignore[list-item]
    pooled = -np.log2([share[g, code] for row in test for g, code in enumerate(row)]).sum()
    assert found == pytest.approx(pooled, rel=0.35)


def test_only_codes_that_carry_a_loss_count() -> None:
    train = [codes(np.arange(4)[:, None] % 3)] * 8
    prior = CodeFrequencies(train, 3)
    test = np.array([[2], [1], [2], [0]])
    whole = prior.bits([None], [codes(test)])[0]  # type: ignore[list-item]
    parts = [
        prior.bits([None], [codes(test, np.arange(4) == n)])[0]
        for n in range(4)  # type: ignore[list-item]
    ]
    assert sum(parts) == pytest.approx(whole) and parts[1] < parts[0]


def test_values_are_counted_by_column() -> None:
    model = loaded()
    train = [number({"mass": 10.0})] * 30 + [number({"length": 3.0})] * 30
    prior = ValueFrequencies(train, model.numbers)
    test = [number({"mass": 10.0}), number({"mass": 14.0}), number(NumberSeries("length", [3.0, None, 3.0]))]
    bits = prior.bits(test, [])
    seen = -np.log2(30.125 / (30 + 160 * 0.125))
    assert bits == pytest.approx([seen, -np.log2(0.125 / 50), 2 * seen])


def test_an_answer_of_several_columns_is_measured_by_each() -> None:
    model = loaded()
    train = [number({"mass": 10.0, "length": 3.0})] * 10 + [number({"mass": 12.0, "length": None})] * 20
    test = [number({"mass": 11.0, "length": 2.0}), number({"mass": None, "length": 4.0})]
    medians = column_medians(test, train, model)
    assert [one.tolist() for one in medians] == [[12.0, 3.0], [3.0]]
    assert [one.tolist() for one in column_scales(test, model)] == [[2.0, 0.5], [0.5]]
    prior = ValueFrequencies(train, model.numbers)
    assert prior.counts["mass"].sum() == 30 and prior.counts["length"].sum() == 10


def test_nothing_is_known_without_training_records(model: LoadedModel) -> None:
    prior = fit_prior(TASKS["text_to_image"], [], [], model)
    assert isinstance(prior, TargetPrior) and np.isinf(prior.bits([number({"mass": 1.0})], [])).all()


def test_images_alike_cost_few_bits(model: LoadedModel) -> None:
    records = [{"id": f"{n}", "label": "x", "text_en": "x", "image": png("red", 64)} for n in range(20)]
    examples, targets = training_examples(TASKS["text_to_image"], ListSource("s", records), 0, model.modalities)
    prior = fit_prior(TASKS["text_to_image"], examples, targets, model)
    noise = Part("image", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    near, far = prior.bits([], [targets[0], target_segment(noise, model.modalities)]) / targets[0].arrays["codes"].size
    assert near < 2 < 6 < far
