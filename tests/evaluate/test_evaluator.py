"""Evaluation end to end with an untrained model and a few records of every kind of task."""

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
from openm6.evaluate.evaluator import EvalConfig, evaluate_task, evaluate_tasks, num_workers, select_examples
from openm6.evaluate.likelihood import sequence_nll
from openm6.evaluate.results import EvalReport, TaskResult
from openm6.inference.sampling import MaskedSampling
from openm6.modalities.histogram import Histogram
from openm6.models.description import TrainedTask
from openm6.tasks.registry import TASKS
from tests.data.lists import ListSource
from tests.data.sample_images import png
from tests.small_model import demo_sources, loaded

TRAINED_TASKS = [
    TrainedTask(task=task, source=source)
    for task, source in (
        ("image_classification", "digits"),
        ("image_text_matching", "emoji"),
        ("text_to_image", "digits"),
        ("image_inpainting", "emoji"),
        ("text_to_speech", "spoken"),
        ("audio_inpainting", "spoken"),
        ("tabular_regression", "penguins"),
        ("time_series_forecasting", "weather"),
    )
]
CONFIG = EvalConfig(records=5, answers=3, drawn=2, samples=2, decoding=MaskedSampling(steps=2))


def evaluated(
    config: EvalConfig = CONFIG, trained_tasks: list[TrainedTask] = TRAINED_TASKS, **options: Any
) -> EvalReport:
    return evaluate_tasks(loaded(4), trained_tasks, demo_sources(), demo_sources("test"), config, **options)


@pytest.fixture(scope="module")
def report() -> EvalReport:
    return evaluated()


def test_every_task_is_evaluated_and_reported() -> None:
    received: list[TaskResult] = []
    found = evaluated(trained_tasks=TRAINED_TASKS[:2], on_result=received.append)
    assert [result.name for result in found.results] == [
        "image_classification/digits",
        "image_text_matching/emoji",
    ]
    assert received == found.results and found.seconds > 0


def test_several_processes_find_what_one_finds() -> None:
    """Whoever is done first: scores, intervals and answers are the same, and in the same order."""
    trained_tasks = TRAINED_TASKS[:1] + TRAINED_TASKS[2:3] + TRAINED_TASKS[5:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: how a sum is divided among threads decides its last bits
    try:
        alone, shared = (
            evaluated(CONFIG.model_copy(update={"num_processes": workers}), trained_tasks) for workers in (1, 3)
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


def test_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm6.evaluate.evaluator.usable_cores", lambda: 4)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert num_workers(28, EvalConfig(), cpu) == 4
    assert num_workers(3, EvalConfig(), cpu) == 3
    assert num_workers(0, EvalConfig(), cpu) == 1
    assert num_workers(28, EvalConfig(num_processes=2), cpu) == 2
    assert num_workers(28, EvalConfig(), gpu) == 1
    with ThreadPoolExecutor(1) as pool:  # another thread may hold a lock that the child would wait for
        assert pool.submit(num_workers, 28, EvalConfig(), cpu).result() == 1


def test_results_are_complete(report: EvalReport) -> None:
    assert [(r.task, r.source) for r in report.results] == [(x.task, x.source) for x in TRAINED_TASKS]
    for result in report.results:
        task = TASKS[result.task]
        assert result.metric == task.metrics[0] and result.value == result.metrics[result.metric]
        assert all(math.isfinite(value) for value in result.metrics.values())
        assert math.isfinite(result.baseline)
        assert 2 <= result.records <= 5
        assert result.answered == (2 if result.output_modality in ("image", "audio") else 3)
        low, high = result.information_interval
        assert low <= result.information_gain <= high
        assert result.answer_entropy is None or result.output_modality == "text"


def test_samples_are_of_the_right_kind(report: EvalReport) -> None:
    kinds = {"text": str, "image": Image.Image, "audio": np.ndarray, "numbers": Histogram}
    for result in report.results:
        assert len(result.samples) == 2
        for sample in result.samples:
            assert isinstance(sample.answer, kinds[result.output_modality])
            assert sample.record_id and sample.inputs and sample.truth is not None


def test_an_untrained_model_gains_no_information(report: EvalReport) -> None:
    """The frequencies of the training targets predict better than it: nothing is claimed for it."""
    for result in report.results:
        assert result.information_gain < 0 and not result.uses_inputs and not result.beats_baseline
        assert result.null_predictor == "training frequencies"
        if result.metric == "bits_per_code":
            assert result.value > np.log2(1000) - 3


def test_a_baseline_is_beaten_only_if_score_and_information_agree(report: EvalReport) -> None:
    one = report.results[0]
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
    model, trained_task = loaded(4), TrainedTask(task="image_inpainting", source="digits")
    examples, _ = select_examples(TASKS["image_inpainting"], demo_sources("test")["digits"], CONFIG, model.modalities)
    shown = [replace(e, target=replace(e.target, options={"mask_box": (0.0, 0.0, 0.5, 0.5)})) for e in examples]
    sequences = [example_sequence(example, model.modalities) for example in shown]
    found = evaluate_task(model, trained_task, shown, sequences, demo_sources()["digits"], CONFIG)
    sequence = sequences[0]
    assert sequence.segments[-1].learn.sum() == 16, "a quarter of the 64 positions"
    answered = shown[0], shown[-1]
    bits = sequence_nll(model.omni, [example_sequence(e, model.modalities) for e in answered]) / np.log(2)
    assert found.value == pytest.approx(bits.mean() / 16 / model.image.codec.config.groups, rel=1e-4)


def test_more_records_on_request() -> None:
    found = evaluated(CONFIG.model_copy(update={"records": 30}), TRAINED_TASKS[:1]).results[0]
    assert 20 <= found.records <= 30


def test_all_records_that_the_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    source = demo_sources("test")["penguins"]
    several = ListSource("penguins", [source[index % len(source)] for index in range(90)])
    test = {**demo_sources("test"), "penguins": several}
    task = [TrainedTask(task="tabular_regression", source="penguins")]

    def result(**settings: Any) -> TaskResult:
        config = EvalConfig(samples=1, num_processes=1, **settings)
        return evaluate_tasks(loaded(4), task, demo_sources(), test, config).results[0]

    assert (found := result(seconds=1000.0)).answered == found.records == 90 and not found.left_out
    # Without time, the smallest evaluation, which has all of fewer records.
    monkeypatch.setattr("openm6.evaluate.evaluator.LEAST", {"records": 50, "answers": 20, "drawn": 5})
    found = result(seconds=0.0)
    assert (found.answered, found.records, found.left_out) == (20, 50, 40)
    assert result(seconds=0.0, records=12, answers=90).answered == 12


def test_a_task_without_test_records_is_left_out() -> None:
    test = {**demo_sources("test"), "digits": ListSource("digits", [])}
    found = evaluate_tasks(loaded(), TRAINED_TASKS[:2], demo_sources(), test, CONFIG)
    assert [result.task for result in found.results] == ["image_text_matching"]


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
    config = EvalConfig(records=5)
    for name in ("image_classification", "text_to_image"):
        found, sequences = select_examples(TASKS[name], source, config, loaded().modalities)
        assert len(sequences) == len(found)
        assert [example.record_id for example in found] == ["a", "d"]
    trained_tasks = [TrainedTask(task="text_to_image", source="s")]
    (result,) = evaluate_tasks(loaded(), trained_tasks, {"s": source}, {"s": source}, CONFIG).results
    assert result.records == 2 and math.isfinite(result.value) and math.isfinite(result.baseline)


def test_records_are_spread_over_the_source() -> None:
    found, _ = select_examples(
        TASKS["text_to_image"], demo_sources("test")["digits"], EvalConfig(records=4), loaded().modalities
    )
    ids = demo_sources("test")["digits"].values("id")
    assert found[0].record_id == ids[0] and found[-1].record_id == ids[-1] and len(found) == 4
