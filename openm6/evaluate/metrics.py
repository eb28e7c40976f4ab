"""How answers are scored against the truth: one function a metric, all in one list, each with its direction."""

# Shapes: N examples

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image as Pillow

from openm6.evaluate.recognise import Recogniser
from openm6.evaluate.results import Answer
from openm6.modalities.image import hole_places, pixels, read_image, to_square
from openm6.modalities.numbers import Histogram
from openm6.tasks.task import Example


@dataclass(frozen=True)
class Scored:
    """What metrics may look at: examples with answers, code likelihoods, and what the training split knows.

    `code_bits` are bits per code of each example for the model, `prior_code_bits` for the training frequencies (image
    and audio targets only); `spread` is each truth's column spread and `reference` the baseline's point predictions
    (numbers only).
    """

    examples: list[Example]
    answers: list[Answer]
    code_bits: np.ndarray | None = None
    prior_code_bits: np.ndarray | None = None
    spread: list[np.ndarray] = field(default_factory=list)
    reference: list[np.ndarray] = field(default_factory=list)
    recogniser: Recogniser | None = None

    def reference_errors(self) -> np.ndarray:
        """Mean absolute error of the baseline for each example, in spreads of the column.  # N"""
        rows = zip(self.examples, self.spread, self.reference, strict=True)
        return np.asarray([(np.abs(truths(e) - r) / s).mean() for e, s, r in rows])


Values = Callable[[Scored], np.ndarray | None]
"""A metric of each example, whose mean is the score; None if the metric does not apply to this source."""


@dataclass(frozen=True)
class Metric:
    """A score, and which values are good: high ones, low ones, or those near `goal`."""

    name: str
    better: Literal["higher", "lower"]
    values: Values
    goal: float | None = None

    def quality(self, value: float) -> float:
        """The value on a scale on which more is better."""
        if self.goal is not None:
            return -abs(value - self.goal)
        return value if self.better == "higher" else -value


def truths(example: Example) -> np.ndarray:
    """The observed values that a numbers example wants."""
    raw = example.answer
    values = raw.values() if isinstance(raw, dict) else raw.values
    values = list(values()) if callable(values) else list(values)
    plain = np.asarray([np.nan if value is None else float(value) for value in values])
    return plain[np.isfinite(plain)]


def same_text(answer: str, truth: str) -> bool:
    """Equal but for case, and white space and full stops at the ends."""
    return answer.strip(" .。\n").casefold() == truth.strip(" .。\n").casefold()


def character_overlap(answer: str, truth: str) -> float:
    """F1 of character pairs (single characters where either is one): a gentle score that needs no word borders."""
    size = 2 if min(len(answer), len(truth)) > 1 else 1
    first, second = (Counter(t[i : i + size] for i in range(len(t) - size + 1)) for t in (answer, truth))
    shared = sum((first & second).values())
    total = sum(first.values()) + sum(second.values())
    return 2 * shared / total if total else float(answer == truth)


def _exact_match(scored: Scored) -> np.ndarray:
    pairs = zip(scored.answers, scored.examples, strict=True)
    return np.asarray([same_text(str(answer), example.answer) for answer, example in pairs], float)


def _character_f1(scored: Scored) -> np.ndarray:
    pairs = zip(scored.answers, scored.examples, strict=True)
    return np.asarray([character_overlap(str(answer), example.answer) for answer, example in pairs])


def _histograms(scored: Scored) -> list[tuple[Histogram, np.ndarray]]:
    pairs = zip(scored.answers, scored.examples, strict=True)
    return [(answer, truths(example)) for answer, example in pairs if isinstance(answer, Histogram)]


def crps_share(scored: Scored) -> np.ndarray:
    """CRPS, in spreads of the column, as a share of the baseline's mean absolute error: below 1 beats the baseline."""
    ours = [(h.crps(t) / s).mean() for (h, t), s in zip(_histograms(scored), scored.spread, strict=True)]
    return np.asarray(ours) / max(float(scored.reference_errors().mean()), 1e-9)


def _mae(scored: Scored) -> np.ndarray:
    """Absolute error of the median, in spreads of the column."""
    pairs = zip(_histograms(scored), scored.spread, strict=True)
    return np.asarray([(np.abs(h.median() - t) / s).mean() for (h, t), s in pairs])


def _coverage_80(scored: Scored) -> np.ndarray:
    """Fraction of truths inside the central 80 % interval; 0.8 is right, more is too wide, less too narrow."""
    inside = []
    for histogram, truth in _histograms(scored):
        low, high = histogram.interval(0.8)
        inside.append(((truth >= low) & (truth <= high)).mean())
    return np.asarray(inside)


def _recognised(scored: Scored) -> np.ndarray | None:
    """Share of drawn or spoken answers that a plain classifier, trained on real ones, takes for the right label."""
    if scored.recogniser is None:
        return None
    labels = scored.recogniser.labels(scored.answers)
    return np.asarray([label == e.key for label, e in zip(labels, scored.examples, strict=True)], float)


def _hole_psnr(scored: Scored) -> np.ndarray:
    """PSNR in dB inside the hole."""
    pairs = zip(scored.answers, scored.examples, strict=True)
    return np.asarray(
        [hole_psnr(answer, example) for answer, example in pairs if isinstance(answer, Pillow.Image)]
    )


def hole_psnr(answer: Pillow.Image, example: Example) -> float:
    """PSNR in dB of one filled hole against the truth."""
    truth = pixels(to_square(read_image(example.answer), answer.width))
    inside = hole_places(example.target.options["hole"], answer.height, answer.width).reshape(truth.shape[:2])
    error = np.square((pixels(answer) - truth)[inside] / 2).mean()
    return float(-10 * np.log10(max(error, 1e-6)))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", "higher", _exact_match),
        Metric("character_f1", "higher", _character_f1),
        Metric("crps_share", "lower", crps_share),
        Metric("mae", "lower", _mae),
        Metric("coverage_80", "higher", _coverage_80, goal=0.8),
        Metric("code_bits", "lower", lambda scored: scored.code_bits),
        Metric("recognised", "higher", _recognised),
        Metric("hole_psnr", "higher", _hole_psnr),
    )
}


def all_metrics(names: tuple[str, ...], scored: Scored) -> dict[str, np.ndarray]:
    """Every named metric that applies, for each example; none if nothing was answered."""
    found = {name: METRICS[name].values(scored) for name in names} if scored.examples else {}
    return {name: values for name, values in found.items() if values is not None and len(values)}
