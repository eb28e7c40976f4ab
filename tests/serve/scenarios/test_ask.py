"""Scenarios as requests: the parts are those that training showed, and broken inputs are one sentence."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from openm6.core.errors import ConfigError, DataError
from openm6.data.prepare import with_negatives
from openm6.modalities.interface import Part
from openm6.models.description import CheckpointConfig, TrainedTask
from openm6.serve.content import text_prompt
from openm6.serve.requests import CodesRequest, EmbedRequest, NumbersRequest, RankRequest, TextRequest
from openm6.serve.scenarios.run import (
    example_fits,
    example_record,
    example_values,
    scenario_request,
)
from openm6.serve.scenarios.scenario import LANGUAGES, Scenario, read_library
from openm6.tasks.registry import TASKS
from openm6.train.run import read_recipe, recipe_path
from tests.data.sample_images import png
from tests.small_model import demo_sources, loaded

LIBRARY = read_library()
ALL = LIBRARY.scenarios.values()
REQUESTS = {
    "text": TextRequest,
    "image": CodesRequest,
    "audio": CodesRequest,
    "numbers": NumbersRequest,
    "ranking": RankRequest,
    "embedding": EmbedRequest,
}


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_every_example_becomes_a_request(scenario: Scenario) -> None:
    for language in LANGUAGES:
        request = scenario_request(scenario, language, example_values(scenario, language), seed=5)
        assert isinstance(request, REQUESTS[scenario.output]) and request.parts
        kinds = [part.modality for part in request.parts]
        assert all(a != b or a != "text" for a, b in pairwise(kinds))
        if isinstance(request, TextRequest | CodesRequest):
            assert request.sampling.seed == 5
        if isinstance(request, TextRequest):
            few = scenario_request(scenario, language, example_values(scenario, language), max_tokens=3)
            assert isinstance(few, TextRequest) and few.sampling.max_tokens == 3 < request.sampling.max_tokens


def test_the_parts_are_those_of_training() -> None:
    """A record through the task, and the same fields through the scenario."""
    shop, rng = demo_sources()["shop"], np.random.default_rng(0)
    record = with_negatives(shop[4], shop, rng)
    title, tags = record["text_en"], ", ".join(record["tags_en"])
    for name, values in {
        "product_title": {"image": record["image"], "tags": tags},
        "attribute_extraction": {"image": record["image"], "title": title},
        "live_script": {"title": title, "selling_points": record["extra"]["selling_points_en"]},
        "price_prediction": {"image": record["image"], "title": title},
    }.items():
        scenario = LIBRARY.scenarios[name]
        example = TASKS[scenario.tasks[0]].example(record, np.random.default_rng(1), language="en")
        assert list(scenario_request(scenario, "en", values).parts) == example.source


def test_the_prompt_of_a_route_is_that_of_training() -> None:
    record, model = {"id": "1", "text_en": "a kite", "image": png()}, loaded(trained_tasks=(("text_to_image", "x"),))
    example = TASKS["text_to_image"].example(record, np.random.default_rng(1))
    assert list(text_prompt(model, "text_to_image", "a kite")) == example.source
    assert text_prompt(model, "text_to_image", "draw a kite") == (Part("text", "draw a kite"),)


def test_a_masked_span_of_audio_has_the_form_of_training() -> None:
    record = demo_sources()["spoken"][2]
    example = TASKS["audio_inpainting"].example(record, np.random.default_rng(1))
    audio = next(part for part in example.source if part.modality == "audio")
    values = {"audio": record["audio"], "mask_span": audio.options["mask_span"]}
    request = scenario_request(LIBRARY.scenarios["repair_audio"], "en", values)
    assert isinstance(request, CodesRequest) and request.span == audio.options["mask_span"]
    asked = next(part for part in request.parts if part.modality == "audio")
    assert asked.options == {"mask_span": audio.options["mask_span"]} and "seconds" not in audio.options
    assert request.duration is None and request.source == record["audio"]


def test_the_number_wanted_is_not_read() -> None:
    scenario = LIBRARY.scenarios["missing_measurement"]
    parts = scenario_request(scenario, "en", {"numbers": {"bill_length_mm": 40.0, "body_mass_g": 4000.0}}).parts
    assert Part("numbers", {"bill_length_mm": 40.0}) in parts
    assert parts[-1].raw == " What is its body mass g?"


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("couplet", {}, "needs the input 'line'"),
        ("couplet", {"line": ""}, "needs the input 'line'"),
        ("couplet", {"lines": "x"}, "did you mean 'line'"),
        ("couplet", {"line": 3}, "must be a text"),
        ("caption", {"image": "x"}, "must be the bytes of an image"),
        ("fill_region", {"image": b"x", "mask_box": [0.5, 0, 0.2, 1]}, "four fractions"),
        ("fill_region", {"image": b"x", "mask_box": [0, 0, 1]}, "four fractions"),
        ("fill_region", {"image": b"x", "mask_box": [0, 0, True, 1]}, "four fractions"),
        ("repair_audio", {"audio": b"x", "mask_span": [0.1, 1.5]}, "two fractions"),
        ("repair_audio", {"audio": b"x", "mask_span": b"\x00\x01"}, "two fractions"),
        ("repair_audio", {"audio": b"x", "mask_span": [None, 0.5]}, "two fractions"),
        ("weather_forecast", {"series": {"name": "x", "values": ["a"]}}, "a name and values"),
        ("machine_state", {"numbers": {"a": ["b"]}}, "values by column"),
        ("search_ranking", {"query": "x", "candidates": ["a", ""]}, "a list of texts"),
    ],
)
def test_broken_inputs_are_one_sentence(name: str, values: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        scenario_request(LIBRARY.scenarios[name], "en", values)


def test_an_example_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="emoji#nothing"):
        example_record("emoji#nothing")


EMOJI = {"kind": "embedded", "name": "emoji"}
OWN = {"kind": "csv", "path": "shop.csv"}


def trained(trained_tasks: tuple[tuple[str, str], ...], sources: dict[str, Any], **scales: float) -> CheckpointConfig:
    return loaded().description.model_copy(
        update={
            "trained_tasks": [TrainedTask(task=task, source=source) for task, source in trained_tasks],
            "sources": sources,
            "scales": dict.fromkeys(scales, (0.0, 1.0)),
        }
    )


@pytest.mark.parametrize("scenario", LIBRARY.scenarios.values(), ids=lambda scenario: scenario.name)
def test_each_example_fits_the_recipe_of_its_scenario(scenario: Scenario) -> None:
    recipe, values = read_recipe(recipe_path(scenario.recipe), [])
    assert recipe.kind == "multimodal"
    trained_tasks = tuple((component.task, component.source) for component in recipe.mixture)
    columns = {
        column: 1.0
        for example in scenario.examples.values()
        for name, given in scenario.inputs.items()
        if given.kind in ("numbers", "series")
        for column in ([example[name]["name"]] if given.kind == "series" else example[name])
    }
    description = trained(trained_tasks, values["sources"], **columns)
    assert all(example_fits(scenario, language, description) for language in LANGUAGES)


@pytest.mark.parametrize(
    ("name", "trained_tasks", "sources", "scales"),
    [
        ("missing_measurement", (("tabular_regression", "own"),), {"own": OWN}, {"price": 1.0}),
        ("weather_forecast", (("forecast", "own"),), {"own": OWN}, {"sales": 1.0}),
        ("caption", (("image_captioning", "own"),), {"own": {"kind": "folder", "path": "photos"}}, {}),
        ("illustration", (("text_to_image", "own"),), {"own": OWN}, {}),
        # The data of the package, but of another task.
        ("illustration", (("text_to_image", "own"), ("translate", "e")), {"own": OWN, "e": EMOJI}, {}),
    ],
)  # fmt: skip
def test_data_of_ones_own_has_no_such_example(
    name: str, trained_tasks: tuple[tuple[str, str], ...], sources: dict[str, Any], scales: dict[str, float]
) -> None:
    description = trained(trained_tasks, sources, **scales)
    assert not example_fits(LIBRARY.scenarios[name], "en", description)


def test_a_checkpoint_that_does_not_name_its_sources_is_not_doubted() -> None:
    assert example_fits(LIBRARY.scenarios["illustration"], "en", loaded().description)
