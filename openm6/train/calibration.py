"""Calibration after training: how much wider or narrower predicted distributions must be, by validation records."""

from __future__ import annotations

import numpy as np

from openm6.core.errors import DataError
from openm6.core.log import get_log
from openm6.core.seeds import numpy_generator
from openm6.data.source import Source
from openm6.data.sources import open_sources
from openm6.evaluate.answers import answer, evenly_spaced
from openm6.evaluate.metrics import truths
from openm6.inference.load import LoadedModel
from openm6.inference.sampling import MaskedSampling
from openm6.modalities.histogram import Histogram, fit_width
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Example, Task
from openm6.train.recipe import MultimodalRecipe

CALIBRATED = 200  # validation records of a source


def fit_widths(recipe: MultimodalRecipe, loaded: LoadedModel) -> dict[str, float]:
    """Return the width of each number column that the tasks of the mixture predict and validation records hold.

    The central 80 % interval then holds 80 % of their values, as far as these are many.
    """
    tasks = [part for part in recipe.mixture if TASKS[part.task].output_modality == "numbers"]
    named = {part.source: recipe.sources[part.source] for part in tasks}
    sources = open_sources(named, "validation") if named else {}
    needed: dict[str, list[np.ndarray]] = {}
    blocks: dict[str, set[str]] = {}
    training = loaded.omni.training
    loaded.omni.eval()
    for part in tasks:
        examples = _examples(TASKS[part.task], sources[part.source])
        answers = answer(loaded, examples, MaskedSampling()) if examples else []
        for example, histogram in zip(examples, answers, strict=True):
            assert isinstance(histogram, Histogram)
            raw = example.target.raw
            column = next(iter(raw)) if isinstance(raw, dict) else raw.name
            needed.setdefault(column, []).append(histogram.width_needed(truths(example)))
            blocks.setdefault(column, set()).add(example.block or example.record_id)
    loaded.omni.train(training)
    found = {name: fit_width(np.concatenate(values), len(blocks[name])) for name, values in sorted(needed.items())}
    if found:
        listed = ", ".join(f"{name} {width:.2f}" for name, width in found.items())
        get_log().info(f"intervals by validation records, in widths of those predicted: {listed}")
    return found


def _examples(task: Task, source: Source) -> list[Example]:
    found = []
    for index in evenly_spaced(len(source), CALIBRATED):
        try:
            found.append(task.example(source[index], numpy_generator(0, "calibration", index)))
        except DataError:  # the quarantine or the evaluation names it
            continue
    return found
