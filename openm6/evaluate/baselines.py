"""What each task must beat: answers from the training split's habits, or from common sense, without a model."""

# Shapes: N examples

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from openm6.base.errors import DataError
from openm6.base.seeds import numpy_generator
from openm6.data.prepare import with_others
from openm6.data.source import Source
from openm6.evaluate.metrics import METRICS, Scored, truths
from openm6.evaluate.priors import (
    AnswerFrequencies,
    CodeFrequencies,
    NoPrior,
    TargetPrior,
    ValueFrequencies,
    target_column,
)
from openm6.inference.load import Loaded
from openm6.modalities.image import Image
from openm6.modalities.interface import Segment
from openm6.modalities.registry import Modalities, target_segment
from openm6.modalities.sound import Sound
from openm6.tasks.task import Example, Task

FITTED = 400  # training records that a baseline looks at


def training_examples(
    task: Task, source: Source, seed: int, modalities: Modalities
) -> tuple[list[Example], list[Segment]]:
    """Some training records of a source through a task, and their targets as tokens; broken ones are left out."""
    examples, targets = [], []
    for index in np.linspace(0, len(source) - 1, min(len(source), FITTED)).astype(int):
        rng = numpy_generator(seed, "baseline", int(index))
        try:
            record = source[int(index)]
            record = with_others(record, source, rng) if task.compares else record
            example = task.example(record, rng)
            targets.append(target_segment(example.target, modalities))
            examples.append(example)
        except DataError:
            continue
    return examples, targets


def fit_prior(task: Task, examples: list[Example], targets: list[Segment], loaded: Loaded) -> TargetPrior:
    """The input-free predictor of a task's targets, from training examples."""
    if not examples:
        return NoPrior()
    if task.gives == "text":
        return AnswerFrequencies(examples, targets)
    if task.gives == "numbers":
        return ValueFrequencies(examples, targets)
    modality = loaded.modalities[task.gives]
    assert isinstance(modality, Image | Sound)
    return CodeFrequencies(examples, targets, modality.codec.codebook_size)


def baseline_values(metric: str, scored: Scored, prior: TargetPrior) -> np.ndarray | None:
    """A metric for each record, for the baseline's answers in place of the model's; None if it has none.  # N

    Text: the most frequent training answer of the language. Codes: their training frequencies by position. Numbers:
    the error of the reference predictions, which is the unit of `crps_share`.
    """
    if isinstance(prior, AnswerFrequencies):
        answers = [prior.most_frequent(example.language) for example in scored.examples]
        return METRICS[metric].values(dataclasses.replace(scored, answers=list(answers)))
    if metric == "crps_share":
        errors = scored.reference_errors()
        return errors / max(float(errors.mean()), 1e-9)
    if metric == "code_bits" and scored.prior_code_bits is not None:
        return scored.prior_code_bits
    return None


@dataclass(frozen=True)
class Reference:
    """Point predictions for each example's observed truths, and the name of the rule that made them."""

    name: str
    predictions: list[np.ndarray]


def numbers_reference(
    task: Task, examples: list[Example], train: list[Example], loaded: Loaded
) -> list[Reference]:
    """Baselines of a numbers task: the column's median; for a forecast, the last value and a seasonal naive rule."""
    if task.baseline != "last_value":
        medians = [
            np.full(len(truths(example)), loaded.numbers.scale(target_column(example))[0])
            for example in examples
        ]
        return [Reference(task.baseline.replace("_", " "), medians)]
    season = find_season(train)
    references = [Reference("last value", [_repeated(example, 1) for example in examples])]
    if season > 1:
        seasonal = [_repeated(example, season) for example in examples]
        references.append(Reference(f"seasonal naive, period {season}", seasonal))
    return references


def find_season(train: list[Example]) -> int:
    """The period of two or more steps whose seasonal naive forecast errs least on training windows; 1 if none fits."""
    longest = min((len(_past(example)) for example in train), default=1)
    errors = {
        period: np.mean([np.abs(_repeated(example, period) - truths(example)).mean() for example in train])
        for period in range(2, longest + 1)
    }
    return min(errors, key=errors.__getitem__, default=1)


def _past(example: Example) -> list[float | None]:
    """The values of the series before the forecast."""
    return [v for part in example.source if part.modality == "numbers" for v in part.raw.values]


def _repeated(example: Example, period: int) -> np.ndarray:
    """The last `period` values repeated over the horizon, at the observed steps; gaps take the value before them."""
    past = np.asarray([np.nan if value is None else value for value in _past(example)], float)
    if not np.isfinite(past).any():
        past = np.zeros(1)
    seen = np.maximum.accumulate(np.where(np.isfinite(past), np.arange(len(past)), -1))
    past = past[np.where(seen >= 0, seen, np.flatnonzero(np.isfinite(past))[0])]
    values = list(example.answer.values)
    steps = np.asarray(
        [step for step, value in enumerate(values) if value is not None and np.isfinite(value)]
    )
    return past[len(past) - min(period, len(past)) + steps % min(period, len(past))]


def spreads(examples: list[Example], loaded: Loaded) -> list[np.ndarray]:
    """The column spread behind each observed truth: the unit in which errors of different columns are averaged."""
    return [
        np.full(len(truths(example)), loaded.numbers.scale(target_column(example))[1]) for example in examples
    ]
