"""The library: forty scenarios and more, complete in both languages, with the prompts of their tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from openm6.core.errors import ConfigError
from openm6.data.sources import open_sources
from openm6.models.description import TrainedTask
from openm6.serve.scenarios.scenario import (
    FOLDER,
    LANGUAGES,
    PROMPTED,
    Scenario,
    read_library,
    read_scores,
    readiness,
)
from openm6.tasks.registry import TASKS
from openm6.train.run import read_recipe, recipe_path
from tests.small_model import loaded

LIBRARY = read_library()
ALL = LIBRARY.scenarios.values()
NAMED_IN_THE_PLAN = {
    "product_title", "selling_points", "live_script", "poem", "couplet", "caption", "alt_text", "visual_question",
    "product_matching", "attribute_extraction", "product_category", "review_sentiment", "review_summary",
    "price_prediction", "demand_forecast", "search_ranking", "recommendation", "design_sketch", "restyle",
    "fill_region", "background_replacement", "style_mix", "spoken_description", "transcription", "spoken_question",
    "audio_event", "table_question", "series_anomaly", "number_report",
}  # fmt: skip


def test_there_are_forty_and_the_promised_ones_are_among_them() -> None:
    assert len(ALL) >= 40 and set(LIBRARY.scenarios) >= NAMED_IN_THE_PLAN
    assert {scenario.output for scenario in ALL} == {
        "text",
        "image",
        "audio",
        "numbers",
        "ranking",
        "embedding",
    }


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_its_prompt_is_one_of_its_task(scenario: Scenario) -> None:
    for language in LANGUAGES:
        words = scenario.prompt.text(language)
        trained = [prompt for name in scenario.tasks for prompt in TASKS[name].prompts[language]]
        if scenario.output == "embedding":  # either side of a pair stands alone
            assert words in ("{text}", "{image}", "{audio}")
        else:
            assert words in trained
            outputs = {TASKS[name].output_modality for name in scenario.tasks}
            assert outputs == {"text" if scenario.output == "ranking" else scenario.output}


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_its_recipe_trains_its_tasks(scenario: Scenario) -> None:
    recipe, _ = read_recipe(recipe_path(scenario.recipe), [])
    assert recipe.kind == "multimodal"
    assert set(scenario.tasks) <= {component.task for component in recipe.mixture}


@pytest.mark.parametrize("name", sorted({scenario.recipe for scenario in ALL}))
def test_every_component_of_a_recipe_finds_what_it_needs(name: str) -> None:
    recipe, _ = read_recipe(recipe_path(name), [])
    assert recipe.kind == "multimodal"
    sources = open_sources(recipe.sources, "train")
    for component in recipe.mixture:
        first = (sources[component.source][row] for row in range(20))
        assert any(TASKS[component.task].languages(record) for record in first), component


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_it_speaks_both_languages(scenario: Scenario) -> None:
    titles = [
        scenario.title,
        scenario.summary,
        *(given.title for given in scenario.inputs.values() if given.title),
    ]
    for words in titles:
        assert any("\u4e00" <= letter <= "\u9fff" for letter in words.zh)
        assert not any("\u4e00" <= letter <= "\u9fff" for letter in words.en)
    assert any(given.kind in PROMPTED for given in scenario.inputs.values())


def test_a_model_that_lacks_a_task_names_the_recipe_that_trains_it() -> None:
    description = loaded(trained_tasks=(("text_to_image", "digits"),)).description
    assert readiness(LIBRARY.scenarios["illustration"], description).ready
    lacking = readiness(LIBRARY.scenarios["restyle"], description)
    assert not lacking.ready and lacking.missing == ("style_transfer",)
    assert lacking.text() == "needs training on style_transfer (openm6 train design)"
    assert "需要训练" in lacking.text("zh")


def test_a_column_that_was_never_seen_is_not_predicted() -> None:
    description = loaded().description.model_copy(update={"scales": {}})
    description = description.model_copy(
        update={"trained_tasks": [TrainedTask(task="price_prediction", source="shop")]}
    )
    assert readiness(LIBRARY.scenarios["price_prediction"], description).missing == ("the column price",)


def broken(change: dict[str, object], folder: Path) -> str:
    """What is said of a scenario with one thing changed."""
    values = yaml.safe_load((FOLDER / "writing.yaml").read_text(encoding="utf-8"))
    values["scenarios"] = [{**values["scenarios"][0], **change}]
    (folder / "mine.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_library(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": {"en": "A poem", "zh": "{title}"}}, "the en prompt must name"),
        ({"tasks": ["poem_generatio"]}, "did you mean 'poem_generation'"),
        ({"examples": {"en": {"title": "x"}}}, "the zh example must give"),
        ({"output": "numbers"}, "name the column that is predicted"),
        ({"output": "ranking"}, "a ranking needs candidates"),
        ({"decoding": {"text": {"temprature": 1}}}, "temperature"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_broken_file_is_one_sentence(change: dict[str, object], said: str, tmp_path: Path) -> None:
    words = broken(change, tmp_path)
    assert said in words and "mine.yaml" in words and "\n" not in words


def test_an_empty_folder_and_equal_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no scenarios"):
        read_library(tmp_path)
    text = (FOLDER / "speech.yaml").read_text(encoding="utf-8")
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="two scenarios in"):
        read_library(tmp_path)


CAPTION = LIBRARY.scenarios["caption"]
DESCRIPTION = loaded(trained_tasks=(("image_captioning", "emoji"),)).description


def entry(value: float | None, baseline: float, beats: bool = False) -> dict[str, Any]:
    return {"metric": "exact_match", "value": value, "baseline": baseline, "beats_baseline": beats}


def reported(folder: Path, tasks: Any) -> Path:
    """A checkpoint of a run with a report of these tasks."""
    (folder / "report.json").write_text(json.dumps({"tasks": tasks}), encoding="utf-8")
    return folder / "checkpoints" / "step-5"


@pytest.mark.parametrize(
    ("entries", "ready"),
    [
        ({"image_captioning/emoji": entry(0.021, 0.033)}, False),
        ({"image_captioning/emoji": entry(0.5, 0.033)}, False),  # not significant
        ({"image_captioning/emoji": entry(0.5, 0.033, beats=True)}, True),
        ({"image_captioning/a": entry(0.0, 0.1), "image_captioning/b": entry(0.5, 0.1, beats=True)}, True),
        ({"text_to_image/emoji": entry(0.021, 0.033)}, True),
        ({"image_captioning/emoji": entry(None, 0.033)}, True),
        ({"image_captioning/emoji": {}}, True),
        ({"image_captioning/emoji": "?"}, True),
        ([], True),
        ({}, True),
    ],
)
def test_ready_is_what_beats_its_baseline(entries: Any, ready: bool, tmp_path: Path) -> None:
    found = readiness(CAPTION, DESCRIPTION, read_scores(reported(tmp_path, entries)))
    assert found.ready is ready and found.trained


def test_the_scores_are_in_the_sentence_in_both_languages(tmp_path: Path) -> None:
    scores = read_scores(reported(tmp_path, {"image_captioning/emoji": entry(0.021, 0.033)}))
    found = readiness(CAPTION, DESCRIPTION, scores)
    said = found.text().replace("\u00a0", " ")
    assert said == "trained, but not better than its baseline: 2.1 % exact match against 3.3 %"
    assert "不优于基线" in found.text("zh")
    assert found.trained and not found.ready  # it may be asked all the same


def test_without_a_report_nothing_is_doubted(tmp_path: Path) -> None:
    assert read_scores(tmp_path / "checkpoints" / "step-5") == {}
    (tmp_path / "report.json").write_text("no JSON", encoding="utf-8")
    assert read_scores(tmp_path / "checkpoints" / "step-5") == {}
