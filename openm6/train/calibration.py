"""Calibration after training: how much wider or narrower predicted distributions must be, by validation records."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from openm6.core.log import get_log
from openm6.data.prepare import example_sequence
from openm6.data.sources import open_sources
from openm6.evaluate.answers import answer, build_examples
from openm6.evaluate.results import true_values
from openm6.inference.load import LoadedModel
from openm6.inference.sampling import MaskedSampling
from openm6.modalities.histogram import Histogram, fit_width
from openm6.modalities.registry import Modalities
from openm6.modalities.series import NumberSeries
from openm6.tasks.task import Example
from openm6.train.recipe import MultimodalRecipe

CALIBRATED = 200  # validation records of a source
# The width without validation records: the future of a series differs from all that was seen of it.
PRIORS = {"numbers_out": 1.0, "series_out": 1.25}


def calibration_examples(recipe: MultimodalRecipe, modalities: Modalities) -> list[list[Example]]:
    """Return validation records as examples of each part of the mixture that predicts numbers, without broken ones."""
    parts = [part for part in recipe.mixture if recipe.task(part.task).output_modality == "numbers"]
    # All sources, since pairs are of others.
    sources = open_sources(recipe.sources, "validation") if parts else {}
    check = partial(example_sequence, modalities=modalities)
    made = (build_examples(recipe.task(part.task), sources[part.source], CALIBRATED, (0, "calibration"), check)
            for part in parts)  # fmt: skip
    return [examples for examples, _, _ in made]


def fit_widths(loaded: LoadedModel, calibration: Sequence[list[Example]]) -> dict[str, dict[str, float]]:
    """Return the width of each number column that the examples of each task hold.

    Those of rows and of series are apart, by the kind of their tokens. The central 80 % interval then holds 80 % of
    their values, as far as these are many.
    """
    needed: dict[tuple[str, str], list[float]] = {}
    blocks: dict[tuple[str, str], set[str]] = {}
    training = loaded.omni.training
    loaded.omni.eval()
    for examples in calibration:
        for example, histogram in zip(examples, answer(loaded, examples, MaskedSampling()), strict=True):
            assert isinstance(histogram, Histogram)
            kind = "series_out" if isinstance(example.target.raw, NumberSeries) else "numbers_out"
            names, values = true_values(example.answer)
            seen = np.isfinite(values)
            ratios = histogram.width_needed(values[seen]).tolist()
            for name, ratio in zip(np.asarray(names)[seen].tolist(), ratios, strict=True):
                needed.setdefault((kind, name), []).append(ratio)
                blocks.setdefault((kind, name), set()).add(example.block or example.record_id)
    loaded.omni.train(training)
    found: dict[str, dict[str, float]] = {}
    for (kind, column), ratios in sorted(needed.items()):
        found.setdefault(kind, {})[column] = fit_width(np.asarray(ratios), len(blocks[kind, column]), PRIORS[kind])
    for kind, widths in found.items():
        listed = ", ".join(f"{name} {width:.2f}" for name, width in widths.items())
        name = {"numbers_out": "rows", "series_out": "series"}[kind]
        get_log().info(f"intervals of {name} by validation records, in widths of those predicted: {listed}")
    return found
