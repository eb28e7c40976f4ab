"""An example is shown where the model was trained on such data, and the page opens on something that works."""

from __future__ import annotations

from typing import Any

import pytest

from openm6.models.description import Lesson, ModelDescription
from openm6.serve.scenarios.ask import example_fits
from openm6.serve.scenarios.scenario import LANGUAGES, Scenario, read_catalogue
from openm6.train.run import read_recipe, recipe_path
from tests.small_model import loaded

CATALOGUE = read_catalogue()
EMOJI = {"kind": "embedded", "name": "emoji"}
OWN = {"kind": "csv", "path": "shop.csv"}


def trained(
    lessons: tuple[tuple[str, str], ...], sources: dict[str, Any], **scales: float
) -> ModelDescription:
    return loaded().description.model_copy(
        update={
            "lessons": [Lesson(task=task, source=source) for task, source in lessons],
            "sources": sources,
            "scales": dict.fromkeys(scales, (0.0, 1.0)),
        }
    )


@pytest.mark.parametrize("scenario", CATALOGUE.scenarios.values(), ids=lambda scenario: scenario.name)
def test_each_example_fits_the_recipe_of_its_scenario(scenario: Scenario) -> None:
    recipe, values = read_recipe(recipe_path(scenario.recipe), [])
    assert recipe.kind == "multimodal"
    lessons = tuple((lecture.task, lecture.source) for lecture in recipe.mixture)
    columns = {
        column: 1.0
        for example in scenario.examples.values()
        for name, given in scenario.inputs.items()
        if given.kind in ("numbers", "series")
        for column in ([example[name]["name"]] if given.kind == "series" else example[name])
    }
    description = trained(lessons, values["sources"], **columns)
    assert all(example_fits(scenario, language, description) for language in LANGUAGES)


@pytest.mark.parametrize(
    ("name", "lessons", "sources", "scales"),
    [
        ("missing_measurement", (("predict_number", "own"),), {"own": OWN}, {"price": 1.0}),
        ("weather_forecast", (("forecast", "own"),), {"own": OWN}, {"sales": 1.0}),
        ("caption", (("describe_picture", "own"),), {"own": {"kind": "folder", "path": "photos"}}, {}),
        ("illustration", (("draw", "own"),), {"own": OWN}, {}),
        # The data of the package, but of another task.
        ("illustration", (("draw", "own"), ("translate", "e")), {"own": OWN, "e": EMOJI}, {}),
    ],
)  # fmt: skip
def test_data_of_ones_own_has_no_such_example(
    name: str, lessons: tuple[tuple[str, str], ...], sources: dict[str, Any], scales: dict[str, float]
) -> None:
    description = trained(lessons, sources, **scales)
    assert not example_fits(CATALOGUE.named(name), "en", description)


def test_a_checkpoint_that_does_not_name_its_sources_is_not_doubted() -> None:
    assert example_fits(CATALOGUE.named("illustration"), "en", loaded().description)
