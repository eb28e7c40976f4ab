"""What the page opens with, and what it fills in, for models that were trained on other things."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("gradio", reason="the extra [serve] is not installed")

from openm6.models.description import CheckpointConfig
from openm6.serve.playground.page import Page
from openm6.serve.scenarios.scenario import Score, Scores
from openm6.serve.server import Server
from tests.serve.scenarios.test_ask import EMOJI, OWN, trained
from tests.small_model import loaded


def page(description: CheckpointConfig, scores: Scores | None = None) -> Page:
    model = replace(loaded(), description=description)
    return Page(cast(Server, SimpleNamespace(loaded=model, scores=scores or {})))


def values(updates: list[Any]) -> list[Any]:
    return [update["value"] for update in updates[1:] if update["visible"]]


def test_it_opens_on_an_example_that_fits() -> None:
    trained_tasks = (("tabular_regression", "own"), ("image_captioning", "emoji"))
    found = page(trained(trained_tasks, {"own": OWN, "emoji": EMOJI}, price=1.0, body_mass_g=1.0))
    first = found.first_scenario()
    assert first.tasks == ["image_captioning"] and found.opening_tab(first) == "scenarios"
    assert all(value is not None for value in values(found.choose_scenario(first.name, "en")))


def test_what_does_not_fit_is_shown_empty_with_a_word() -> None:
    found = page(trained((("tabular_regression", "own"),), {"own": OWN}, price=1.0, body_mass_g=1.0))
    shown = found.choose_scenario("missing_measurement", "en")
    assert "give inputs of your own" in shown[0] and values(shown) == [None]
    assert "请自行输入" in found.choose_scenario("missing_measurement", "zh")[0]


def test_a_task_below_its_baseline_is_not_what_it_opens_with() -> None:
    trained_tasks = (("image_captioning", "emoji"), ("text_to_image", "emoji"))
    weak = {"image_captioning": [Score("exact_match", 0.021, 0.033, False)]}
    found = page(trained(trained_tasks, {"emoji": EMOJI}), weak)
    assert found.first_scenario().tasks == ["text_to_image"]
    assert "not better than its baseline" in found.choose_scenario("caption", "en")[0]


def test_a_model_without_any_scenario_opens_on_free_questions() -> None:
    found = page(trained((("count", "own"),), {"own": OWN}))
    assert found.opening_tab(found.first_scenario()) == "freely"
