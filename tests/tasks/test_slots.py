"""Fields kept beside the known ones are found in their language."""

from __future__ import annotations

import numpy as np
import pytest

from openm6.tasks.own import TaskConfig
from openm6.tasks.registry import TASKS
from openm6.tasks.slots import localised

RECORD = {"id": "1", "label": "cup", "extra": {"review_en": "good", "review_zh": "好", "note": "fine", "备": "好"}}


@pytest.mark.parametrize(
    ("name", "language", "found"),
    [
        ("review", "en", "good"),
        ("review", "zh", "好"),
        ("note", "en", "fine"),
        ("note", "zh", None),
        ("备", "zh", "好"),
        ("备", "en", None),
        ("absent", "en", None),
        ("label", "en", "cup"),
        ("label", "zh", None),
    ],
)
def test_a_field_is_found_in_its_language(name: str, language: str, found: str | None) -> None:
    assert localised(RECORD, name, language) == found


def test_a_plain_table_in_one_language_can_pose_a_shop_task() -> None:
    table = {"id": "1", "extra": {"review": "The seams are loose.", "sentiment": "negative"}}
    task = TASKS["sentiment_analysis"]
    assert task.languages(table) == ["en"]
    assert task.example(table, np.random.default_rng(0)).answer == "negative"


def test_a_column_of_another_language_is_a_label_of_its_own() -> None:
    extra = {"review_zh": "好用", "review_en": "good", "sentiment_zh": "好评", "sentiment_en": "positive"}
    task = TASKS["sentiment_analysis"]
    record, rng = {"id": "1", "extra": extra}, np.random.default_rng(0)
    for language, column in (("en", "sentiment"), ("zh", "sentiment_zh")):
        assert task.example(record, rng, language=language).target.options["column"] == column


def test_a_definition_has_the_bound_of_its_task() -> None:
    record = {"id": "1", "label": "cup", "text_en": "cup: a thing to drink from"}
    target = TASKS["definition_generation"].example(record, np.random.default_rng(0), language="en").target
    assert target.raw == "a thing to drink from" and target.options["max_tokens"] == 256


@pytest.mark.parametrize(
    ("value", "answer"), [(0, "0"), (False, "False"), (1, "1"), ("", None), (None, None), ([], None)]
)
def test_zero_and_false_are_answers(value: object, answer: str | None) -> None:
    own = TaskConfig.model_validate(
        {"inputs": {"text": "text"}, "target": {"text": "mood"}, "prompts": {"en": "{text}"}}
    )
    record = {"id": "1", "text_en": "so so", "extra": {"mood": value}}
    task = own.task("mood_of")
    assert task.languages(record) == ([] if answer is None else ["en"])
    assert answer is None or task.example(record, np.random.default_rng(0)).answer == answer


@pytest.mark.parametrize("name", ["time_series_forecasting", "demand_forecasting"])
def test_a_series_is_forecast_where_its_horizon_is_known(name: str) -> None:
    record = {"id": "1", "series": {"sales": [3.0, 4.0, 5.0, 6.0]}}
    assert TASKS[name].languages(record) == TASKS[name].languages(record | {"extra": {"shop": "x"}}) == []
    assert TASKS[name].languages(record | {"extra": {"horizon": 2}}) == ["en", "zh"]
