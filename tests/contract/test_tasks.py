"""What every registered task must do, on a real record that has what it needs."""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest

from openm6.core.errors import ConfigError, MissingFieldError
from openm6.data.prepare import example_sequence, with_negatives
from openm6.data.records import Record
from openm6.data.source import Source
from openm6.evaluate.metrics import METRICS
from openm6.modalities.pool import POOL
from openm6.modalities.registry import MODALITIES
from openm6.tasks import chat, design, slots
from openm6.tasks.registry import SLOTS, TASKS, all_tasks, read_tasks, task_named
from openm6.tasks.slots import IMAGE
from openm6.tasks.task import LANGUAGES, Example, Task
from tests.data.lists import ListSource
from tests.data.sample_images import png, wav
from tests.small_model import demo_sources, modalities

BASELINES = {
    "frequent_answer": {"text"},
    "position_frequencies": {"image", "audio"},
    "column_median": {"numbers"},
    "last_value": {"numbers"},
    "chance": {"image", "audio"},
}
LOOKED_AT = 40  # records of a source
# A chat with answers of every modality.
TALK = [
    ("user", "text", "Hello"), ("assistant", "text", "Good morning"), ("user", "image", png()),
    ("assistant", "image", png("blue")), ("assistant", "audio", wav()), ("assistant", "numbers", {"mass": 9.0}),
]  # fmt: skip
MESSAGES = [{"role": role, "content": [{"type": kind, kind: raw}]} for role, kind, raw in TALK]
# Own tasks of a recipe, one for each output modality.
OWN: dict[str, Any] = {
    "own_text": {
        "inputs": {"photo": "image"},
        "target": {"category": "label"},
        "prompts": ("{photo} What?", "{photo} 什么？"),
    },
    "own_numbers": {
        "inputs": {"row": {"numbers": ["bill_length_mm"]}, "species": {"text": "label"}},
        "target": {"number": "body_mass_g"},
        "prompts": ("{row} {species} Mass?", "{row}{species}体重？"),
    },
    "own_image": {"inputs": {"label": "text"}, "target": "image", "prompts": ("a {label}", "一个{label}")},
    "own_audio": {"inputs": {"label": "text"}, "target": "audio", "prompts": ("say {label}!", "读{label}！")},
}
OWN = {name: {**one, "prompts": dict(zip(LANGUAGES, one["prompts"], strict=True))} for name, one in OWN.items()}
EVERY = {**TASKS, **{name: all_tasks(OWN)[name] for name in OWN}}


@cache
def first_records() -> list[tuple[Source, list[Record]]]:
    """Embedded sources and a chat, with the records that are looked at."""
    talk = ListSource("talk", [{"id": "t", "messages": MESSAGES}] * LOOKED_AT)
    sources = [*demo_sources().values(), talk]
    return [(source, [source[index] for index in range(min(LOOKED_AT, len(source)))]) for source in sources]


@cache
def fitting(name: str) -> list[tuple[Source, Record]]:
    """The sources in whose first records a task finds what it needs, each with the first of these."""
    found = []
    for source, records in first_records():
        if (record := next((one for one in records if EVERY[name].languages(one)), None)) is not None:
            found.append((source, record))
    return found


def records_of(task: Task) -> list[Record]:
    """The first fitting record of every source that fits, with what the task needs besides."""
    return [
        with_negatives(record, source, np.random.default_rng(0)) if task.needs_negatives else record
        for source, record in fitting(task.name)
    ]


def examples_of(task: Task, count: int = 8) -> list[tuple[Record, Example]]:
    return [
        (record, task.example(record, np.random.default_rng(seed), train=True))
        for record in records_of(task)
        for seed in range(count)
    ]


def plain_texts(example: Example) -> str:
    return " ".join(part.raw for part in example.source if part.modality == "text")


def test_each_task_has_its_own_name() -> None:
    assert all(task_named(name).name == name for name in TASKS)


def test_names_of_slots_are_unique() -> None:
    assert len(SLOTS) == len(slots.SLOTS) + len(design.SLOTS) + len(chat.SLOTS)
    assert not set(SLOTS) & set(slots.KINDS)


@pytest.mark.parametrize("target", ["imge", {"imge": "x"}])
def test_a_mistyped_slot_gets_a_hint(target: Any) -> None:
    with pytest.raises(ConfigError, match="no slot is called 'imge'; did you mean 'image'"):
        read_tasks({"it": {"summary": "", "inputs": {"text": "text"}, "target": target, "prompts": {"en": "{text}"}}})


def test_all_pairs_of_modalities_are_covered() -> None:
    assert {(task.input_modality, task.output_modality) for task in TASKS.values()} == set(
        product(MODALITIES, MODALITIES)
    )


def test_a_mistyped_name_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean 'image_classification'"):
        task_named("image_clasification")


@pytest.mark.parametrize("task", EVERY.values(), ids=EVERY)
def test_prompts_metrics_and_baseline_exist(task: Task) -> None:
    assert set(task.prompts) == set(LANGUAGES) and all(task.prompts.values())
    assert task.metrics and set(task.metrics) <= set(METRICS)
    assert task.contrastive or all(METRICS[name].values for name in task.metrics)
    assert task.output_modality in BASELINES[task.baseline]
    assert task.summary and not task.summary.endswith(".")
    for prompt in (prompt for prompts in task.prompts.values() for prompt in prompts):
        for name in task.inputs:
            assert prompt.count(f"{{{name}}}") == 1, "an input that no prompt shows is lost"


@pytest.mark.parametrize("task", EVERY.values(), ids=EVERY)
def test_a_real_record_becomes_an_example(task: Task) -> None:
    examples = examples_of(task)
    assert examples, "no embedded record has what this task needs"
    for record, example in examples:
        assert example.task == task.name and example.record_id == record["id"] and example.key
        assert example.language in task.languages(record)
        assert task.optional or task.input_modality in {part.modality for part in example.source}
        assert example.target.modality == task.output_modality
        sequence = example_sequence(example, modalities())
        learned = [segment.kind for segment in sequence.segments if segment.learn.any()]
        assert learned == [POOL, POOL] if task.contrastive else len(learned) == 1
        assert sequence.segments[-1].learn.any()


@pytest.mark.parametrize("task", EVERY.values(), ids=EVERY)
def test_an_example_follows_from_record_and_generator(task: Task) -> None:
    for record in records_of(task):
        first, second = (task.example(record, np.random.default_rng(5), train=True) for _ in range(2))
        assert first == second


@pytest.mark.parametrize("task", EVERY.values(), ids=EVERY)
def test_an_empty_record_is_refused(task: Task) -> None:
    with pytest.raises(MissingFieldError, match=f"'r1' lacks a field that task {task.name} needs"):
        task.example({"id": "r1"}, np.random.default_rng(0))


@pytest.mark.parametrize("task", EVERY.values(), ids=EVERY)
def test_what_is_wanted_is_not_among_what_is_given(task: Task) -> None:
    """Neither the very part, nor the wanted column among the given numbers."""
    for _, example in examples_of(task):
        assert example.target not in [p for p in example.source if p.options == example.target.options] or (
            "mask_box" in example.target.options or "mask_span" in example.target.options
        )
        if "{column}" in task.prompts["en"][0]:
            column = example.target.raw if isinstance(example.target.raw, str) else next(iter(example.target.raw))
            for part in example.source:
                if part.modality == "numbers":
                    assert column not in part.raw and part.raw


@pytest.mark.parametrize("task", EVERY.values(), ids=EVERY)
def test_holes_and_gaps_are_the_same_in_both(task: Task) -> None:
    for _, example in examples_of(task):
        for name in ("mask_box", "mask_span"):
            if name in example.target.options:
                given = [part.options for part in example.source if part.modality == task.output_modality]
                assert given == [example.target.options]


@pytest.mark.parametrize("task", EVERY.values(), ids=EVERY)
def test_a_spoken_record_is_posed_in_the_language_it_is_spoken_in(task: Task) -> None:
    chosen = [source for source, _ in fitting(task.name)]
    for records in (records for source, records in first_records() if source in chosen):
        for record in records[::4]:
            spoken = (record.get("extra") or {}).get("spoken_language")
            if spoken is not None:
                assert set(task.languages(record)) <= {spoken}


@pytest.mark.parametrize("task", EVERY.values(), ids=EVERY)
def test_words_are_of_the_language_of_the_example(task: Task) -> None:
    def chinese(words: str) -> bool:
        return any("\u4e00" <= letter <= "\u9fff" for letter in words)

    for _, example in examples_of(task):
        assert example.language == "zh" or not chinese("".join(task.prompts[example.language]))
        if task.output_modality == "text" and not task.name.startswith("translation"):
            neutral = {"label", "answer", "question"}  # English, or of no language
            if getattr(task.target, "name", "") not in neutral:
                assert not (example.language == "en" and chinese(example.answer))


def test_the_label_does_not_leak_into_a_definition() -> None:
    task, source = TASKS["reverse_dictionary"], demo_sources()["wordnet"]
    for index in range(60):
        record = source[index]
        words, _, gloss = record["text_en"].partition(": ")
        assert record["label"] in words
        assert plain_texts(task.example(record, np.random.default_rng(index))) == f"{gloss} In a word:"


def test_a_text_to_match_says_nothing_of_whether_it_fits() -> None:
    """Prompt and truth share one draw: both occur, the text shown is the record's own exactly where it says yes."""
    task, source = TASKS["image_text_matching"], demo_sources()["emoji"]
    seen = set()
    for seed in range(40):
        record = with_negatives(source[3], source, np.random.default_rng(seed))
        example = task.example(record, np.random.default_rng(seed))
        own = record[f"text_{example.language}"] in plain_texts(example)
        assert own == (example.key == "True") == (example.answer in ("yes", "是"))
        seen.add(example.key)
    assert seen == {"True", "False"}


def test_both_halves_of_a_text_make_the_whole() -> None:
    task, source = TASKS["text_generation"], demo_sources()["poems"]
    for seed in range(20):
        record = source[seed]
        example = task.example(record, np.random.default_rng(seed), train=True)
        (given,) = example.source
        assert given.raw and example.answer and given.raw + example.answer == record["text_zh"]


def test_a_forecast_gives_the_past_alone() -> None:
    task, source = TASKS["time_series_forecasting"], demo_sources()["weather"]
    record = source[5]
    example = task.example(record, np.random.default_rng(0))
    past = next(part.raw for part in example.source if part.modality == "numbers")
    assert len(past.values) == 48 and len(example.target.raw.values) == 8
    assert past.values + example.target.raw.values == record["series"]["temp_max"]


def test_a_gap_stands_where_words_are_missing() -> None:
    task, source = TASKS["text_denoising"], demo_sources()["wordnet"]
    for seed in range(10):
        example = task.example(source[seed], np.random.default_rng(seed))
        (given,) = example.source
        segments = given.raw.removeprefix("Restore: ").split("\N{OBJECT REPLACEMENT CHARACTER}")
        assert len(segments) > 1 and sum(map(len, segments)) < len(example.answer)
        assert re.fullmatch(".+".join(map(re.escape, segments)), example.answer, re.DOTALL)


def test_a_prompt_that_names_a_slot_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="names"):
        Task(summary="", inputs={"image": IMAGE}, target=IMAGE, prompts={"en": ("{photo}",)})
