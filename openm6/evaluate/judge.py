"""Every lesson of a model judged on the test records of its source."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from openm6.base.errors import DataError
from openm6.base.log import get_log
from openm6.base.seeds import numpy_generator
from openm6.data.prepare import example_sequence, with_others
from openm6.data.source import Source
from openm6.evaluate.answers import answer
from openm6.evaluate.baselines import baseline_value, point_predictions, spreads, training_examples
from openm6.evaluate.config import JudgeConfig
from openm6.evaluate.likelihood import BITS, all_hidden, bootstrap_interval, gained_bits
from openm6.evaluate.metrics import METRICS, Scored, all_metrics
from openm6.evaluate.recognise import build_recogniser
from openm6.evaluate.results import Judgement, Sample, TaskResult
from openm6.evaluate.retrieval import judge_retrieval
from openm6.evaluate.side_by_side import number_of_judges, side_by_side
from openm6.generate.load import Loaded
from openm6.modalities.registry import Modalities
from openm6.models.description import Lesson
from openm6.tasks.registry import task_named
from openm6.tasks.task import Example, Task

Sources = Mapping[str, Source]


def judge(
    loaded: Loaded,
    lessons: list[Lesson],
    train: Sources,
    test: Sources,
    config: JudgeConfig,
    tell: Callable[[TaskResult], None] = lambda result: None,
) -> Judgement:
    """Judges each lesson that has test records; `tell` hears of each result as it comes."""
    began = time.perf_counter()

    def judged(number: int) -> TaskResult | None:
        lesson = lessons[number]
        return _judged(loaded, lesson, train[lesson.source], test[lesson.source], config)

    workers = number_of_judges(len(lessons), config, loaded.omni.device)
    results: dict[int, TaskResult] = {}
    for number, result in side_by_side(judged, _longest_first(lessons), workers):
        if result is None:
            get_log().info(f"{lessons[number].task}/{lessons[number].source}: no test records, not judged")
            continue
        results[number] = result
        tell(result)
    found = [results[number] for number in sorted(results)]
    return Judgement(found, time.perf_counter() - began, str(loaded.checkpoint))


def _longest_first(lessons: list[Lesson]) -> list[int]:
    """Numbers of the lessons, those that draw and speak before the others, so that no process ends long after."""
    quick = [task_named(lesson.task).gives in ("text", "numbers") for lesson in lessons]
    return sorted(range(len(lessons)), key=quick.__getitem__)


def _judged(
    loaded: Loaded, lesson: Lesson, train: Source, test: Source, config: JudgeConfig
) -> TaskResult | None:
    task = task_named(lesson.task)
    if task.contrasts:
        return judge_retrieval(loaded, lesson, test, config)
    examples = test_examples(task, test, config, loaded.modalities)
    return judge_lesson(loaded, lesson, examples, train, config) if examples else None


def test_examples(task: Task, source: Source, config: JudgeConfig, modalities: Modalities) -> list[Example]:
    """Up to `records` test records, spread over the source, through the task; broken ones are left out."""
    examples: list[Example] = []
    spread = np.linspace(0, max(0, len(source) - 1), min(len(source), config.records)).astype(int)
    for index in spread:
        rng = numpy_generator(config.seed, task.name, int(index))
        try:
            record = source[int(index)]
            record = with_others(record, source, rng) if task.compares else record
            example = task.example(record, rng)
            example_sequence(example, modalities)  # a broken picture or sound shows only when it is opened
            examples.append(example)
        except DataError as error:
            get_log().info(f"{task.name}: a test record is left out: {error}")
    return examples


def judge_lesson(
    loaded: Loaded, lesson: Lesson, examples: list[Example], train: Source, config: JudgeConfig
) -> TaskResult:
    """Bits gained over all examples, metrics and samples over those that are answered."""
    task = task_named(lesson.task)
    nats, bits = gained_bits(loaded, examples)
    most = config.drawn if task.gives in ("image", "sound") else config.answers
    chosen = np.linspace(0, len(examples) - 1, min(len(examples), most)).astype(int)
    scored = _score(loaded, task, [examples[row] for row in chosen], nats[chosen], train, config)
    metrics = all_metrics(task.metrics, scored)
    metric = task.metrics[0]
    lectures = training_examples(task, train, config.seed, loaded.modalities)
    low, high = bootstrap_interval(bits, config.seed)
    return TaskResult(
        task=task.name,
        source=lesson.source,
        reads=task.reads,
        gives=task.gives,
        metric=metric,
        value=metrics[metric],
        baseline=baseline_value(task, metric, scored, lectures, loaded),
        better=METRICS[metric].better,
        baseline_name=task.baseline.replace("_", " "),
        bits_gained=float(bits.mean()) if len(bits) else float("nan"),
        bits_interval=(low, high),
        records=len(bits),
        answered=len(chosen),
        metrics=metrics,
        samples=_samples(scored, config),
    )


def _score(
    loaded: Loaded, task: Task, examples: list[Example], nats: np.ndarray, train: Source, config: JudgeConfig
) -> Scored:
    answers = answer(loaded, examples, config.decoding)
    if task.gives == "numbers":
        references = point_predictions(task, examples, loaded)
        return Scored(examples, answers, spread=spreads(examples, loaded), reference=references)
    if task.gives == "text":
        return Scored(examples, answers)
    recogniser = build_recogniser(loaded, train, task.gives) if "recognised" in task.metrics else None
    modality = loaded.image if task.gives == "image" else loaded.sound
    whole = all_hidden(examples[0].target)
    places = len(modality.target(whole.raw, options=whole.options))
    bits = nats * BITS / places / modality.codec.groups
    return Scored(examples, answers, code_bits=bits, recogniser=recogniser)


def _samples(scored: Scored, config: JudgeConfig) -> list[Sample]:
    """A few answered records, picked by lot: neighbours in a table are often alike."""
    lot = numpy_generator(config.seed, "samples").permutation(len(scored.examples))[: config.samples]
    found = [(scored.examples[int(row)], scored.answers[int(row)]) for row in lot]
    return [Sample(example.source, given, example.answer, example.record_id) for example, given in found]
