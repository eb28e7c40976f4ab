"""How answers are scored against the truth: one function a metric, all in one list, each with its direction."""

# Letters: N examples

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

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

    `code_bits` are bits per code of each example (masked targets only); `spread` is each truth's column spread and
    `reference` the baseline's point predictions (numbers only).
    """

    examples: list[Example]
    answers: list[Answer]
    code_bits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    spread: list[np.ndarray] = field(default_factory=list)
    reference: list[np.ndarray] = field(default_factory=list)
    recogniser: Recogniser | None = None


Measure = Callable[[Scored], float | None]
"""The mean over examples; None where the metric does not apply to this source."""


@dataclass(frozen=True)
class Metric:
    """A score and which way is better."""

    name: str
    better: Literal["higher", "lower"]
    measure: Measure


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


def _exact_match(scored: Scored) -> float:
    return float(
        np.mean([same_text(str(a), e.answer) for a, e in zip(scored.answers, scored.examples, strict=True)])
    )


def _character_f1(scored: Scored) -> float:
    pairs = zip(scored.answers, scored.examples, strict=True)
    return float(np.mean([character_overlap(str(answer), example.answer) for answer, example in pairs]))


def _histograms(scored: Scored) -> list[tuple[Histogram, np.ndarray]]:
    pairs = zip(scored.answers, scored.examples, strict=True)
    return [(answer, truths(example)) for answer, example in pairs if isinstance(answer, Histogram)]


def _crps_share(scored: Scored) -> float:
    """CRPS, in spreads of the column, as a share of the baseline's absolute error: below 1 beats the baseline."""
    ours = [(h.crps(t) / s).mean() for (h, t), s in zip(_histograms(scored), scored.spread, strict=True)]
    theirs = [
        (np.abs(t - r) / s).mean()
        for (_, t), s, r in zip(_histograms(scored), scored.spread, scored.reference, strict=True)
    ]
    return float(np.mean(ours) / max(float(np.mean(theirs)), 1e-9))


def _mae(scored: Scored) -> float:
    """Absolute error of the median, in spreads of the column."""
    pairs = zip(_histograms(scored), scored.spread, strict=True)
    return float(np.mean([(np.abs(h.median() - t) / s).mean() for (h, t), s in pairs]))


def _coverage_80(scored: Scored) -> float:
    """Share of truths inside the central 80 % interval; 0.8 is right, more is timid, less is rash."""
    inside = []
    for histogram, truth in _histograms(scored):
        low, high = histogram.interval(0.8)
        inside.append(((truth >= low) & (truth <= high)).mean())
    return float(np.mean(inside))


def _code_bits(scored: Scored) -> float | None:
    return float(scored.code_bits.mean()) if len(scored.code_bits) else None


def _recognised(scored: Scored) -> float | None:
    """Share of drawn or spoken answers that a plain classifier, trained on real ones, takes for the right label."""
    if scored.recogniser is None:
        return None
    labels = scored.recogniser.labels(scored.answers)
    return float(
        np.mean([label == example.key for label, example in zip(labels, scored.examples, strict=True)])
    )


def _hole_psnr(scored: Scored) -> float:
    """PSNR in dB inside the hole."""
    pairs = zip(scored.answers, scored.examples, strict=True)
    return float(
        np.mean([hole_psnr(answer, example) for answer, example in pairs if isinstance(answer, Pillow.Image)])
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
        Metric("crps_share", "lower", _crps_share),
        Metric("mae", "lower", _mae),
        Metric("coverage_80", "higher", _coverage_80),
        Metric("code_bits", "lower", _code_bits),
        Metric("recognised", "higher", _recognised),
        Metric("hole_psnr", "higher", _hole_psnr),
    )
}


def all_metrics(names: tuple[str, ...], scored: Scored) -> dict[str, float]:
    """Every named metric that applies."""
    found: dict[str, Any] = {name: METRICS[name].measure(scored) for name in names}
    return {name: float(value) for name, value in found.items() if value is not None}
