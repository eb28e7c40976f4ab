"""Of several sources with labels, each record is answered with the classes of its own source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from openm6.api.frames import predict
from openm6.core.config import build
from openm6.core.run_folder import RunFolder
from openm6.data.source import Source
from openm6.evaluate.answers import answer, build_examples
from openm6.inference.load import LoadedModel
from openm6.inference.question import Question, answer_questions
from openm6.inference.sampling import Decoding, MaskedSampling
from openm6.modalities.simple_predictors import TablePredictors, from_bytes, to_bytes
from openm6.models.description import TrainedTask
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Example
from openm6.train.multimodal_data import table_predictors
from openm6.train.recipe import MultimodalRecipe
from openm6.train.start import open_start
from tests.data.lists import ListSource
from tests.small_model import loaded

TASK = "tabular_classification"
# The last ones are too many for simple predictors.
CLASSES = {"first": ["a", "b"], "second": ["c", "d"], "third": [f"class {number}" for number in range(60)]}
CONFIGS: dict[str, dict[str, Any]] = {
    name: {"kind": "jsonl", "path": "unread", "fields": {"numbers": ["mass", "length"], "label": f"{name}_label"}}
    for name in CLASSES
}
SOURCES: dict[str, Source] = {
    name: ListSource(name, [{"numbers": {"mass": float(n), "length": n % 7.0}, "label": classes[n * len(classes) // 60]}
                            for n in range(60)])
    for name, classes in CLASSES.items()
}  # fmt: skip


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[TablePredictors]:
    values = {
        "sources": CONFIGS,
        "mixture": [{"source": name, "task": TASK} for name in CLASSES],
        "modalities": {"numbers": {"predictors": "ridge"}},
    }
    recipe, run = build(MultimodalRecipe, values, "r.yaml"), RunFolder(tmp_path_factory.mktemp("run"))
    return from_bytes(to_bytes(from_bytes(table_predictors(recipe, SOURCES, run), "fitted")), "written again")


@pytest.fixture
def model(tables: list[TablePredictors], monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """An untrained model with these predictors, as if it had been trained on all sources."""
    plain = loaded()
    monkeypatch.setattr(plain.numbers, "predictors", tables)
    return with_sources(plain, *CLASSES)


def with_sources(model: LoadedModel, *names: str) -> LoadedModel:
    trained = [TrainedTask(task=TASK, source=name) for name in names]
    kept = {"sources": CONFIGS, "trained_tasks": trained}
    return replace(model, description=model.description.model_copy(update=kept))


def examples(source: str) -> list[Example]:
    return build_examples(TASKS[TASK], SOURCES[source], 4, (0, "any"), lambda one: one)[0]


def test_records_have_the_predictors_of_their_source_if_it_has_any(model: LoadedModel) -> None:
    for name, classes in CLASSES.items():
        found = [model.numbers.label_predictions(example.target.options) for example in examples(name)]
        assert [one and one.classes for one in found] == [None if name == "third" else classes] * 4
    assert {*answer(model, examples("second"), MaskedSampling())} <= {"c", "d"}
    assert not {*answer(model, examples("third"), MaskedSampling())} & {"a", "b", "c", "d"}


def test_a_table_is_that_of_the_source_with_its_columns(model: LoadedModel) -> None:
    frame = pd.DataFrame({"mass": [9.0, 50.0], "length": [2.0, 1.0]})
    for name in ("first", "second"):
        assert {*predict(model, frame, f"{name}_label", (), None)["predictions"]} <= {*CLASSES[name]}
    assert not {*predict(model, frame, "third_label", (), None)["predictions"]} & {"a", "b", "c", "d"}


def test_a_question_is_answered_with_the_classes_of_the_only_source_that_it_was_trained_on(model: LoadedModel) -> None:
    question = Question(output="text", numbers={"mass": 9.0, "length": 2.0})
    for name in ("first", "second"):
        assert answer_questions(with_sources(model, name), [question], Decoding())[0] in CLASSES[name]
    assert answer_questions(with_sources(model, "third"), [question], Decoding())[0] not in ("a", "b", "c", "d")


def test_predictors_without_the_name_of_a_source_are_of_any(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in model.numbers.predictors:
        monkeypatch.setattr(table, "sources", [])
    found = model.numbers.label_predictions(examples("third")[0].target.options)
    assert found is not None and found.classes == CLASSES["first"]


def test_those_of_a_start_are_of_its_sources_under_their_new_names(tmp_path: Path) -> None:
    """The shipped model names no source of its predictors."""
    values = {
        "model": {"start": "mini"},
        "sources": {"penguins": CONFIGS["first"]},
        "mixture": [{"source": "penguins", "task": TASK}],
    }
    start = open_start(build(MultimodalRecipe, values, "r.yaml"), RunFolder(tmp_path))
    assert start is not None and start.predictors
    for table in start.predictors:
        assert {"penguins_of_start", "diamonds"} <= {*table.sources} and "penguins" not in table.sources
