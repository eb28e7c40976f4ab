"""Every lesson of a model judged on the test records of its source."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from openm6.base.errors import DataError, MissingFieldError
from openm6.base.log import get_log
from openm6.base.seeds import numpy_generator
from openm6.data.prepare import example_sequence, with_others
from openm6.data.source import Source
from openm6.evaluate.answers import answer
from openm6.evaluate.baselines import (
    Reference,
    baseline_values,
    fit_prior,
    numbers_reference,
    spreads,
    training_examples,
)
from openm6.evaluate.config import JudgeConfig
from openm6.evaluate.intervals import UNKNOWN, bootstrap_interval
from openm6.evaluate.likelihood import likelihoods
from openm6.evaluate.metrics import METRICS, Scored, all_metrics, crps_share
from openm6.evaluate.priors import AnswerFrequencies, TargetPrior
from openm6.evaluate.recognise import build_recogniser
from openm6.evaluate.results import Judgement, Sample, TaskResult
from openm6.evaluate.retrieval import judge_retrieval
from openm6.evaluate.side_by_side import number_of_judges, side_by_side
from openm6.inference.load import Loaded
from openm6.modalities.batch import PackedExample
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
    examples, sequences = test_examples(task, test, config, loaded.modalities)
    return judge_lesson(loaded, lesson, examples, sequences, train, config) if examples else None


def test_examples(
    task: Task, source: Source, config: JudgeConfig, modalities: Modalities
) -> tuple[list[Example], list[PackedExample]]:
    """Up to `records` test records, spread over the source, through the task and as tokens, without broken ones."""
    examples: list[Example] = []
    sequences: list[PackedExample] = []
    skipped = 0
    spread = np.linspace(0, max(0, len(source) - 1), min(len(source), config.records)).astype(int)
    for index in spread:
        rng = numpy_generator(config.seed, task.name, int(index))
        try:
            record = source[int(index)]
            record = with_others(record, source, rng) if task.compares else record
            example = task.example(record, rng)
            sequences.append(example_sequence(example, modalities))
            examples.append(example)
        except MissingFieldError:
            skipped += 1
        except DataError as error:
            get_log().info(f"{task.name}: a test record is left out: {error}")
    if skipped:
        get_log().info(f"{task.name}: {skipped} of {len(spread)} test records lack a field that it needs")
    return examples, sequences


def judge_lesson(
    loaded: Loaded,
    lesson: Lesson,
    examples: list[Example],
    sequences: list[PackedExample],
    train: Source,
    config: JudgeConfig,
) -> TaskResult:
    """Information gain over all examples; metrics and samples over those that are answered."""
    task = task_named(lesson.task)
    train_examples, train_targets = training_examples(task, train, config.seed, loaded.modalities)
    prior = fit_prior(task, train_examples, train_targets, loaded)
    found = likelihoods(loaded, examples, sequences, lesson.source, prior)

    most = config.drawn if task.gives in ("image", "sound") else config.answers
    chosen = np.linspace(0, len(examples) - 1, min(len(examples), most)).astype(int)
    answered = [examples[row] for row in chosen]
    scored = Scored(answered, answer(loaded, answered, config.decoding))
    baseline_name = task.baseline.replace("_", " ")
    more: dict[str, np.ndarray] = {}
    if task.gives == "numbers":
        references = numbers_reference(task, answered, train_examples, loaded)
        scored, baseline_name, more = _score_numbers(scored, references, loaded)
    elif task.gives in ("image", "sound"):
        chosen_sequences = [sequences[row] for row in chosen]
        scored = _score_codes(scored, task, found.bits[chosen], chosen_sequences, prior, loaded, train)
    values = all_metrics(task.metrics, scored) | more
    blocks = [example.block for example in examples]
    return TaskResult(
        task=task.name,
        source=lesson.source,
        reads=task.reads,
        gives=task.gives,
        **_compared(
            task.metrics[0], values, baseline_values(task.metrics[0], scored, prior), answered, config
        ),
        baseline_name=baseline_name,
        information_gain=float(found.gain.mean()),
        information_interval=bootstrap_interval(found.gain, config.seed, blocks),
        null_predictor=found.null_predictor,
        answer_entropy=answer_entropy(examples, prior),
        records=len(examples),
        answered=len(answered),
        metrics={name: float(of_each.mean()) for name, of_each in values.items()},
        samples=_samples(scored, config),
    )


def _compared(
    metric: str,
    values: dict[str, np.ndarray],
    baseline: np.ndarray | None,
    answered: list[Example],
    config: JudgeConfig,
) -> dict[str, Any]:
    """The first metric beside its baseline, as fields of a TaskResult."""
    blocks = [example.block for example in answered]
    advantage = UNKNOWN
    if baseline is not None:
        sign = 1 if METRICS[metric].better == "higher" else -1
        advantage = bootstrap_interval(sign * (values[metric] - baseline), config.seed, blocks)
    return {
        "metric": metric,
        "value": float(values[metric].mean()),
        "value_interval": bootstrap_interval(values[metric], config.seed, blocks),
        "baseline": float("nan") if baseline is None else float(baseline.mean()),
        "better": METRICS[metric].better,
        "advantage_interval": advantage,
    }


def _score_numbers(
    scored: Scored, references: list[Reference], loaded: Loaded
) -> tuple[Scored, str, dict[str, np.ndarray]]:
    """Scored against the baseline with the smallest error, its name, and the error relative to further baselines."""
    spread = spreads(scored.examples, loaded)
    against = {x.name: replace(scored, spread=spread, reference=x.predictions) for x in references}
    best = min(against, key=lambda name: against[name].reference_errors().mean())
    names = {x.name: f"crps_share_{x.name.split(',')[0].replace(' ', '_')}" for x in references[1:]}
    more = {key: crps_share(against[name]) for name, key in names.items()}
    return against[best], best, more


def _score_codes(
    scored: Scored,
    task: Task,
    bits: np.ndarray,
    sequences: list[PackedExample],
    prior: TargetPrior,
    loaded: Loaded,
    train: Source,
) -> Scored:
    """Scored with bits per code of the model and of the training frequencies, over the codes that carry a loss."""
    targets = [sequence.segments[-1] for sequence in sequences]
    codes = np.asarray([target.learn.sum() * target.arrays["codes"].shape[1] for target in targets])
    recogniser = build_recogniser(loaded, train, task.gives) if "recognised" in task.metrics else None
    prior_bits = prior.bits(scored.examples, targets) / codes
    return replace(
        scored,
        code_bits=bits / codes,
        prior_code_bits=prior_bits if np.isfinite(prior_bits).all() else None,
        recogniser=recogniser,
    )


def answer_entropy(examples: list[Example], prior: TargetPrior) -> float | None:
    """Entropy in bits of the answers given the language; None unless they come from a closed set seen in training.

    Counts underestimate it: (kinds of answers - 1) / 2N nats are added for each language (Miller 1955), up to the
    entropy of equally frequent training answers.
    """
    if not isinstance(prior, AnswerFrequencies) or not prior.knows(examples):
        return None
    total = 0.0
    for language in {example.language for example in examples}:
        answers = Counter(example.answer for example in examples if example.language == language)
        size = answers.total()
        counted = -sum(n / size * math.log2(n / size) for n in answers.values())
        missing = (len(answers) - 1) / (2 * size * math.log(2))
        total += size * min(counted + missing, math.log2(len(prior.counts[language])))
    return total / len(examples)


def _samples(scored: Scored, config: JudgeConfig) -> list[Sample]:
    """A few answered records, picked by lot: neighbours in a table are often alike."""
    lot = numpy_generator(config.seed, "samples").permutation(len(scored.examples))[: config.samples]
    found = [(scored.examples[int(row)], scored.answers[int(row)]) for row in lot]
    return [Sample(example.source, given, example.answer, example.record_id) for example, given in found]
