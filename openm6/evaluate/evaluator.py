"""Evaluation of the tasks of a model on the test records of their sources, in parallel processes on a CPU.

Contrastive tasks are evaluated by retrieval: the image or audio of a text among all test records, and the other way.
"""

# Shapes: Q queries, G gallery, E embedding size

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveInt

from openm6.core.config import Config
from openm6.core.device import usable_cores
from openm6.core.errors import MissingFieldError
from openm6.core.log import get_log
from openm6.core.seeds import numpy_generator
from openm6.data.prepare import example_sequence
from openm6.data.source import Source
from openm6.distributed.worker_pool import WorkerPool, can_fork
from openm6.evaluate import likelihood
from openm6.evaluate.answers import answer, build_examples, evenly_spaced
from openm6.evaluate.formatting import words
from openm6.evaluate.metrics import Scored, all_metrics, fit_knn, known_metrics, relative_crps
from openm6.evaluate.results import EvalReport, Interval, Sample, TaskResult, bootstrap_interval
from openm6.inference.engine import embed
from openm6.inference.load import LoadedModel
from openm6.inference.sampling import MaskedSampling
from openm6.modalities.batch import PackedExample
from openm6.modalities.registry import Modalities, source_segments
from openm6.models.description import TrainedTask
from openm6.tasks.task import LANGUAGES, Example, Task

RANKS = (1, 5)
MAX_GALLERY = 1000


@dataclass(frozen=True)
class Search:
    """Similarities of queries to a gallery, and the matches of each query: Q G float, Q G bool.

    `blocks` are the keys of the queries; those with one key, also of several searches, depend on each other.
    """

    name: str
    similarity: np.ndarray
    matches: np.ndarray
    blocks: Sequence[str] = ()

    def hits(self, k: int) -> np.ndarray:
        """Whether a match is among the `k` most similar of each query.  # Q"""
        nearest = np.argsort(-self.similarity, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(self.matches, nearest, axis=1).any(1).astype(float)

    def chance_hits(self, k: int) -> np.ndarray:
        """Its probability for a gallery in random order: 1 − C(misses, k)/C(all, k).  # Q"""
        size = self.matches.shape[1]
        k = min(k, size)
        misses = [math.comb(size - int(count), k) / math.comb(size, k) for count in self.matches.sum(1)]
        return 1 - np.asarray(misses)

    def recalls(self) -> dict[str, float]:
        """Mean recall at each rank, and that of a gallery in random order."""
        recall = {f"recall_at_{k}": float(self.hits(k).mean()) for k in RANKS}
        return recall | {f"chance_at_{k}": float(self.chance_hits(k).mean()) for k in RANKS}

    def bits(self, scale: float) -> np.ndarray:
        """log2 of the softmax probability of the matches, relative to a uniform one.  # Q"""
        scores = scale * (self.similarity - self.similarity.max(1, keepdims=True))
        probability = (np.exp(scores) * self.matches).sum(1) / np.exp(scores).sum(1)
        return np.log2(np.maximum(probability, 1e-12)) - np.log2(self.matches.mean(1))


def evaluate_retrieval(loaded: LoadedModel, trained_task: TrainedTask, test: Source, seed: int) -> TaskResult | None:
    """Recall of a contrastive task over directions and languages, each among the metrics; None if no record fits."""
    task = loaded.task(trained_task.task)
    modalities, searches, records = loaded.modalities, list[Search](), set[str]()
    for language in LANGUAGES:
        examples, _, _ = build_examples(
            task, test, MAX_GALLERY, (seed, task.name),
            lambda x: (source_segments(x.source, modalities), source_segments([x.target], modalities)), language,
        )  # fmt: skip
        if len({example.key for example in examples}) > 1:
            searches += both_directions(loaded, task, examples, language)
            records |= {example.record_id for example in examples}
    if not searches:
        return None
    recalls = {search.name: search.recalls() for search in searches}
    keys = next(iter(recalls.values()))
    metrics = {key: float(np.mean([each[key] for each in recalls.values()])) for key in keys}
    metrics |= {f"{name}_{key}": value for name, each in recalls.items() for key, value in each.items()}
    scale = float(loaded.pool.scale.detach())
    # Each search counts alike, as in the mean of the metrics, however many queries it has.
    blocks = [block for search in searches for block in search.blocks]
    weights = np.concatenate([np.full(len(search.blocks), 1 / len(search.blocks)) for search in searches])
    found = zip(*((s.bits(scale), s.hits(1), s.chance_hits(1)) for s in searches), strict=True)
    bits, hits, chance_hits = map(np.concatenate, found)
    return TaskResult(
        task=task.name,
        source=trained_task.source,
        input_modality=task.input_modality,
        output_modality=task.output_modality,
        metric="recall_at_1",
        value=metrics["recall_at_1"],
        value_interval=bootstrap_interval(hits, seed, blocks, weights),
        baseline=metrics["chance_at_1"],
        better="higher",
        advantage_interval=bootstrap_interval(hits - chance_hits, seed, blocks, weights),
        baseline_name=task.baseline,
        information_gain=float(np.average(bits, weights=weights)),
        information_interval=bootstrap_interval(bits, seed, blocks, weights),
        null_predictor="any test record alike",
        records=len(records),
        answered=len(records),
        left_out=max(0, len(test) - MAX_GALLERY),
        summary=task.summary,
        metrics=metrics,
    )


def both_directions(loaded: LoadedModel, task: Task, examples: list[Example], language: str) -> list[Search]:
    """Searches with inputs among targets and the other way; equal texts count once."""
    unique = list({example.key: example for example in examples}.values())
    inputs = embed(loaded, [example.source for example in unique])
    targets = embed(loaded, [[example.target] for example in examples])
    similarity = inputs @ targets.T  # Q E, G E -> Q G
    matches = np.asarray([[x.key == y.key for y in examples] for x in unique])
    forward = f"{task.input_modality}_to_{task.output_modality}_{language}"
    backward = f"{task.output_modality}_to_{task.input_modality}_{language}"
    blocks = [[one.key for one in queries] for queries in (unique, examples)]
    return [Search(forward, similarity, matches, blocks[0]), Search(backward, similarity.T, matches.T, blocks[1])]


class EvalConfig(Config):
    """How many test records are evaluated, and how images and audio are decoded: the section `eval` of a recipe."""

    # Whether a run is evaluated when it has been trained; auto: unless its weights are offloaded, which takes long.
    at_end: bool | Literal["auto"] = "auto"
    # Also the tasks that only the start of the run was trained on.
    of_start: bool = False
    # Test records per task for the information gain; of them, those answered in text or numbers, and those answered in
    # images or audio. auto: all, or as many of them as take `seconds`, but no fewer than LEAST.
    records: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    answers: PositiveInt | Literal["auto"] = "auto"
    drawn: PositiveInt | Literal["auto"] = "auto"
    # For all tasks together.
    seconds: float = Field(default=60.0, ge=0.0)
    decoding: MaskedSampling = MaskedSampling()
    # Samples kept for the report.
    samples: int = Field(default=6, ge=0)
    # Parallel processes on a CPU; auto: one per core. They change no result.
    num_processes: PositiveInt | Literal["auto"] = "auto"
    seed: int = 0

    def limited(self, counts: Mapping[str, int]) -> Self:
        """With these numbers of records, answers and drawn for those that are auto."""
        return self.model_copy(update={name: n for name, n in counts.items() if getattr(self, name) == "auto"})


# The smallest numbers of an evaluation, and how many records show how long one takes.
LEAST = {"records": 160, "answers": 60, "drawn": 20}
TIMED = {"records": 16, "answers": 16, "drawn": 4}


def evaluate_tasks(
    loaded: LoadedModel,
    trained_tasks: list[TrainedTask],
    train: Mapping[str, Source],
    test: Mapping[str, Source],
    config: EvalConfig,
    on_result: Callable[[TaskResult], None] = lambda result: None,
) -> EvalReport:
    """Evaluate each trained task that has test records; `on_result` is called with each result as it is ready."""
    began = time.perf_counter()

    def evaluated(index: int) -> TaskResult | None:
        trained_task = trained_tasks[index]
        task = loaded.task(trained_task.task)
        if task.contrastive:
            return evaluate_retrieval(loaded, trained_task, test[trained_task.source], config.seed)
        source = test[trained_task.source]
        limits = fit_limits(loaded, task, source, config, config.seconds * workers / len(trained_tasks))
        examples, sequences = select_examples(task, source, limits, loaded.modalities)
        if not examples:
            return None
        result = evaluate_task(loaded, trained_task, examples, sequences, train[trained_task.source], limits)
        return replace(result, left_out=max(0, len(source) - int(limits.records)))

    workers = num_workers(len(trained_tasks), config, loaded.omni.device)
    # Tasks that generate images or audio are slow. They come first, so that all processes end together.
    fast = [loaded.task(one.task).output_modality in ("text", "numbers") for one in trained_tasks]
    results: dict[int, TaskResult] = {}
    for index, result in parallel_map(evaluated, sorted(range(len(fast)), key=fast.__getitem__), workers):
        if result is None:
            one = trained_tasks[index]
            get_log().info(f"{one.task}/{one.source}: no test records, not evaluated")
            continue
        results[index] = result
        on_result(result)
    ordered = [results[index] for index in sorted(results)]
    return EvalReport(ordered, time.perf_counter() - began, str(loaded.checkpoint))


def fit_limits(loaded: LoadedModel, task: Task, source: Source, config: EvalConfig, seconds: float) -> EvalConfig:
    """The numbers of records for one task: all of a source, or those that take so many seconds, which a few show."""
    kind: Literal["drawn", "answers"] = "drawn" if task.output_modality in ("image", "audio") else "answers"
    if len(source) <= LEAST[kind] or not {getattr(config, kind), config.records} & {"auto"}:
        return config.limited(dict.fromkeys(LEAST, len(source)) if len(source) > 1 else LEAST)
    began = time.perf_counter()
    timed = config.model_copy(update={"records": TIMED["records"]})
    examples, sequences = select_examples(task, source, timed, loaded.modalities)
    if not examples:
        return config.limited(LEAST)
    # With and without the inputs. Half of the time is for the information gain, half for answers.
    likelihood.sequence_nll(loaded.omni, [*sequences, *sequences])
    scored = time.perf_counter()
    answer(loaded, examples[: TIMED[kind]], config.decoding)
    each = {"records": (scored - began) / len(examples)}
    each[kind] = (time.perf_counter() - scored) / min(len(examples), TIMED[kind])
    fitting = {name: max(LEAST[name], int(seconds / 2 / cost)) for name, cost in each.items()}
    return config.limited({**LEAST, **{name: min(count, len(source)) for name, count in fitting.items()}})


def num_workers(tasks: int, config: EvalConfig, device: torch.device) -> int:
    """The number of processes for a number of tasks; 1 on a GPU, off Linux and in a thread, which cannot fork."""
    if device.type != "cpu" or not can_fork():
        return 1
    return max(1, min(usable_cores() if config.num_processes == "auto" else config.num_processes, tasks))


def parallel_map(
    function: Callable[[int], TaskResult | None], indices: Sequence[int], workers: int
) -> Iterator[tuple[int, TaskResult | None]]:
    """Each index with `function(index)`: in this order from one process, as they are ready from several forked ones."""
    if workers == 1:
        yield from ((index, function(index)) for index in indices)
        return

    def serve(pipe: Connection) -> None:
        while True:
            pipe.send(function(pipe.recv()))

    remedy = "evaluate again with openm6 evaluate, in one process by eval.num_processes=1 in the recipe"
    with closing(WorkerPool([serve] * workers, remedy=remedy)) as pool:
        for position, result in pool.imap_unordered(indices):
            yield indices[position], result


def select_examples(
    task: Task, source: Source, config: EvalConfig, modalities: Modalities
) -> tuple[list[Example], list[PackedExample]]:
    """Up to `records` test records, evenly spaced, as examples of the task and as tokens, without broken ones."""
    count = len(source) if config.records == "auto" else config.records
    examples, sequences, errors = build_examples(
        task, source, count, (config.seed, task.name), lambda example: example_sequence(example, modalities)
    )
    broken = [error for error in errors if not isinstance(error, MissingFieldError)]
    for error in broken:
        get_log().info(f"{task.name}: a test record is left out: {error}")
    if lacking := len(errors) - len(broken):
        total = len(examples) + len(errors)
        get_log().info(f"{task.name}: {lacking} of {total} test records lack a field that it needs")
    return examples, sequences


def evaluate_task(
    loaded: LoadedModel,
    trained_task: TrainedTask,
    examples: list[Example],
    sequences: list[PackedExample],
    train: Source,
    config: EvalConfig,
) -> TaskResult:
    """Information gain over all examples; metrics and samples over those that are answered."""
    task = loaded.task(trained_task.task)
    train_examples, train_targets = likelihood.training_examples(task, train, config.seed, loaded.modalities)
    prior = likelihood.fit_prior(task, train_examples, train_targets, loaded)
    found = likelihood.likelihoods(loaded, examples, sequences, trained_task.source, prior)
    has_codes = task.output_modality in ("image", "audio")
    most = config.drawn if has_codes else config.answers
    chosen = evenly_spaced(len(examples), len(examples) if most == "auto" else most)
    answered = [examples[row] for row in chosen]
    scored = Scored(answered, answer(loaded, answered, config.decoding))
    baseline_name = words(task.baseline)
    against_others: dict[str, np.ndarray] = {}
    if task.output_modality == "numbers":
        references = likelihood.numbers_references(task, answered, train_examples, loaded)
        scored, baseline_name, against_others = _score_numbers(scored, references, loaded)
    elif has_codes:
        chosen_sequences = [sequences[row] for row in chosen]
        scored = _score_codes(scored, task, found.bits[chosen], chosen_sequences, prior, loaded, train)
    values = all_metrics(task.metrics, scored) | against_others
    # One may not apply, such as kNN accuracy to images without labels.
    metric = next((name for name in task.metrics if name in values), task.metrics[0])
    values.setdefault(metric, np.full(len(answered), np.nan))
    better = known_metrics()[metric].better
    baseline = likelihood.baseline_values(metric, scored, prior)
    advantage = values[metric] - baseline if baseline is not None else np.full(len(answered), np.nan)

    def interval(of_each: np.ndarray, records: list[Example]) -> Interval:
        return bootstrap_interval(of_each, config.seed, [example.block for example in records])

    return TaskResult(
        task=task.name,
        source=trained_task.source,
        input_modality=task.input_modality,
        output_modality=task.output_modality,
        metric=metric,
        value=float(values[metric].mean()),
        value_interval=interval(values[metric], answered),
        baseline=float("nan") if baseline is None else float(baseline.mean()),
        better=better,
        advantage_interval=interval(advantage if better == "higher" else -advantage, answered),
        baseline_name=baseline_name,
        information_gain=float(found.gain.mean()),
        information_interval=interval(found.gain, examples),
        null_predictor=found.null_predictor,
        answer_entropy=likelihood.answer_entropy(examples, prior),
        summary=task.summary,
        records=len(examples),
        answered=len(answered),
        metrics={name: float(of_each.mean()) for name, of_each in values.items()},
        samples=_samples(scored, config),
    )


def _score_numbers(
    scored: Scored, references: dict[str, list[np.ndarray]], loaded: LoadedModel
) -> tuple[Scored, str, dict[str, np.ndarray]]:
    """Scored against the baseline with the smallest error, its name, and the error relative to the other baselines."""
    scale = likelihood.column_scales(scored.examples, loaded)
    against = {name: replace(scored, scale=scale, reference=found) for name, found in references.items()}
    best = min(against, key=lambda name: against[name].reference_errors().mean())
    keys = {name: f"relative_crps_{name.split(',')[0].replace(' ', '_')}" for name in list(references)[1:]}
    return against[best], best, {key: relative_crps(against[name]) for name, key in keys.items()}


def _score_codes(
    scored: Scored,
    task: Task,
    bits: np.ndarray,
    sequences: list[PackedExample],
    prior: likelihood.TargetPrior,
    loaded: LoadedModel,
    train: Source,
) -> Scored:
    """Scored with bits per code of the model and of the training frequencies, over the codes that carry a loss."""
    targets = [sequence.segments[-1] for sequence in sequences]
    codes = np.asarray([target.learn.sum() * target.arrays["codes"].shape[1] for target in targets])
    prior_bits = prior.bits(scored.examples, targets) / codes
    return replace(
        scored,
        bits_per_code=bits / codes,
        prior_bits_per_code=prior_bits if np.isfinite(prior_bits).all() else None,
        knn=fit_knn(loaded, train, task.output_modality) if "knn_accuracy" in task.metrics else None,
    )


def _samples(scored: Scored, config: EvalConfig) -> list[Sample]:
    """A few answered records in random order, since neighbours in a table are often alike."""
    rows = numpy_generator(config.seed, "samples").permutation(len(scored.examples))[: config.samples]
    pairs = ((scored.examples[row], scored.answers[row]) for row in rows)
    return [Sample(one.source, answered, one.answer, one.record_id) for one, answered in pairs]
