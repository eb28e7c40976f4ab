"""The library: forty scenarios and more, complete in both languages, with the prompts of their tasks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from openm6.core.errors import ConfigError
from openm6.data.sources import open_sources
from openm6.models.description import CheckpointConfig, TrainedTask
from openm6.serve.scenarios.scenario import (
    FOLDER,
    LANGUAGES,
    PROMPTED,
    Scenario,
    ScenarioLibrary,
    library_of,
    read_library,
    read_scores,
    readiness,
)
from openm6.tasks.registry import TASKS
from openm6.train.run import read_recipe, recipe_path
from tests.small_model import loaded

LIBRARY = read_library()
# The words of a caption of line drawings in the corpus of the recipe mini, see tools/mini/images.py.
LINES = (", Tabler outline icon", "，Tabler线框图标")
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


def without(prompt: str, left_out: set[str]) -> str:
    """A prompt of a task whose inputs are optional, without some of them."""
    return re.sub(r"\{(\w+)\} ?", lambda slot: "" if slot[1] in left_out else slot[0], prompt)


@pytest.mark.parametrize("scenario", [form for one in ALL for form in one.forms()], ids=lambda scenario: scenario.name)
def test_its_prompt_is_one_of_its_task(scenario: Scenario) -> None:
    for language in LANGUAGES:
        words = scenario.prompt.text(language)
        tasks = [TASKS[name] for name in scenario.tasks]
        lacking = {name for task in tasks if task.optional for name in task.inputs} - set(scenario.inputs)
        trained = [without(prompt, lacking) for task in tasks for prompt in task.prompts[language]]
        if scenario.data == "things.parquet":
            # The style is a part of the text.
            trained = [prompt.replace("{text}", f"{{text}}{style}") for prompt in trained for style in LINES]
        if scenario.output == "embedding":  # either side of a pair stands alone
            assert words in ("{text}", "{image}", "{audio}")
        else:
            assert words in trained
            outputs = {TASKS[name].output_modality for name in scenario.tasks}
            assert outputs == {"text" if scenario.output == "ranking" else scenario.output}


@pytest.mark.parametrize("scenario", [one for one in ALL if one.variants], ids=lambda scenario: scenario.name)
def test_a_variant_leaves_the_same_decoding_to_the_model(scenario: Scenario) -> None:
    for form in scenario.forms():
        assert form.decoding.masked.model_fields_set == scenario.decoding.masked.model_fields_set


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
    # The metric is better, the likelihood is not.
    scores = read_scores(
        reported(tmp_path, {"image_captioning/emoji": entry(0.5, 0.033) | {"advantage_ci": [0.4, 0.5]}})
    )
    found = readiness(CAPTION, DESCRIPTION, scores)
    assert "its inputs do not improve its probabilities" in found.text() and not found.ready


def test_without_a_report_nothing_is_doubted(tmp_path: Path) -> None:
    assert read_scores(tmp_path / "checkpoints" / "step-5") == {}
    (tmp_path / "report.json").write_text("no JSON", encoding="utf-8")
    assert read_scores(tmp_path / "checkpoints" / "step-5") == {}


# Columns that the tasks of a recipe predict, as a checkpoint records them.
COLUMNS = {
    "digits": ["digit"],
    "spoken": ["digit"],
    "penguins": ["bill_length_mm", "body_mass_g"],
    "instruments": ["pitch"],
    "cities": ["latitude", "longitude", "people"],
    "diamonds": ["carat", "depth", "price"],
    "homes": ["median", "sales"],
    "lives": ["people"],
    "cars": ["city mpg"],
    "films": ["minutes"],
    "country_table": ["population"],
    "element_table": ["density"],
}


def described(name: str) -> CheckpointConfig:
    """The description of a model that was trained by a shipped recipe."""
    recipe, values = read_recipe(recipe_path(name), [])
    assert recipe.kind == "multimodal"
    numbers = [one for one in recipe.mixture if recipe.task(one.task).output_modality == "numbers"]
    columns = {(one.task, one.source): COLUMNS.get(one.source, []) for one in numbers}
    tasks = [
        TrainedTask(task=one.task, source=one.source, columns=columns.get((one.task, one.source), []))
        for one in recipe.mixture
    ]
    scales = {column: (0.0, 1.0) for names in COLUMNS.values() for column in names}
    changes = {"trained_tasks": tasks, "sources": values["sources"], "scales": scales, "tasks": values.get("tasks", {})}
    return loaded().description.model_copy(update=changes)


def ready(description: CheckpointConfig) -> tuple[ScenarioLibrary, set[str]]:
    library = library_of(description)
    return library, {name for name, one in library.scenarios.items() if readiness(one, description).ready}


def test_thirty_scenarios_are_ready_with_the_recipe_mini_and_no_others() -> None:
    description = described("mini")
    library, found = ready(description)
    assert len(found & set(LIBRARY.scenarios)) >= 30
    own = {"style_recognition", "play_note", "fact_recall", "kinship_term"}
    assert found - set(LIBRARY.scenarios) == own
    # What it was never trained on.
    assert not found & {"restyle", "review_sentiment", "question_answering", "product_title", "number_report"}
    assert library.scenarios["spoken_number"].column == "pitch"
    assert library.scenarios["price_prediction"].tasks == ["record_regression"]
    pairs = {(one.input_modality, one.output) for name, one in library.scenarios.items() if name in found}
    assert len(pairs) == 16


def test_a_model_of_one_weather_series_forecasts_no_sales() -> None:
    library, found = ready(described("demo"))
    assert "weather_forecast" in found
    assert not found & {"demand_forecast", "price_prediction", "design_sketch"}
    assert library.scenarios["spoken_number"].column == "digit"


def test_a_column_that_another_task_predicts_does_not_count() -> None:
    description = described("mini")
    tasks = [one for one in description.trained_tasks if one.source != "diamonds"]
    found = ready(description.model_copy(update={"trained_tasks": tasks}))[1]
    assert "price" in description.scales and "price_prediction" not in found


def test_a_trained_task_that_the_library_lacks_has_a_scenario_of_its_own() -> None:
    trained = [TrainedTask(task="record_regression", source="own", columns=["rent"])]
    description = loaded().description.model_copy(update={"trained_tasks": trained, "scales": {"rent": (0.0, 1.0)}})
    library, found = ready(description)
    scenario = library.scenarios["record_regression"]
    assert scenario.column == "rent" and library.domain_of["record_regression"] == "own"
    assert found == {"record_regression"} and all(given.optional for given in scenario.inputs.values())


def test_a_task_that_asks_for_a_category_that_is_not_recorded_has_none() -> None:
    trained = [TrainedTask(task="record_classification", source="own")]
    description = loaded().description.model_copy(update={"trained_tasks": trained})
    assert "record_classification" not in ready(description)[0].scenarios


def test_a_report_beside_the_weights_counts_too(tmp_path: Path) -> None:
    reported(tmp_path, {"image_captioning/emoji": entry(0.021, 0.033)})
    assert not readiness(CAPTION, DESCRIPTION, read_scores(tmp_path)).ready
