"""Baselines against direct computation, and what becomes of broken training records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from openm6.evaluate.baselines import baseline_value, point_predictions, spreads, training_examples
from openm6.evaluate.metrics import Scored
from openm6.generate.load import Loaded
from openm6.modalities.interface import Part
from openm6.modalities.numbers import NumberSeries
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Example
from tests.data.lists import ListSource
from tests.data.pictures import png
from tests.small_model import SCALES, demo_sources, loaded


@pytest.fixture(scope="module")
def model() -> Loaded:
    return loaded()


def text(answer: str, language: str = "en") -> Example:
    return Example("name_picture", language, [], Part("text", answer), answer, answer)


def number(raw: Any, source: list[Part] | None = None) -> Example:
    return Example("predict_number", "en", source or [], Part("numbers", raw), raw, "x")


def test_the_most_frequent_answer_of_the_language(model: Loaded) -> None:
    train = [text("cat")] * 3 + [text("dog")] * 2 + [text("猫", "zh")] * 5
    test = [text("cat"), text("dog"), text("猫", "zh"), text("狗", "zh")]
    scored = Scored(test, ["?"] * 4)
    assert baseline_value(TASKS["name_picture"], "exact_match", scored, train, model) == 0.5
    assert baseline_value(TASKS["name_picture"], "exact_match", scored, train[:5], model) == 0.25
    assert baseline_value(TASKS["name_picture"], "exact_match", scored, [], model) == 0.0


def test_a_column_is_guessed_by_its_median(model: Loaded) -> None:
    examples = [number({"mass": 3.0}), number({"length": 5.0})]
    found = point_predictions(TASKS["predict_number"], examples, model)
    assert [float(v[0]) for v in found] == [SCALES["mass"][0], SCALES["length"][0]]
    assert [float(v[0]) for v in spreads(examples, model)] == [SCALES["mass"][1], SCALES["length"][1]]


def test_a_series_is_guessed_by_its_last_value(model: Loaded) -> None:
    past = [Part("text", "x"), Part("numbers", NumberSeries("temp_max", [5.0, 7.0, None]))]
    example = number(NumberSeries("temp_max", [8.0, None, 9.0]), past)
    (found,) = point_predictions(TASKS["forecast"], [example], model)
    assert found.tolist() == [7.0, 7.0], "one prediction for each truth that is there"
    (spread,) = spreads([example], model)
    assert spread.tolist() == [SCALES["temp_max"][1]] * 2


def test_numbers_are_measured_in_units_of_their_baseline(model: Loaded) -> None:
    scored = Scored([number({"mass": 3.0})], [])
    assert baseline_value(TASKS["predict_number"], "crps_share", scored, [], model) == 1.0


def test_frequent_codes_cost_few_bits(model: Loaded) -> None:
    records = [{"id": f"{n}", "label": "x", "text_en": "x", "image": png("red", 64)} for n in range(20)]
    task = TASKS["draw"]
    train = training_examples(task, ListSource("s", records), 0, model.modalities)
    assert len(train) == 20
    like = Scored([train[0]], [])
    rng = np.random.default_rng(0)
    noise = Example(
        "draw", "en", [], Part("image", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "x", "x"
    )
    near = baseline_value(task, "code_bits", like, train, model)
    far = baseline_value(task, "code_bits", Scored([noise], []), train, model)
    # 20 pictures of 64 places, add-half smoothing over 1000 codes.
    assert near < 6 < far <= -np.log2(0.5 / (20 * 64 + 500)) + 1e-6


def test_code_bits_against_direct_counting(model: Loaded) -> None:
    source, task = demo_sources()["digits"], TASKS["draw"]
    train = [task.example(source[n], np.random.default_rng(0)) for n in range(12)]
    test = [task.example(source[n], np.random.default_rng(0)) for n in (20, 30)]

    def codes(example: Example) -> np.ndarray:
        return model.image.encode(example.target.raw).astype(int)

    size, total = model.image.codec.codebook_size, []
    for example in test:
        for group in range(model.image.codec.groups):
            seen = np.concatenate([codes(e)[:, group] for e in train])
            for code in codes(example)[:, group]:
                total.append(-np.log2(((seen == code).sum() + 0.5) / (len(seen) + 0.5 * size)))
    found = baseline_value(task, "code_bits", Scored(test, []), train, model)
    assert found == pytest.approx(np.mean(total))


def test_broken_training_records_are_left_out(model: Loaded) -> None:
    good = {"id": "a", "label": "x", "text_en": "x", "image": png()}
    source = ListSource("s", [good, None, {**good, "image": b"broken"}, {"id": "b"}])
    assert [e.record_id for e in training_examples(TASKS["draw"], source, 0, model.modalities)] == ["a"]


def test_a_baseline_that_does_not_exist_is_not_a_number(model: Loaded) -> None:
    assert np.isnan(baseline_value(TASKS["draw"], "recognised", Scored([], []), [], model))
