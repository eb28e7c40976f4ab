"""Own tasks: slots and columns follow from a few words; mistakes get one sentence with the nearest right word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from openm6.core.config import build
from openm6.core.errors import ConfigError, MissingFieldError
from openm6.data.records import Fields, RowReader
from openm6.data.sources import open_sources
from openm6.tasks.own import TaskConfig
from openm6.tasks.registry import all_tasks
from openm6.tasks.task import Example
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import read_recipe

PRICE: dict[str, Any] = {
    "inputs": {"image": "image", "title": "text"},
    "target": {"number": "price"},
    "prompts": {"en": "{image} {title} Price?"},
    "metrics": ["mae"],
}
ROW = {
    "id": "r",
    "image": b"x",
    "text_en": "red cup",
    "text_zh": "红杯子",
    "label": "cup",
    "numbers": {"price": 3.5, "weight": 2.0, "gone": None},
    "categories": {"colour": "red", "size": "big"},
    "extra": {"title": "Rote Tasse", "note_en": "good", "note_zh": "好"},
}


def read_nothing(name: str, limit: int) -> bytes:
    raise AssertionError(name)


def example_of(config: dict[str, Any], record: dict[str, Any] = ROW, language: str | None = None) -> Example:
    task = build(TaskConfig, config, "task").task("own")
    return task.example(record, np.random.default_rng(0), train=True, language=language)


def shown(example: Example) -> list[Any]:
    return [part.raw for part in example.source]


def test_the_example_of_the_design() -> None:
    example = example_of(PRICE)
    assert shown(example) == [b"x", " Rote Tasse Price?"] and example.answer == {"price": 3.5}
    assert example.task == "own" and example.key == "price=3.5"
    task = build(TaskConfig, PRICE, "task").task("own")
    assert (task.input_modality, task.output_modality, task.metrics, task.baseline) == (
        "image", "numbers", ("mae",), "column_median",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "seen", "answer"),
    [
        ({"target": {"category": "colour"}}, [b"x", " Rote Tasse ?"], "red"),
        ({"target": "text", "inputs": {"title": "text"}}, ["Rote Tasse ?"], "red cup"),
        ({"target": {"text": "note"}}, [b"x", " Rote Tasse ?"], "good"),
        ({"target": "image", "inputs": {"title": "text"}}, ["Rote Tasse ?"], b"x"),
        ({"inputs": {"row": "numbers"}}, [{"weight": 2.0, "gone": None}, " ?"], {"price": 3.5}),
        ({"inputs": {"row": {"numbers": ["weight"]}}}, [{"weight": 2.0}, " ?"], {"price": 3.5}),
        ({"inputs": {"weight": "number"}}, [{"weight": 2.0}, " ?"], {"price": 3.5}),
        ({"inputs": {"kind": "categories"}, "target": {"category": "size"}}, ["colour: red ?"], "big"),
        ({"inputs": {"kind": {"category": "label"}}}, ["cup ?"], {"price": 3.5}),
    ],
)
def test_kinds_of_fields(change: dict[str, Any], seen: list[Any], answer: Any) -> None:
    config = {**PRICE, **change, "metrics": []}
    config["prompts"] = {"en": " ".join(f"{{{name}}}" for name in config["inputs"]) + " ?"}
    example = example_of(config)
    assert shown(example) == seen and example.answer == answer


def test_the_column_of_the_label_is_not_shown_when_the_label_is_asked_for() -> None:
    config = {**PRICE, "inputs": {"rest": "categories"}, "target": {"category": "label"}, "metrics": []}
    columns = ["kind", "colour", "size"]
    reader = RowReader(columns, Fields(label="kind", categories=columns), read_nothing, "t")
    # Another column may hold the same word.
    record = reader.read({"kind": "red", "colour": "red", "size": "big"})
    assert shown(example_of({**config, "prompts": {"en": "{rest} ?"}}, record)) == ["colour: red; size: big ?"]


def test_prompts_in_any_language() -> None:
    config = {**PRICE, "inputs": {"title": "text"}, "prompts": {"de": ["{title} kostet?", "Preis: {title}"]}}
    seen = {shown(example_of(config))[0] for _ in range(3)}
    assert seen <= {"Rote Tasse kostet?", "Preis: Rote Tasse"}
    both = {**PRICE, "inputs": {"note": "text"}, "prompts": {"en": "{note}?", "zh": "{note}？"}}
    assert [shown(example_of(both, language=one)) for one in ("en", "zh")] == [["good?"], ["好？"]]


def test_a_record_without_a_field_is_skipped_and_not_broken() -> None:
    with pytest.raises(MissingFieldError, match="task own needs"):
        example_of(PRICE, {**ROW, "numbers": {"price": None}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": {"numbr": "price"}}, r"target: no kind of field is called 'numbr'; did you mean 'number'"),
        ({"inputs": {"image": "imag"}}, r"inputs.image: no kind of field is called 'imag'; did you mean 'image'"),
        ({"prompts": {"en": "{image} {titel}"}}, "names no input by {titel}; did you mean 'title'"),
        ({"prompts": {"en": "{image} Price?"}}, "must show the input {title} once"),
        ({"prompts": {"en": "{image} {title} {column}"}}, "in words, not by {column}"),
        ({"prompts": {"english": "{image} {title}"}}, "'english' is no code"),
        ({"prompts": {}}, "prompts"),
        ({"target": "number"}, "write {number: COLUMN}"),
        ({"target": "numbers"}, "one column is predicted: write {number: COLUMN}"),
        ({"target": {"number": 3}}, "must name a column, as {number: price}, not 3"),
        ({"target": {"number": "price", "text": "title"}}, "must be one kind of field"),
        ({"target": {"number": ["a", "b"]}}, "number is one column"),
        ({"target": {"number": "price", "max_tokens": 3}}, "max_tokens bounds a text"),
        ({"target": "image"}, "the input 'image' is the target itself"),
        ({"inputs": {"image": "image", "photo": "image"}, "prompts": {"en": "{image}{photo}"}}, "has one image"),
        ({"inputs": {"a b": "text"}}, "cannot be called 'a b'"),
        ({"inputs": {"series": "image"}}, "cannot be called 'series'"),
        ({"prompts": {"en": []}}, "prompts.en"),
        ({"promts": {}}, "unknown key 'promts'; did you mean 'prompts'"),
    ],
)
def test_mistakes_get_one_sentence(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(TaskConfig, {**PRICE, **change}, "task")
    assert said in str(caught.value) and "\n" not in str(caught.value)


RECIPE = """\
kind: multimodal
tasks:
  price_from_photo:
    inputs: {image: image, title: text}
    target: {number: price}
    prompts: {en: "{image} {title} Price?"}
    metrics: [mae]
sources: {shop: {kind: csv, path: shop.csv}}
mixture:
- {source: shop, task: price_from_photo}
"""


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("number: price", "numbr: price", ", line 5: tasks.price_from_photo.target: .*did you mean 'number'"),
        ("title: text", "title: txt", ", line 4: tasks.price_from_photo.inputs.title: .*did you mean 'text'"),
        ("[mae]", "[maee]", ", line 7: tasks.price_from_photo.metrics.0: .*did you mean 'mae'"),
        ("[mae]", "[exact_match]", ", line 7: tasks.price_from_photo.metrics.0: no metric of this target"),
        ("metrics:", "metrcs:", ", line 7: unknown key .*did you mean 'metrics'"),
        ("task: price_from_photo", "task: price_from_foto", ", line 10: mixture.0.task: .*'price_from_photo'"),
        ("  price_from_photo:", "  image_captioning:", ", line 3: .* there is a task 'image_captioning' already"),
        ("  price_from_photo:", "  Price:", ", line 3: .* cannot be called 'Price'"),
    ],
)
def test_errors_name_the_line(right: str, wrong: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(RECIPE.replace(right, wrong, 1))
    with pytest.raises(ConfigError, match=f"my.yaml{said}"):
        read_recipe(path, [])


def test_a_value_from_the_command_line_has_no_line(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(RECIPE)
    with pytest.raises(ConfigError, match=r"my.yaml: mixture.0.task"):
        read_recipe(path, ["mixture.0.task=nothing"])
    with pytest.raises(ConfigError, match=r"my.yaml: unknown key 'tasks.price_from_photo.colour'"):
        read_recipe(path, ["tasks.price_from_photo.colour=red"])


def recipe_over(tmp_path: Path, fields: str, header: str) -> MultimodalRecipe:
    table = tmp_path / "shop.csv"
    table.write_text(header + "\n" + "".join(f"{n}.png,cup {n},{n}.5,red\n" for n in range(20)))
    for n in range(20):
        (tmp_path / f"{n}.png").write_bytes(b"image")
    values = yaml.safe_load(RECIPE)
    values["sources"]["shop"] |= {"path": str(table), "test_fraction": 0.0, **yaml.safe_load(fields)}
    return build(MultimodalRecipe, values, "recipe")


@pytest.mark.parametrize("fields", ["{}", "{fields: {categories: [colour]}}", "{fields: {text_en: title}}"])
def test_the_columns_that_a_task_names_are_read(fields: str, tmp_path: Path) -> None:
    recipe = recipe_over(tmp_path, fields, "image,title,price,colour")
    record = open_sources(recipe.sources, "train")["shop"][3]
    example = all_tasks(recipe.tasks)["price_from_photo"].example(record, np.random.default_rng(0))
    assert shown(example) == [b"image", " cup 3 Price?"] and example.answer == {"price": 3.5}
    # As a checkpoint keeps it, and a run that resumes reads it.
    again = build(MultimodalRecipe, {**recipe.model_dump(mode="json"), "eval": {}}, "again")
    assert again.sources == recipe.sources and again.tasks == recipe.tasks


def test_fields_fill_what_has_another_name(tmp_path: Path) -> None:
    fields = "{fields: {image: photo, extra: [title], numbers: [price]}}"
    recipe = recipe_over(tmp_path, fields, "photo,title,price,colour")
    record = open_sources(recipe.sources, "train")["shop"][0]
    assert record["image"] == b"image" and record["numbers"] == {"price": 0.5}


def test_two_recipes_in_one_process_do_not_meet() -> None:
    first, second = (
        build(MultimodalRecipe, {**yaml.safe_load(RECIPE), "tasks": {"price_from_photo": config}}, "recipe")
        for config in (PRICE, {**PRICE, "target": {"number": "weight"}})
    )
    names = [recipe.task("price_from_photo").target.columns for recipe in (first, second)]  # type: ignore[attr-defined]
    assert names == [("price",), ("weight",)] and "price_from_photo" not in all_tasks()
