"""What the page opens with, and what it fills in, for models that were trained on other things."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest

pytest.importorskip("gradio", reason="the extra [serve] is not installed")

import gradio

from openm6.models.description import CheckpointConfig
from openm6.serve.playground.page import Page
from openm6.serve.requests import QueueFullError
from openm6.serve.scenarios.run import Example
from openm6.serve.scenarios.scenario import Scenario, Score, Scores, library_of, read_library
from openm6.serve.server import Server
from tests.serve.scenarios.test_ask import EMOJI, OWN, trained
from tests.small_model import loaded


def page(description: CheckpointConfig, scores: Scores | None = None) -> Page:
    model = replace(loaded(), description=description)
    return Page(cast(Server, SimpleNamespace(loaded=model, library=read_library(), scores=scores or {})))


def best(page: Page) -> Scenario:
    return page.best(list(page.library.scenarios.values()))


def opening_tab(page: Page) -> object:
    [tabs] = (block for block in page.build().blocks.values() if isinstance(block, gradio.Tabs))
    return tabs.selected


def test_it_opens_on_an_example_that_fits() -> None:
    trained_tasks = (("tabular_regression", "own"), ("image_captioning", "emoji"))
    found = page(trained(trained_tasks, {"own": OWN, "emoji": EMOJI}, price=1.0, body_mass_g=1.0))
    first = best(found)
    assert first.tasks == ["image_captioning"] and opening_tab(found) == "scenarios"
    assert found.fits(first, "en")


def test_an_example_that_does_not_fit_is_left_out_with_a_sentence() -> None:
    found = page(trained((("tabular_regression", "own"),), {"own": OWN}, price=1.0, body_mass_g=1.0))
    scenario = found.library.scenarios["missing_measurement"]
    assert not found.fits(scenario, "en") and "give inputs of your own" in found.about(scenario, "en")
    assert "请自行输入" in found.about(scenario, "zh")


def test_an_own_task_that_is_not_trained_has_no_example() -> None:
    own = {"look": {"inputs": {"image": "image"}, "target": {"category": "kind"}, "prompts": {"en": "{image} kind?"}}}
    description = trained((("image_captioning", "emoji"),), {"emoji": EMOJI}).model_copy(update={"tasks": own})
    found = page(description)
    found.library = library_of(description)
    scenario = found.library.scenarios["look"]
    assert not found._readiness(scenario).trained and not found.fits(scenario, "en")


def test_a_task_below_its_baseline_is_not_what_it_opens_with() -> None:
    trained_tasks = (("image_captioning", "emoji"), ("text_to_image", "emoji"))
    weak = {"image_captioning": [Score("exact_match", 0.021, 0.033, False)]}
    found = page(trained(trained_tasks, {"emoji": EMOJI}), weak)
    assert best(found).tasks == ["text_to_image"]
    assert "not better than its baseline" in found.about(found.library.scenarios["caption"], "en")


def test_a_model_without_any_scenario_opens_on_free_questions() -> None:
    found = page(trained((("count", "own"),), {"own": OWN}))
    assert opening_tab(found) == "freely"


def test_inputs_are_read_as_those_of_the_scenario_that_they_were_made_for() -> None:
    """If the browser named the scenario, the content of a text box could be read as the path of a file."""
    found = page(trained((("image_captioning", "emoji"),), {"emoji": EMOJI}))
    with found.build() as blocks:
        found._show_scenario("caption", "en")
    runs = [one for one in blocks.fns.values() if isinstance(one.fn, partial)]
    assert [one.fn.args for one in runs] == [(found.library.scenarios["caption"],)]
    assert found.scenario not in runs[0].inputs


def test_a_card_chooses_its_scenario_and_example() -> None:
    found = page(trained((("image_captioning", "emoji"),), {"emoji": EMOJI}))
    found.build()
    event = cast(gradio.EventData, SimpleNamespace(name="caption", index=1))
    domain, chosen, picked = found.choose_card("en", event)
    assert (domain, chosen["value"], picked) == ("images", "caption", ("caption", 1))


def test_the_gallery_grows_card_by_card_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    async def card(server: Server, example: Example) -> str:
        made.append(example.scenario.name)
        await asyncio.sleep(0)
        return f"<{example.scenario.name}>"

    monkeypatch.setattr("openm6.serve.playground.page.make_card", card)
    found = page(trained((("image_captioning", "emoji"),), {"emoji": EMOJI}))

    async def visits() -> list[list[str]]:
        return [[shown async for shown in found.show_cards("en")] for _ in range(2)]

    first, second = asyncio.run(visits())
    assert first[-1] == second[-1] == "<caption><alt_text>" and second == ["<caption><alt_text>"]
    assert made == ["caption", "alt_text"]


def test_the_gallery_follows_the_language_also_while_it_is_made() -> None:
    blocks = page(trained((("image_captioning", "emoji"),), {"emoji": EMOJI})).build()
    [shown] = [one for one in blocks.fns.values() if one.name == "show_cards"]
    assert len(shown.targets) == 2 and shown.trigger_mode == "always_last"


def test_a_card_that_a_full_server_refuses_is_left_to_the_next_visitor(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[object] = ["<one>", QueueFullError("the queue is full", 1), "<two>"]

    async def card(server: Server, example: Example) -> object:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr("openm6.serve.playground.page.make_card", card)
    found = page(trained((("image_captioning", "emoji"),), {"emoji": EMOJI}))

    async def visits() -> list[list[str]]:
        return [[shown async for shown in found.show_cards("en")] for _ in range(2)]

    first, second = asyncio.run(visits())
    assert first[-1] == "<one>" and second[-1] == "<one><two>"


def test_an_example_that_a_model_brings_fits_also_in_another_form() -> None:
    description = trained((("record_regression", "own"),), {"own": OWN}, price=1.0)
    found = page(description)
    brought = {"own_examples": [{"en": {"numbers": {"price": 1.0}}}]}
    scenario = library_of(description).scenarios["price_prediction"].model_copy(update=brought)
    assert scenario.tasks == ["record_regression"] and found.fits(scenario, "en") and not found.fits(scenario, "zh")
