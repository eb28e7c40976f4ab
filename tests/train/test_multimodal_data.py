"""What is said of a recipe's sources before the first step."""

from __future__ import annotations

import io
import logging
import math
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer

from openm6.core.config import build
from openm6.core.errors import ConfigError, DataError
from openm6.core.run_folder import RunFolder
from openm6.data.records import Record
from openm6.data.source import Source
from openm6.data.sources import PairsConfig, PairSource
from openm6.distributed.process_group import ProcessGroupContext
from openm6.modalities.simple_predictors import IMAGE, TEXT, TablePredictors, fold_of, from_bytes
from openm6.tasks.registry import TASKS
from openm6.tasks.slots import PINNED
from openm6.train.multimodal import MultimodalTraining
from openm6.train.multimodal_data import (
    MAX_IMAGES,
    SAMPLED,
    check_sources,
    fit_all_series,
    fit_scales,
    network_seconds,
    predictor_rows,
    table_predictors,
    tokenizer_text,
    trained_tasks,
)
from openm6.train.recipe import MultimodalRecipe
from tests.data.lists import ListSource
from tests.train.tiny_recipe import tiny_recipe


def check(records: list[dict[str, Any] | None], *tasks: str) -> None:
    recipe = build(
        MultimodalRecipe,
        {
            "sources": {"mine": {"kind": "jsonl", "path": "unread"}},
            "mixture": [{"source": "mine", "task": task} for task in tasks],
        },
        "r.yaml",
    )
    check_sources(recipe, {"mine": ListSource("mine", records)})


def full(number: int) -> dict[str, Any]:
    return {"id": str(number), "text_en": "a text that is long enough", "label": "ab"[number % 2]}


def bare(number: int) -> dict[str, Any]:
    return {"id": str(number), "text_en": "a text that is long enough"}


def test_a_field_that_some_records_lack_is_said_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        check([full(n) if n % 2 else bare(n) for n in range(SAMPLED)], "text_classification", "text_denoising")
    assert "text_classification/mine: 10 of 20 records looked at lack a field" in caplog.text
    assert "text_denoising" not in caplog.text


def test_the_tokenizer_learns_texts_of_own_tasks(tmp_path: Path) -> None:
    own = {"summary": "Shorten", "inputs": {"report": "text"}, "target": {"text": "headline"},
           "prompts": {"en": "{report}"}}  # fmt: skip
    values = {
        "tasks": {"shorten": own},
        "sources": {"mine": {"kind": "jsonl", "path": "unread"}},
        "mixture": [{"source": "mine", "task": "shorten"}],
        "modalities": {"text": {"vocab_size": 500}},
    }
    extra = {"report": "harbour closed", "headline_en": "strong gale tonight", "unread": "zyx"}
    source = ListSource("mine", [{"id": str(n), "extra": extra} for n in range(20)])
    recipe = build(MultimodalRecipe, values, "r.yaml")
    tokenizer = Tokenizer.from_str(tokenizer_text(recipe, {"mine": source}, RunFolder(tmp_path)))
    assert len(tokenizer.encode("harbour closed").ids) == 2 and len(tokenizer.encode("strong gale tonight").ids) == 3
    assert len(tokenizer.encode("zyx").ids) == 3


@pytest.mark.parametrize(("fixed", "columns"), [("rent", ["rent"]), (None, ["area", "rent"])])
def test_columns_that_a_model_predicts_are_those_that_were_asked_for(fixed: str | None, columns: list[str]) -> None:
    values = {
        "sources": {"mine": {"kind": "jsonl", "path": "unread"}},
        "mixture": [{"source": "mine", "task": "record_regression"}],
    }
    extra = {"extra": {PINNED: fixed}} if fixed else {}
    records = [{"id": str(n), "numbers": {"rent": 2.0 + n, "area": 1.0 + n}, **extra} for n in range(20)]
    recipe = build(MultimodalRecipe, values, "r.yaml")
    (found,) = trained_tasks(recipe, {"mine": ListSource("mine", records)})
    assert found.columns == columns


def test_a_rare_field_is_found_further_on() -> None:
    records = [bare(n) for n in range(500)]
    records[7] = full(7)
    check(records, "text_classification")


def test_a_field_that_no_record_has_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match="task text_classification finds nothing to read in source 'mine': map the fields"
    ):
        check([bare(n) for n in range(100)], "text_denoising", "text_classification")


@pytest.mark.parametrize(
    ("field", "target", "sentence"),
    [
        ("text", {"number": "prise"}, "task own: source 'mine' has no column 'prise'; did you mean 'price'"),
        ({"text": "titel"}, {"number": "price"}, "task own: source 'mine' has no column 'titel'; did you mean 'title'"),
        ("image", {"number": "price"}, "task own finds nothing to read in source 'mine'"),
        ("audio", {"number": "price"}, "task own finds nothing to read in source 'mine'"),
    ],
)
def test_a_column_of_an_own_task_that_the_data_lack_is_named(field: Any, target: Any, sentence: str) -> None:
    """A column of photos that are all missing is no missing column."""
    source = ListSource("mine", [{"id": str(n), "numbers": {"price": 1.0}} for n in range(5)])
    source.columns = {"photo": ["image"], "price": ["numbers"], "title": ["title"]}
    task = {"inputs": {"title": field}, "target": target, "prompts": {"en": "{title} Price?"}}
    values = {
        "tasks": {"own": task},
        "sources": {"mine": {"kind": "jsonl", "path": "unread", "fields": {"image": "photo"}}},
        "mixture": [{"source": "mine", "task": "own"}],
    }
    if field == "audio":
        task |= {"inputs": {"audio": "audio"}, "prompts": {"en": "{audio} Price?"}}
    with pytest.raises((ConfigError, DataError), match=sentence):
        check_sources(build(MultimodalRecipe, values, "r.yaml"), {"mine": source})


def test_a_source_of_broken_records_says_why() -> None:
    with pytest.raises(DataError, match="all of the 3 records looked at in source 'mine' are broken: mine, row 0"):
        check([None, None, None], "text_classification")


def test_a_test_table_that_cannot_be_read_is_named_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("text\na\n")
    fields = {"text_en": "text", "label": "kind"}
    source = {"kind": "csv", "path": "unread", "test_path": str(tmp_path / "test.csv"), "fields": fields}
    values = {"sources": {"mine": source}, "mixture": [{"source": "mine", "task": "text_classification"}]}
    with pytest.raises(DataError, match="source 'mine' cannot be tested: .*test.csv has no column 'kind'.*drop its"):
        check_sources(build(MultimodalRecipe, values, "r.yaml"), {"mine": ListSource("mine", [full(0)])})


def test_columns_that_no_task_reads_are_named(caplog: pytest.LogCaptureFixture) -> None:
    source = ListSource("mine", [full(n) for n in range(5)])
    source.columns = {"words": ["text_en"], "class": ["label"], "seller": [], "own words": ["text_zh"]}
    recipe = build(
        MultimodalRecipe,
        {
            "sources": {"mine": {"kind": "jsonl", "path": "unread"}},
            "mixture": [{"source": "mine", "task": "text_classification"}],
        },
        "r.yaml",
    )
    with caplog.at_level(logging.INFO):
        check_sources(recipe, {"mine": source})
    assert "source mine: no task reads the columns 'seller', 'own words'" in caplog.text


class Windows(ListSource):
    """Each of them is made when it is read."""

    def __getitem__(self, index: int) -> Record:
        return {"id": str(index), "series": {"x": [float(index + step) for step in range(500)]}}


def test_a_column_with_other_seasons_in_two_sources_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def source(name: str, period: int) -> ListSource:
        wave = [math.sin(2 * math.pi * step / period) for step in range(100)]
        return ListSource(name, [{"id": str(row), "series": {"value": wave[row : row + 48]}} for row in range(40)])

    with caplog.at_level(logging.WARNING):
        assert fit_all_series([source("first", 12), source("second", 12)])["value"].period == 12
        assert not caplog.text
        fit_all_series([source("monthly", 12), source("daily", 7)])
    assert "column 'value' has a different season in the sources monthly, daily" in caplog.text


def test_scales_take_less_memory_than_python_numbers() -> None:
    source = Windows("mine", [None] * 200)
    tracemalloc.start()
    scales = fit_scales([source])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert scales["x"] == pytest.approx((349, 185), abs=1)
    assert peak < 40 * 500 * 200, peak


def row(number: int) -> dict[str, Any]:
    return {"id": str(number), "numbers": {"a": number % 7, "b": number % 7 + number % 3}, "categories": {"c": "no"}}


def test_networks_have_half_the_time_of_tasks_that_name_images() -> None:
    def seconds(minutes: float | None, *parts: tuple[str, str, float]) -> dict[str, float]:
        mixture = [{"source": source, "task": task, "weight": weight} for source, task, weight in parts]
        sources = {source: {"kind": "jsonl", "path": "unread"} for source, _, _ in parts}
        loop = {"steps": 5} if minutes is None else {"steps": "auto", "minutes": minutes}
        return network_seconds(build(MultimodalRecipe, {"sources": sources, "mixture": mixture, "loop": loop}, "r"))

    alone = ("icons", "image_categorization", 2.0)
    assert [seconds(minutes, alone)["icons"] for minutes in (2.0, None, 60.0)] == [60.0, 30.0, 300.0]
    assert seconds(2.0, alone, ("icons", "text_to_image", 1.0), ("table", "tabular_classification", 1.0)) == {
        "icons": 30.0
    }
    found = seconds(2.0, alone, ("icons", "image_classification", 1.0), ("rows", "record_classification", 1.0))
    assert found == {"icons": 45.0, "rows": 3.75}, "it reads texts, audio and numbers, too"


@pytest.mark.parametrize("kind", ["auto", "ridge", "none"])
def test_predictors_are_fitted_once_and_kept_by_checkpoints(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {
        "sources": {name: {"kind": "jsonl", "path": "unread"} for name in ("mine", "other")},
        "mixture": [{"source": "mine", "task": "record_regression"}, {"source": "other", "task": "text_denoising"}],
        "modalities": {"numbers": {"predictors": kind}},
    }
    recipe, run = build(MultimodalRecipe, values, "r.yaml"), RunFolder(tmp_path)
    sources: dict[str, Source] = {name: ListSource(name, [row(n) for n in range(90)]) for name in ("mine", "other")}
    with caplog.at_level(logging.INFO):
        fitted = table_predictors(recipe, sources, run)
    trees = {"auto": "trees for 2", "ridge": "trees for 0"}.get(kind)
    words = f"simple predictors of 2 numbers and 0 labels, {trees}, fitted"
    assert bool(fitted) == (trees is not None) == (words in caplog.text)
    assert "source other" not in caplog.text
    checkpoint = run.checkpoints / "step-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"files": {}}')
    assert table_predictors(recipe, sources, run) == b"", "it goes on without what it began without"
    (checkpoint / "predictors.safetensors").write_bytes(b"kept")
    assert table_predictors(recipe, sources, run) == b"kept"


def test_all_categories_have_predictors_and_equal_ones_the_same(tmp_path: Path) -> None:
    values = {
        "sources": {"mine": {"kind": "jsonl", "path": "unread"}},
        "mixture": [{"source": "mine", "task": "record_classification"}],
    }
    named = [{"c": "xyz"[n % 3], "d": "uv"[n % 7 > 3], "e": "uv"[n % 7 > 3]} for n in range(90)]
    source = ListSource("mine", [{**row(n), "categories": own} for n, own in enumerate(named)])
    fitted = table_predictors(build(MultimodalRecipe, values, "r.yaml"), {"mine": source}, RunFolder(tmp_path))
    (table,) = from_bytes(fitted, "file")
    assert {name: label.hidden for name, label in table.labels.items()} == {"c": ["c"], "d": ["d", "e"]}


def test_predictors_of_a_start_are_enough_until_its_data_have_more_classes_or_inputs(tmp_path: Path) -> None:
    values = {
        "sources": {"mine": {"kind": "jsonl", "path": "unread"}},
        "mixture": [{"source": "mine", "task": "record_classification"}],
    }

    def tables(records: list[dict[str, Any]], known: Sequence[TablePredictors] = ()) -> list[TablePredictors]:
        source, recipe = ListSource("mine", records), build(MultimodalRecipe, values, "r.yaml")
        return from_bytes(table_predictors(recipe, {"mine": source}, RunFolder(tmp_path), known), "file")

    records = [{**row(n), "categories": {"c": "xy"[n % 2]}} for n in range(90)]
    start = tables(records)
    assert [len(tables(records[:count], start)) for count in (30, 90)] == [1, 1]
    more_classes = [*records, *({**row(n), "categories": {"c": "z"}} for n in range(9))]
    more_inputs = [{**one, "text_en": f"shop {n % 5}"} for n, one in enumerate(records)]
    assert [one.labels["c"].classes for one in tables(more_classes, start)] == [["x", "y", "z"], ["x", "y"]]
    assert [TEXT in one.inputs for one in tables(more_inputs, start)] == [True, False]
    assert len(tables(more_classes, tables(more_classes, start))) == 2, "nothing is fitted twice"


def test_other_processes_wait_for_predictors_however_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, fitted = list[bool](), list[bool]()

    class Waiting(ProcessGroupContext):
        @contextmanager
        def main_process_first(self) -> Iterator[None]:
            inside.append(True)
            yield
            inside.clear()

    def fit(*parts: Any) -> bytes:
        fitted.append(bool(inside))
        return b""

    monkeypatch.setattr("openm6.train.multimodal_data.table_predictors", fit)
    recipe = tiny_recipe() | {"mixture": [{"source": "penguins", "task": "tabular_regression"}]}
    recipe["sources"] = {"penguins": recipe["sources"]["penguins"]}
    MultimodalTraining(build(MultimodalRecipe, recipe, "r"), RunFolder.open(tmp_path), torch.device("cpu"), Waiting())
    assert fitted == [True]


def test_pairs_have_no_predictors(tmp_path: Path) -> None:
    values = {
        "sources": {"both": {"kind": "pairs", "left": "a", "right": "b"}},
        "mixture": [{"source": "both", "task": "record_regression"}],
    }
    sides = [ListSource(name, [{**row(n), "label": str(n % 5)} for n in range(90)]) for name in ("a", "b")]
    sources: dict[str, Source] = {"both": PairSource("both", *sides, PairsConfig(left="a", right="b"))}
    assert len(sources["both"]) == 90
    assert table_predictors(build(MultimodalRecipe, values, "r.yaml"), sources, RunFolder(tmp_path)) == b""


def review(number: int) -> dict[str, Any]:
    """Words that tell the stars, but for some records without text, and one image in eight that is broken."""
    stars = number % 3
    numbers = {"stars": float(stars), "thumbs": float(2 * stars)}
    text = f"{('bad', 'fair', 'good')[stars]} shop number {number % 11}"
    stream = io.BytesIO()
    PIL.Image.new("RGB", (9, 7), (80 * stars, 20, 20)).save(stream, "PNG")
    image = stream.getvalue() if number % 8 else b"broken"
    return {"id": str(number), "numbers": numbers, "image": image} | ({"text_en": text} if number % 5 else {})


def test_predictors_of_texts_and_images_have_not_seen_the_record(tmp_path: Path) -> None:
    values = {
        "sources": {"mine": {"kind": "jsonl", "path": "unread"}},
        "mixture": [{"source": "mine", "task": "text_regression"}],
    }
    records = [review(number) for number in range(240)]
    source = ListSource("mine", records)
    content = table_predictors(build(MultimodalRecipe, values, "r.yaml"), {"mine": source}, RunFolder(tmp_path))
    (table,) = from_bytes(content, "file")
    assert table.numbers == ["stars", "thumbs"], "each has predictors, although no record shows the other one"
    for record in records[1:5]:
        for column, value in record["numbers"].items():
            found = table.predict(column, {TEXT: record["text_en"]}, fold_of(record))
            loc, scale, log, _ = found.units
            assert not log and abs(loc + scale * found.values[0] - value) < 0.5


def test_rows_of_predictors_hold_features_of_images_that_can_be_read() -> None:
    source = ListSource("mine", [review(number) for number in range(40)])
    rows, folds, _ = predictor_rows(source, [TASKS["record_regression"]])
    assert len(rows) == len(folds) == 40
    assert [IMAGE in row for row in rows] == [bool(number % 8) for number in range(40)]
    assert all(row[IMAGE].ndim == 1 for row in rows if IMAGE in row)
    assert [TEXT in row for row in rows] == [bool(number % 5) for number in range(40)]
    without = predictor_rows(ListSource("mine", [{"id": "0", "text_en": "no number"}]), [TASKS["text_regression"]])
    assert without == ([], [], [])
    many = ListSource("mine", [review(number) for number in range(1, 5)] * (MAX_IMAGES // 2))
    assert len(predictor_rows(many, [TASKS["tabular_regression"]])[0]) == len(many), "their images are not shown"
