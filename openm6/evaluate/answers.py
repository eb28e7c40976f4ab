"""Records of a source as examples of a task, and the model's answers, whatever their target."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from openm6.core.errors import DataError
from openm6.core.seeds import numpy_generator
from openm6.data.prepare import with_negatives
from openm6.data.source import Source
from openm6.inference.engine import generate_texts, score_texts
from openm6.inference.load import LoadedModel
from openm6.inference.prefill import Prompt
from openm6.inference.question import BATCH, Answer, decode_targets
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.interface import Part
from openm6.modalities.registry import source_segments, target_segment
from openm6.tasks.slots import SHORT
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
            example = task.example(record, rng, language=language).of_source(source.name)
            converted.append(convert(example))
            examples.append(example)
        except DataError as error:
            errors.append(error)
    return examples, converted, errors


def class_nll(loaded: LoadedModel, examples: Sequence[Example], classes: Sequence[str]) -> np.ndarray:
    """Return the negative log-likelihood of the names of classes in answer to each example.  # B L"""
    candidates = [target_segment(Part("text", name, {"max_tokens": SHORT}), loaded.modalities) for name in classes]
    return score_texts(loaded, [source_segments(one.source, loaded.modalities) for one in examples], candidates)


def class_scores(loaded: LoadedModel, examples: Sequence[Example], classes: Sequence[str]) -> np.ndarray:
    """Return the log-probability of each class, by the model and by simple predictors if there are any.  # B L"""
    nll = class_nll(loaded, examples, classes)
    return loaded.numbers.label_scores(nll, classes, [one.target.options for one in examples])


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
        return _answer_texts(loaded, examples, prompts, longest)
    found: list[Answer] = []
    for start in range(0, len(examples), BATCH):
        targets = [target_segment(example.target, loaded.modalities) for example in examples[start : start + BATCH]]
        found += decode_targets(loaded, prompts[start : start + BATCH], modality, targets, sampling)
    return found


def _answer_texts(loaded: LoadedModel, examples: list[Example], prompts: list[Prompt], longest: int) -> list[Answer]:
    """The most probable class of a label that has simple predictors; other answers are generated."""
    by_classes: dict[tuple[str, ...], list[int]] = {}
    for index, example in enumerate(examples):
        label = loaded.numbers.label_predictions(example.target.options)
        by_classes.setdefault(tuple(label.classes) if label else (), []).append(index)
    free = by_classes.pop((), [])
    texts = generate_texts(loaded, [prompts[index] for index in free], Sampling(max_tokens=longest))
    found: dict[int, Answer] = dict(zip(free, texts, strict=True))
    for classes, own in by_classes.items():
        best = class_scores(loaded, [examples[index] for index in own], classes).argmax(1)
        found |= zip(own, [classes[one] for one in best], strict=True)
    return [found[index] for index in range(len(examples))]
