"""A record becomes tokens: the same ones for the same draw, without its source now and then, never with its answer."""

from __future__ import annotations

import numpy as np
import pytest

from openm6.core.errors import DataError
from openm6.data.mixture import Component, MixtureSampler, SampleIndex
from openm6.data.prepare import (
    NULL_FRACTION,
    UNCONDITIONAL_FRACTION,
    ExampleTransform,
    example_sequence,
    null_example,
    with_negatives,
)
from openm6.modalities.batch import PackedExample
from openm6.modalities.interface import Part
from openm6.modalities.text import MASK_CHARACTER, Text
from openm6.tasks.registry import TASKS
from openm6.tasks.task import without_inputs
from tests.data.lists import ListSource
from tests.data.sample_images import png
from tests.small_model import modalities

RECORDS = [
    {"id": f"r{n}", "image": png(("red", "blue")[n % 2]), "text_en": f"a red thing, number {n}", "label": "red"}
    for n in range(12)
]


def transform(
    task: str, records: list | None = None, weights: dict[str, float] | None = None, seed: int = 0
) -> ExampleTransform:
    source = ListSource("things", RECORDS if records is None else records)
    return ExampleTransform(MixtureSampler([Component(source=source, task=task)], 0), modalities(), seed, weights or {})


def alike(first: PackedExample, second: PackedExample) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(array, other.arrays[name])
        for segment, other in zip(first.segments, second.segments, strict=True)
        for name, array in segment.arrays.items()
    )


@pytest.mark.parametrize(
    "task", ["image_classification", "text_to_image", "image_text_matching", "image_inpainting", "text_denoising"]
)
def test_a_sequence_follows_from_seed_and_draw(task: str) -> None:
    draws = [SampleIndex(0, 0, n, n) for n in range(6)]
    first, second, third = ([transform(task, seed=s)(d) for d in draws] for s in (0, 0, 1))
    assert all(alike(a, b) for a, b in zip(first, second, strict=True))
    assert not all(alike(a, b) for a, b in zip(first, third, strict=True)), "another seed, other choices"
    # Where in the run a draw lies does not matter, but its epoch does.
    moved = [transform(task)(SampleIndex(0, 0, n, n + 99)) for n in range(6)]
    later = [transform(task)(SampleIndex(0, 1, n, n)) for n in range(6)]
    assert all(alike(a, b) for a, b in zip(first, moved, strict=True))
    assert not all(alike(a, b) for a, b in zip(first, later, strict=True))


def is_null(sequence: PackedExample) -> bool:
    first = sequence.segments[0]
    return first.kind == "text" and int(first.arrays["ids"][0]) == modalities()["text"].mask  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "task", ["image_classification", "text_to_image", "image_inpainting", "text_denoising", "tabular_to_image"]
)
def test_a_tenth_of_every_task_loses_its_inputs(task: str) -> None:
    maker = transform(task, [{**record, "numbers": {"mass": 1.0}} for record in RECORDS])
    found = [maker(SampleIndex(0, epoch, n, 0)) for epoch in range(50) for n in range(12)]
    assert sum(map(is_null, found)) / len(found) == pytest.approx(NULL_FRACTION, abs=0.04)
    kinds = {segment.kind for sequence in found if is_null(sequence) for segment in sequence.segments[:-1]}
    assert kinds <= {"text"}, "neither image nor numbers remain"


def test_a_part_of_drawings_loses_prompt_and_inputs() -> None:
    maker = transform("text_to_image")
    found = [maker(SampleIndex(0, epoch, n, 0)) for epoch in range(50) for n in range(12)]
    empty = sum(len(sequence.segments) == 1 for sequence in found) / len(found)
    assert empty == pytest.approx(UNCONDITIONAL_FRACTION, abs=0.025)


@pytest.mark.parametrize("task", ["image_classification", "text_denoising"])
def test_what_is_answered_in_words_keeps_its_prompt(task: str) -> None:
    maker = transform(task)
    assert all(len(maker(SampleIndex(0, epoch, 0, 0)).segments) > 1 for epoch in range(60))


def test_the_null_input_holds_the_prompt_and_nothing_of_the_record() -> None:
    record = {**RECORDS[0], "numbers": {"bill_length_mm": 40.0, "body_mass_g": 4000.0}}
    example = TASKS["tabular_regression"].example(record, np.random.default_rng(0))
    null = null_example(example, "things")
    (part,) = null.source
    column = next(iter(example.answer)).replace("_", " ")
    assert part.modality == "text" and part.raw.startswith(f"{MASK_CHARACTER}things ") and column in part.raw
    text = modalities()["text"]
    assert isinstance(text, Text)
    assert text.source(part.raw, options=part.options).arrays["ids"][0] == text.mask
    assert "40" not in part.raw and (null.target.raw, null.answer) == (example.target.raw, example.answer)


@pytest.mark.parametrize("task", TASKS)
def test_no_words_of_the_inputs_remain_in_the_prompt(task: str) -> None:
    """What a slot filled in is not in the words that remain without inputs."""
    for prompts in TASKS[task].prompts.values():
        for prompt in prompts:
            bare = without_inputs(prompt, {"column": "body mass"})
            assert "{" not in bare and "  " not in bare
            assert ("body mass" in bare) == ("{column}" in prompt)


def test_a_loss_weight_is_that_of_what_is_wanted() -> None:
    weights = {"image": 3.0, "text": 0.5}
    assert transform("text_to_image", weights=weights)(SampleIndex(0, 0, 0, 0)).weight == 3.0
    assert transform("image_classification", weights=weights)(SampleIndex(0, 0, 0, 0)).weight == 0.5
    assert transform("text_to_image")(SampleIndex(0, 0, 0, 0)).weight == 1.0


def test_others_are_of_the_same_source() -> None:
    record = with_negatives(RECORDS[0], ListSource("things", RECORDS), np.random.default_rng(0))
    texts = {entry["text_en"] for entry in RECORDS}
    assert len(record["others"]) == 2 and all(other["en"] in texts for other in record["others"])
    assert "others" not in RECORDS[0]


def test_a_broken_record_is_no_other() -> None:
    source = ListSource("things", [RECORDS[0], None, RECORDS[1], RECORDS[2]])
    for seed in range(20):
        assert len(with_negatives(RECORDS[0], source, np.random.default_rng(seed))["others"]) == 2


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"id": "x", "image": b"no image", "label": "red"}, "broken or of an unknown format"),
        ({"id": "x", "label": "red"}, "lacks a field that task image_classification needs"),
        (None, "row 0: broken"),
    ],
)
def test_a_broken_record_is_a_data_error_with_a_name(record: dict | None, reason: str) -> None:
    maker = transform("image_classification", [record])
    with pytest.raises(DataError, match=reason):
        maker(SampleIndex(0, 0, 0, 0))
    assert maker.name(SampleIndex(0, 0, 0, 0)) == ("things", "x" if record else "row 0")


def test_nothing_to_learn_is_a_data_error() -> None:
    example = TASKS["tabular_to_image"].example({**RECORDS[0], "numbers": {"mass": 1.0}}, np.random.default_rng(0))
    wanted = Part("numbers", {"mass": None})
    with pytest.raises(DataError, match="nothing of this numbers is observed"):
        example_sequence(type(example)(**{**vars(example), "target": wanted}), modalities())
