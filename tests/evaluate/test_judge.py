"""Judging end to end with an untrained model and a few records of every kind of lesson."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openm6.data.prepare import example_sequence
from openm6.evaluate.config import JudgeConfig
from openm6.evaluate.judge import judge, judge_lesson, test_examples
from openm6.evaluate.likelihood import sequence_nats
from openm6.evaluate.results import Judgement, TaskResult
from openm6.evaluate.side_by_side import number_of_judges
from openm6.inference.sampling import MaskedSampling
from openm6.modalities.numbers import Histogram
from openm6.models.description import Lesson
from openm6.tasks.registry import TASKS
from tests.data.lists import ListSource
from tests.data.pictures import png
from tests.small_model import demo_sources, loaded

examples_of = test_examples
del test_examples  # or pytest would take it for a test

LESSONS = [
    Lesson(task=task, source=source)
    for task, source in (
        ("name_picture", "digits"),
        ("match_picture", "emoji"),
        ("draw", "digits"),
        ("fill_picture", "emoji"),
        ("speak", "spoken"),
        ("fill_sound", "spoken"),
        ("predict_number", "penguins"),
        ("forecast", "weather"),
    )
]
CONFIG = JudgeConfig(records=5, answers=3, drawn=2, samples=2, decoding=MaskedSampling(steps=2))


def judged(config: JudgeConfig = CONFIG, lessons: list[Lesson] = LESSONS, **tell: Any) -> Judgement:
    return judge(loaded(4), lessons, demo_sources(), demo_sources("test"), config, **tell)


@pytest.fixture(scope="module")
def judgement() -> Judgement:
    return judged()


def test_every_lesson_is_judged_and_told_of() -> None:
    heard: list[TaskResult] = []
    found = judged(lessons=LESSONS[:2], tell=heard.append)
    assert [result.name for result in found.results] == ["name_picture/digits", "match_picture/emoji"]
    assert heard == found.results and found.seconds > 0


def test_several_processes_find_what_one_finds() -> None:
    """Whoever is done first: scores, intervals and answers are the same, and in the same order."""
    lessons = LESSONS[:1] + LESSONS[2:3] + LESSONS[5:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: how a sum is divided among threads decides its last bits
    try:
        alone, shared = (
            judged(CONFIG.model_copy(update={"workers": workers}), lessons) for workers in (1, 3)
        )
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(alone.results, shared.results, strict=True):
        assert json.dumps(one.to_json()) == json.dumps(other.to_json())
        for sample, same in zip(one.samples, other.samples, strict=True):
            assert sample.record_id == same.record_id and seen(sample.answer) == seen(same.answer)


def seen(answer: object) -> bytes | str:
    """An answer in a form that can be compared."""
    if isinstance(answer, Histogram):
        return answer.probability.tobytes()
    return answer if isinstance(answer, str) else np.asarray(answer).tobytes()


def test_how_many_processes_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm6.evaluate.side_by_side.usable_cores", lambda: 4)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert number_of_judges(28, JudgeConfig(), cpu) == 4
    assert number_of_judges(3, JudgeConfig(), cpu) == 3
    assert number_of_judges(0, JudgeConfig(), cpu) == 1
    assert number_of_judges(28, JudgeConfig(workers=2), cpu) == 2
    assert number_of_judges(28, JudgeConfig(), gpu) == 1
    with ThreadPoolExecutor(1) as pool:  # another thread may hold a lock that the child would wait for
        assert pool.submit(number_of_judges, 28, JudgeConfig(), cpu).result() == 1


def test_results_are_complete(judgement: Judgement) -> None:
    assert [(r.task, r.source) for r in judgement.results] == [(x.task, x.source) for x in LESSONS]
    for result in judgement.results:
        task = TASKS[result.task]
        assert result.metric == task.metrics[0] and result.value == result.metrics[result.metric]
        assert all(math.isfinite(value) for value in result.metrics.values())
        assert math.isfinite(result.baseline)
        assert 2 <= result.records <= 5
        assert result.answered == (2 if result.gives in ("image", "sound") else 3)
        low, high = result.information_interval
        assert low <= result.information_gain <= high
        assert result.answer_entropy is None or result.gives == "text"


def test_samples_are_of_the_right_kind(judgement: Judgement) -> None:
    kinds = {"text": str, "image": Image.Image, "sound": np.ndarray, "numbers": Histogram}
    for result in judgement.results:
        assert len(result.samples) == 2
        for sample in result.samples:
            assert isinstance(sample.answer, kinds[result.gives])
            assert sample.record_id and sample.given and sample.truth is not None


def test_an_untrained_model_gains_no_information(judgement: Judgement) -> None:
    """The frequencies of the training targets predict better than it: nothing is claimed for it."""
    for result in judgement.results:
        assert result.information_gain < 0 and not result.uses_inputs and not result.beats_baseline
        assert result.null_predictor == "training frequencies"
        if result.metric == "code_bits":
            assert result.value > np.log2(1000) - 3


def test_a_baseline_is_beaten_only_if_score_and_information_agree(judgement: Judgement) -> None:
    one = judgement.results[0]
    for information, advantage, beats in (
        ((0.1, 1.0), (0.1, 0.5), True),
        ((-0.1, 1.0), (0.1, 0.5), False),
        ((0.1, 1.0), (0.0, 0.5), False),
        ((0.1, 1.0), (math.nan, math.nan), False),
        ((math.nan, math.nan), (0.1, 0.5), False),
    ):
        found = replace(one, information_interval=information, advantage_interval=advantage)
        assert found.beats_baseline is beats


def test_inpainting_is_scored_on_the_masked_region_only() -> None:
    """Codes outside of the mask may be anything: the score stays the same."""
    model, lesson = loaded(4), Lesson(task="fill_picture", source="digits")
    examples, _ = examples_of(TASKS["fill_picture"], demo_sources("test")["digits"], CONFIG, model.modalities)
    shown = [replace(e, target=replace(e.target, options={"hole": (0.0, 0.0, 0.5, 0.5)})) for e in examples]
    sequences = [example_sequence(example, model.modalities) for example in shown]
    found = judge_lesson(model, lesson, shown, sequences, demo_sources()["digits"], CONFIG)
    sequence = sequences[0]
    assert sequence.segments[-1].learn.sum() == 16, "a quarter of the 64 positions"
    answered = shown[0], shown[-1]
    bits = sequence_nats(model.omni, [example_sequence(e, model.modalities) for e in answered]) / np.log(2)
    assert found.value == pytest.approx(bits.mean() / 16 / model.image.codec.groups, rel=1e-4)


def test_judging_is_repeatable(judgement: Judgement) -> None:
    again = {result.name: result.to_json() for result in judged(lessons=LESSONS[:4]).results}
    first = {result.name: result.to_json() for result in judgement.results[:4]}
    assert again == first


def test_more_records_are_judged_where_asked_for() -> None:
    found = judged(CONFIG.model_copy(update={"records": 30}), LESSONS[:1]).results[0]
    assert 20 <= found.records <= 30


def test_a_lesson_without_test_records_is_left_out() -> None:
    test = {**demo_sources("test"), "digits": ListSource("digits", [])}
    found = judge(loaded(), LESSONS[:2], demo_sources(), test, CONFIG)
    assert [result.task for result in found.results] == ["match_picture"]


def test_broken_test_records_are_left_out() -> None:
    good = {"id": "a", "label": "x", "label_zh": "某", "text_en": "a thing", "image": png()}
    records = [
        good,
        {**good, "id": "b", "image": b"broken"},
        None,
        {"id": "c"},
        {**good, "id": "d", "label": "y"},
    ]
    source = ListSource("s", records)
    config = JudgeConfig(records=5)
    for name in ("name_picture", "draw"):
        found, sequences = examples_of(TASKS[name], source, config, loaded().modalities)
        assert len(sequences) == len(found)
        assert [example.record_id for example in found] == ["a", "d"]
    lessons = [Lesson(task="draw", source="s")]
    (result,) = judge(loaded(), lessons, {"s": source}, {"s": source}, CONFIG).results
    assert result.records == 2 and math.isfinite(result.value) and math.isfinite(result.baseline)


def test_records_are_spread_over_the_source() -> None:
    found, _ = examples_of(
        TASKS["draw"], demo_sources("test")["digits"], JudgeConfig(records=4), loaded().modalities
    )
    ids = demo_sources("test")["digits"].values("id")
    assert found[0].record_id == ids[0] and found[-1].record_id == ids[-1] and len(found) == 4
