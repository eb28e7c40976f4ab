"""What each task must beat: answers that use the training split's habits, or a reader's common sense, and no model."""

# Letters: N examples, G codes a place, C codebook size

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from openm6.base.errors import DataError
from openm6.base.seeds import numpy_generator
from openm6.data.prepare import with_others
from openm6.data.source import Source
from openm6.evaluate.likelihood import all_hidden
from openm6.evaluate.metrics import METRICS, Scored, truths
from openm6.generate.load import Loaded
from openm6.modalities.image import Image
from openm6.modalities.registry import Modalities, target_piece
from openm6.modalities.sound import Sound
from openm6.tasks.task import Example, Task

FITTED = 400  # training records a baseline looks at


def training_examples(task: Task, source: Source, seed: int, modalities: Modalities) -> list[Example]:
    """Some training records of a source through a task, for baselines; those that are broken are left out."""
    examples = []
    for index in np.linspace(0, len(source) - 1, min(len(source), FITTED)).astype(int):
        rng = numpy_generator(seed, "baseline", int(index))
        try:
            record = source[int(index)]
            record = with_others(record, source, rng) if task.compares else record
            example = task.example(record, rng)
            target_piece(example.target, modalities)  # a broken picture or sound shows only when it is opened
            examples.append(example)
        except DataError:
            continue
    return examples


def baseline_value(task: Task, metric: str, scored: Scored, train: list[Example], loaded: Loaded) -> float:
    """The task's first metric, for its baseline.

    A text task answers with the most frequent training answer of the language; numbers with the training median or
    the last value; codes with the training frequencies of each group.
    """
    if task.gives == "text":
        answers = _frequent_answers(scored.examples, train)
        value = METRICS[metric].measure(dataclasses.replace(scored, answers=list(answers)))
        return 0.0 if value is None else value
    if metric == "crps_share":
        return 1.0  # by definition: the baseline's own error is the unit
    if metric == "code_bits":
        return _unigram_bits(scored.examples, train, loaded)
    return float("nan")


def _frequent_answers(examples: list[Example], train: list[Example]) -> list[str]:
    common: dict[str, str] = {}
    for language in {example.language for example in train}:
        counts = Counter(example.answer for example in train if example.language == language)
        common[language] = counts.most_common(1)[0][0]
    return [common.get(example.language, "") for example in examples]


def point_predictions(task: Task, examples: list[Example], loaded: Loaded) -> list[np.ndarray]:
    """The numbers baseline's prediction for each observed truth: the column's median, or the last value seen."""
    predictions = []
    for example in examples:
        truth = truths(example)
        if task.baseline == "last_value":
            past = [
                v
                for part in example.source
                if part.modality == "numbers"
                for v in part.raw.values
                if v is not None
            ]
            point = float(past[-1]) if past else 0.0
        else:
            point = loaded.numbers.scale(next(iter(example.answer)))[0]
        predictions.append(np.full(len(truth), point))
    return predictions


def spreads(examples: list[Example], loaded: Loaded) -> list[np.ndarray]:
    """The column spread behind each observed truth, the unit in which errors of unlike columns can be averaged."""
    found = []
    for example in examples:
        name = next(iter(example.answer)) if isinstance(example.answer, dict) else example.answer.name
        found.append(np.full(len(truths(example)), loaded.numbers.scale(name)[1]))
    return found


def _unigram_bits(examples: list[Example], train: list[Example], loaded: Loaded) -> float:
    """Bits per code of the test targets under the training frequencies of each group, add-half smoothed."""
    modality = loaded.modalities[examples[0].target.modality]
    assert isinstance(modality, Image | Sound)
    size = modality.codec.codebook_size

    def codes(example: Example) -> np.ndarray:
        tokens = modality.target(example.target.raw, options=all_hidden(example.target).options)
        return tokens.arrays["codes"]  # N G

    seen = np.concatenate([codes(example) for example in train])
    groups = seen.shape[1]
    counts = np.stack([np.bincount(seen[:, group], minlength=size) for group in range(groups)]) + 0.5  # G C
    bits = -np.log2(counts / counts.sum(1, keepdims=True))
    per_example = [
        np.mean([bits[group, codes(e)[:, group]].mean() for group in range(groups)]) for e in examples
    ]
    return float(np.mean(per_example))
