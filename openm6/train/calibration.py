"""Calibration after training: how much wider or narrower predicted distributions must be, by validation records."""

from __future__ import annotations

import numpy as np

from openm6.core.log import get_log
from openm6.data.sources import open_sources
from openm6.evaluate.answers import answer, build_examples
from openm6.evaluate.metrics import truths
from openm6.inference.load import LoadedModel
from openm6.inference.sampling import MaskedSampling
from openm6.modalities.histogram import Histogram, fit_width
from openm6.train.recipe import MultimodalRecipe

CALIBRATED = 200  # validation records of a source


def fit_widths(recipe: MultimodalRecipe, loaded: LoadedModel) -> dict[str, dict[str, float]]:
    """Return the width of each number column that the tasks of the mixture predict and validation records hold.

    Those of rows and of series are apart, by the kind of their tokens. The central 80 % interval then holds 80 % of
    their values, as far as these are many.
    """
    tasks = [part for part in recipe.mixture if recipe.task(part.task).output_modality == "numbers"]
    named = {part.source: recipe.sources[part.source] for part in tasks}
    sources = open_sources(named, "validation") if named else {}
    needed: dict[tuple[str, str], list[np.ndarray]] = {}
    blocks: dict[tuple[str, str], set[str]] = {}
    training = loaded.omni.training
    loaded.omni.eval()
    for part in tasks:
        task, source = recipe.task(part.task), sources[part.source]
        # Broken records are reported by the evaluation.
        examples, values, _ = build_examples(task, source, CALIBRATED, (0, "calibration"), truths)
        answers = answer(loaded, examples, MaskedSampling()) if examples else []
        for example, truth, histogram in zip(examples, values, answers, strict=True):
            assert isinstance(histogram, Histogram)
            raw = example.target.raw
            key = ("numbers_out", next(iter(raw))) if isinstance(raw, dict) else ("series_out", raw.name)
            needed.setdefault(key, []).append(histogram.width_needed(truth))
            blocks.setdefault(key, set()).add(example.block or example.record_id)
    loaded.omni.train(training)
    found: dict[str, dict[str, float]] = {}
    for (kind, column), ratios in sorted(needed.items()):
        found.setdefault(kind, {})[column] = fit_width(np.concatenate(ratios), len(blocks[kind, column]))
    for kind, widths in found.items():
        listed = ", ".join(f"{name} {width:.2f}" for name, width in widths.items())
        name = {"numbers_out": "rows", "series_out": "series"}[kind]
        get_log().info(f"intervals of {name} by validation records, in widths of those predicted: {listed}")
    return found
