"""Calibration after training by validation records: widths of distributions, weights of predictions of labels."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from openm6.core.log import get_log
from openm6.data.prepare import example_sequence
from openm6.data.records import unless_broken
from openm6.data.source import Source
from openm6.data.sources import open_sources
from openm6.data.windows import WindowSource
from openm6.evaluate.answers import answer, build_examples, class_nll, evenly_spaced
from openm6.evaluate.results import true_values
from openm6.inference.load import LoadedModel
from openm6.inference.sampling import MaskedSampling
from openm6.modalities.histogram import Histogram, fit_width
from openm6.modalities.registry import Modalities
from openm6.modalities.series import NumberSeries
from openm6.modalities.simple_predictors import EXPERTS, LabelPrediction, fit_weights, log_softmax
from openm6.tasks.own import for_number
from openm6.tasks.slots import Derived, hold_out, hold_out_number, pinned, predictable
from openm6.tasks.task import Example, Task
from openm6.train.recipe import MultimodalRecipe

# Validation records of each label, series or number column of a source, examples of all its number columns, and those
# at checkpoints before the last.
RECORDS, MAX_EXAMPLES, EARLY_EXAMPLES = 1000, 3000, 200
COLUMN_RECORDS = 100  # of a source, in which number columns are looked for
PRIORS = {"numbers_out": 1.0, "series_out": 1.25}  # widths without records: the future of a series differs


def first_widths(sources: Iterable[Source]) -> dict[str, dict[str, float]]:
    """Return the widths of forecasts without validation windows."""
    columns = [name for source in sources if isinstance(source, WindowSource) for name in source.config.columns]
    return {"series_out": dict.fromkeys(columns, PRIORS["series_out"])} if columns else {}


def calibration_examples(recipe: MultimodalRecipe, modalities: Modalities) -> list[list[Example]]:
    """Return validation records as examples of each part of the mixture that is calibrated, without broken ones.

    A task of a drawn number column is asked for each of them: a few records of one are too few for its intervals.
    """
    parts = [part for part in recipe.mixture
             if (task := recipe.task(part.task)).output_modality == "numbers" or task.may_be_label]  # fmt: skip
    sources = open_sources(recipe.sources, "validation") if parts else {}  # all sources, since pairs are of others
    check = partial(example_sequence, modalities=modalities)
    found = []
    for part in parts:
        tasks = asked_columns(recipe.task(part.task), sources[part.source])
        count = min(RECORDS, max(1, MAX_EXAMPLES // len(tasks)))
        asked = (build_examples(task, sources[part.source], count, (0, "calibration"), check)[0] for task in tasks)
        found.append([example for examples in asked for example in examples])
    return found


def asked_columns(task: Task, source: Source) -> list[Task]:
    """The task once for each number column that it may draw, if it draws one."""
    if not isinstance(task.target, Derived) or task.target.build not in (hold_out, hold_out_number):
        return [task]
    records = (unless_broken(source.__getitem__, row) for row in evenly_spaced(len(source), COLUMN_RECORDS))
    columns = set[str]()
    for record in filter(None, records):
        own = pinned(record)
        columns |= {own} if own else predictable(record).keys()
    return [_asked_as_trained(task, name) for name in sorted(columns)] or [task]


def _asked_as_trained(task: Task, column: str) -> Task:
    """The task with this column as its target, of records and in languages that the task itself may ask about."""
    target = for_number(task, column).target
    assert isinstance(target, Derived)
    return replace(task, target=replace(target, needs=lambda record, language: (
        column in predictable(record) and task.target.present(record, language)
    )))  # fmt: skip


def fit_widths(
    loaded: LoadedModel, calibration: Sequence[list[Example]], most: int = MAX_EXAMPLES
) -> dict[str, dict[str, float]]:
    """Return the width of each number column of the examples, rows and series apart, and the weights of labels.

    At most so many examples of each part of the mixture are answered.
    """
    needed: dict[tuple[str, str], list[tuple[float, str]]] = {}
    training = loaded.omni.training
    loaded.omni.eval()
    for examples in (one for one in calibration if one and one[0].target.modality == "numbers"):
        asked = examples[:: math.ceil(len(examples) / most)]
        for example, histogram in zip(asked, answer(loaded, asked, MaskedSampling()), strict=True):
            assert isinstance(histogram, Histogram)
            kind = "series_out" if isinstance(example.target.raw, NumberSeries) else "numbers_out"
            names, values = true_values(example.answer)
            seen = np.isfinite(values)
            ratios = histogram.width_needed(values[seen]).tolist()
            for name, ratio in zip(np.asarray(names)[seen].tolist(), ratios, strict=True):
                needed.setdefault((kind, name), []).append((ratio, example.block or example.record_id))
    weights = _fit_label_weights(loaded, calibration, most)
    loaded.omni.train(training)
    found: dict[str, dict[str, float]] = {}
    for (kind, column), pairs in sorted(needed.items()):
        ratios, blocks = np.asarray([ratio for ratio, _ in pairs]), {block for _, block in pairs}
        found.setdefault(kind, {})[column] = fit_width(ratios, len(blocks), PRIORS[kind])
    for kind, widths in found.items():
        listed = ", ".join(f"{name} {width:.2f}" for name, width in widths.items())
        name = {"numbers_out": "rows", "series_out": "series"}[kind]
        get_log().info(f"intervals of {name} by validation records, in widths of those predicted: {listed}")
    return found | weights


def _fit_label_weights(
    loaded: LoadedModel, calibration: Sequence[list[Example]], most: int
) -> dict[str, dict[str, float]]:
    """Return the weights of the model's and of simple log-probabilities of labels, by what is given of them."""
    asked: dict[str, list[tuple[Example, LabelPrediction]]] = {}
    for example in (one for examples in calibration for one in examples[:: max(1, math.ceil(len(examples) / most))]):
        predicted = loaded.numbers.label_predictions(example.target.options)
        if predicted is not None and example.answer in predicted.classes:
            asked.setdefault(predicted.key, []).append((example, predicted))
    weights = {}
    for key, pairs in sorted(asked.items()):
        classes = pairs[0][1].classes
        own = log_softmax(-class_nll(loaded, [example for example, _ in pairs], classes))
        experts = np.stack([one.with_model(row, classes) for row, (_, one) in zip(own, pairs, strict=True)])  # R M+1 L
        truth = np.asarray([classes.index(one.answer) for one, _ in pairs])
        fitted = fit_weights(experts.swapaxes(0, 1), truth, pairs[0][1].prior).tolist()
        weights[key] = dict(zip(("model", *EXPERTS), fitted, strict=False))  # a network is the last, if any
        listed = ", ".join(f"{name} {one:.2f}" for name, one in weights[key].items())
        get_log().info(f"{key}: weights by {len(pairs)} validation records: {listed}")
    return weights
