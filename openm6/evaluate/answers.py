"""Records of a source as examples of a task, and the model's answers, whatever their target."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from openm6.core.errors import DataError
from openm6.core.seeds import numpy_generator
from openm6.data.prepare import with_negatives
from openm6.data.source import Source
from openm6.inference.engine import generate_texts
from openm6.inference.load import LoadedModel
from openm6.inference.run import BATCH, Answer, decode_targets
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.registry import source_segments, target_segment
from openm6.tasks.task import Example, Task

Converted = TypeVar("Converted")


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most `count` indices of a total, from the first to the last."""
    return [int(index) for index in np.linspace(0, max(0, total - 1), min(total, count))]


def build_examples(
    task: Task,
    source: Source,
    count: int,
    seed: tuple[int, str],
    convert: Callable[[Example], Converted],
    language: str | None = None,
) -> tuple[list[Example], list[Converted], list[DataError]]:
    """Up to `count` records, evenly spaced, as examples with what `convert` makes of each, and the errors of others."""
    examples, converted, errors = [], [], []
    for index in evenly_spaced(len(source), count):
        rng = numpy_generator(*seed, index)
        try:
            record = source[index]
            record = with_negatives(record, source, rng) if task.needs_negatives else record
            example = task.example(record, rng, language=language)
            converted.append(convert(example))
            examples.append(example)
        except DataError as error:
            errors.append(error)
    return examples, converted, errors


def answer(loaded: LoadedModel, examples: list[Example], sampling: MaskedSampling) -> list[Answer]:
    """One answer per example; all must have targets of the same modality. Inpainting keeps what is visible.

    The prompts of a batch are packed in one row, so an answer depends on its neighbours within rounding.
    """
    if not examples:
        return []
    prompts = [source_segments(example.source, loaded.modalities) for example in examples]
    modality = examples[0].target.modality
    if modality == "text":
        default = loaded.text.max_tokens
        longest = max(int(example.target.options.get("max_tokens", default)) for example in examples)
        return list(generate_texts(loaded, prompts, Sampling(max_tokens=longest)))
    found: list[Answer] = []
    for start in range(0, len(examples), BATCH):
        targets = [target_segment(example.target, loaded.modalities) for example in examples[start : start + BATCH]]
        found += decode_targets(loaded, prompts[start : start + BATCH], modality, targets, sampling)
    return found
