"""Evaluation metrics: one registry entry each, with its title, its direction and a function that scores answers."""

# Shapes: N examples, R training records, F features

import math
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image

from openm6.core.errors import DataError
from openm6.core.extensions import installed
from openm6.data.source import Source
from openm6.evaluate.answers import evenly_spaced
from openm6.evaluate.formatting import NO_BREAK, plain, words
from openm6.evaluate.results import true_values
from openm6.inference.load import LoadedModel
from openm6.inference.question import Answer
from openm6.modalities.audio import RATE, Audio, read_audio
from openm6.modalities.histogram import Histogram
from openm6.modalities.image import box_mask, pixels, read_image, squared, to_square
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Example

IMAGE_SIDE = 16  # pixels; features of an image for the kNN
AUDIO_FRAMES = 16  # features of audio, times the mel bands
NEIGHBOURS = 3
MAX_LABELS, MIN_RECORDS_PER_LABEL, MAX_RECORDS = 50, 5, 2000


@dataclass(frozen=True)
class KNNClassifier:
    """Labels an answer by its nearest training records.  # R F, R"""

    features: np.ndarray
    labels: list[str]
    extract: Callable[[object], np.ndarray]

    def predict(self, answers: list[Answer]) -> list[str]:
        """The most frequent label among the nearest records of each answer."""
        found = []
        for answer in answers:
            distance = np.square(self.features - self.extract(answer)).sum(1)  # R
            nearest = np.argsort(distance, kind="stable")[:NEIGHBOURS]
            found.append(Counter(self.labels[int(row)] for row in nearest).most_common(1)[0][0])
        return found


def fit_knn(loaded: LoadedModel, source: Source, modality: str) -> KNNClassifier | None:
    """A classifier of the source's training records; None if labels are missing, rare or too many."""
    counts = Counter(label for label in source.values("label") if label is not None)
    if not 2 <= len(counts) <= MAX_LABELS or min(counts.values()) < MIN_RECORDS_PER_LABEL:
        return None
    extract = image_features if modality == "image" else partial(_audio_features, loaded.audio)
    features, labels = [], []
    for index in evenly_spaced(len(source), MAX_RECORDS):
        with suppress(DataError):
            record = source[index]
            if record.get(modality) and record.get("label"):
                features.append(extract(record[modality]))
                labels.append(record["label"])
    return KNNClassifier(np.stack(features), labels, extract) if features else None


def image_features(raw: object) -> np.ndarray:
    """A small grey image, standardized.  # IMAGE_SIDE*IMAGE_SIDE"""
    small = to_square(read_image(raw), 64).convert("L").resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BOX)
    return _standardized(np.asarray(small, dtype=np.float32).reshape(-1) / 255)


def _audio_features(audio: Audio, raw: object) -> np.ndarray:
    """The log-mels of the voiced span, resampled to AUDIO_FRAMES and standardized."""
    samples = read_audio(raw, sys.maxsize)[: int(audio.max_seconds * RATE)]  # an answer may be longer than an input
    frames = audio.patches(samples).reshape(-1, audio.num_mels)  # time, mels
    loud = np.flatnonzero(frames.mean(1) > frames.mean(1).max() - 2.0)
    voiced = frames[loud[0] : loud[-1] + 1] if len(loud) else frames
    positions = np.linspace(0, len(voiced) - 1, AUDIO_FRAMES).round().astype(int)
    return _standardized(voiced[positions].reshape(-1))


def _standardized(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() + 1e-3)


@dataclass(frozen=True)
class Scored:
    """The input of metrics: examples with answers, and statistics of the training split.

    Images and audio: `bits_per_code` of each example for the model, `prior_bits_per_code` for the training frequencies.
    Numbers: `scale` of the column of each true value, and the baseline's point predictions as `reference`.
    """

    examples: list[Example]
    answers: list[Answer]
    bits_per_code: np.ndarray | None = None
    prior_bits_per_code: np.ndarray | None = None
    scale: list[np.ndarray] = field(default_factory=list)
    reference: list[np.ndarray] = field(default_factory=list)
    knn: KNNClassifier | None = None

    def reference_errors(self) -> np.ndarray:
        """Mean absolute error of the baseline for each example, in scales of the column.  # N"""
        rows = zip(self.examples, self.scale, self.reference, strict=True)
        return np.asarray([(np.abs(truths(e) - r) / s).mean() for e, s, r in rows])

    def compare_texts(self, compare: Callable[[str, str], float]) -> np.ndarray:
        """The answer of each example, compared with its truth.  # N"""
        rows = zip(self.answers, self.examples, strict=True)
        return np.asarray([compare(str(answer), e.answer) for answer, e in rows], float)

    def compare_numbers(self, compare: Callable[[Histogram, np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Mean over the values of each example: its distributions, compared with truths in scales of columns.  # N"""
        rows = zip(self.answers, self.examples, self.scale, strict=True)
        return np.asarray([compare(h, truths(e), s).mean() for h, e, s in rows if isinstance(h, Histogram)])


Values = Callable[[Scored], np.ndarray | None]
"""Returns the metric of each example, whose mean is the score; None if it does not apply to the source."""


@dataclass(frozen=True)
class Metric:
    """A metric. Values near `goal` are good if there is one, else high or low ones, by `better`.

    `values` is None for metrics of a whole gallery or against a second baseline, which are computed elsewhere.
    """

    name: str
    title: str
    note: str
    better: Literal["higher", "lower"]
    values: Values | None = None
    percent: bool = False
    goal: float | None = None


def truths(example: Example) -> np.ndarray:
    _, values = true_values(example.answer)
    return values[np.isfinite(values)]


def same_text(answer: str, truth: str) -> bool:
    """Equal except for case, and white space and full stops at the ends."""
    return _bare(answer) == _bare(truth)


def same_length(answer: str, truth: str) -> bool:
    return len(_bare(answer)) == len(_bare(truth))


def _bare(text: str) -> str:
    return text.strip(" .。\n").casefold()


def bigram_f1(answer: str, truth: str) -> float:
    """F1 of character bigrams, or of characters if either text has one only; needs no word boundaries."""
    size = 2 if min(len(answer), len(truth)) > 1 else 1
    first, second = (Counter(t[i : i + size] for i in range(len(t) - size + 1)) for t in (answer, truth))
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else float(answer == truth)


def relative_crps(scored: Scored) -> np.ndarray:
    """CRPS in scales of the column, divided by the baseline's mean absolute error: below 1 beats the baseline."""
    ours = scored.compare_numbers(lambda histogram, truth, scale: histogram.crps(truth) / scale)
    return ours / max(float(scored.reference_errors().mean()), 1e-9)


def _in_interval_80(histogram: Histogram, truth: np.ndarray, scale: np.ndarray) -> np.ndarray:
    low, high = histogram.interval(0.8)
    return (truth >= low) & (truth <= high)


def _knn_accuracy(scored: Scored) -> np.ndarray | None:
    if scored.knn is None:
        return None
    labels = scored.knn.predict(scored.answers)
    return np.asarray([label == e.key for label, e in zip(labels, scored.examples, strict=True)], float)


def _masked_psnr(scored: Scored) -> np.ndarray:
    """PSNR in dB of each inpainted region against the truth.  # N"""
    found = []
    for answer, example in zip(scored.answers, scored.examples, strict=True):
        assert isinstance(answer, Image.Image)
        image = read_image(example.answer, sys.maxsize)  # the model has read it, with a bound of its own
        truth, box = pixels(to_square(image, answer.width)), squared(example.target.options["mask_box"], *image.size)
        mask = box_mask(box, answer.height, answer.width).reshape(truth.shape[:2])
        error = np.square((pixels(answer) - truth)[mask] / 2).mean()
        found.append(-10 * np.log10(max(error, 1e-6)))
    return np.asarray(found, float)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", "exact match", "answers equal to the truth, except for case and full stops",
               "higher", lambda scored: scored.compare_texts(same_text), percent=True),
        Metric("char_bigram_f1", "character bigram F1", "overlap of character bigrams with the truth; 100 % is equal",
               "higher", lambda scored: scored.compare_texts(bigram_f1), percent=True),
        Metric("same_length", "same length", "answers of as many characters as the truth: the first rule of couplets",
               "higher", lambda scored: scored.compare_texts(same_length), percent=True),
        Metric("bits_per_code", "bits per code",
               "negative log-likelihood per code of the true image or audio; in inpainting, of the masked region",
               "lower", lambda scored: scored.bits_per_code),
        Metric("knn_accuracy", "kNN accuracy",
               "generated images or audio that a kNN classifier of real ones assigns to the right label",
               "higher", _knn_accuracy, percent=True),
        Metric("masked_psnr", "PSNR of the masked region",
               "similarity of the inpainted region to the truth, in decibels", "higher", _masked_psnr),
        Metric("relative_crps", "relative CRPS",
               "error of the predicted distribution (CRPS) relative to the baseline; below 100 % is better",
               "lower", relative_crps, percent=True),
        Metric("mae", "MAE of the median", "mean absolute error of the predicted median, in scales of the column",
               "lower", lambda scored: scored.compare_numbers(lambda h, truth, scale: abs(h.median() - truth) / scale)),
        Metric("recall_at_1", "recall at 1",
               "queries whose match is the nearest of all test records, in both directions and languages",
               "higher", percent=True),
        Metric("recall_at_5", "recall at 5", "queries whose match is among the five nearest",
               "higher", percent=True),
        Metric("relative_crps_seasonal_naive", "relative CRPS, seasonal naive",
               "the same relative to the error of repeating the last season of the series", "lower", percent=True),
        Metric("coverage_80", "80 % coverage",
               "true values inside the 80 % interval; above 80 % the intervals are too wide, below it too narrow",
               "higher", lambda scored: scored.compare_numbers(_in_interval_80), percent=True, goal=0.8),
    )
}  # fmt: skip


def known_metrics() -> dict[str, Metric]:
    """All metrics by name, those of the entry points `openm6.metrics` among them."""
    return {**installed("openm6.metrics", Metric), **METRICS}


def metrics_for(modality: str) -> list[str]:
    """Names of the metrics of tasks with targets of a modality, and of all installed ones."""
    tasks = [task for task in TASKS.values() if task.output_modality == modality]
    own = {name for task in tasks if not task.contrastive and not task.is_inpainting for name in task.metrics}
    return [*sorted(own), *installed("openm6.metrics", Metric)]


def all_metrics(names: tuple[str, ...], scored: Scored) -> dict[str, np.ndarray]:
    known = known_metrics()
    found = {name: compute(scored) for name in names if (compute := known[name].values) is not None}
    return {name: values for name, values in found.items() if values is not None}


def is_percent(metric: str) -> bool:
    known = known_metrics()
    return known[metric].percent if metric in known else "recall_at_" in metric or "chance_at_" in metric


def metric_title(metric: str) -> str:
    known = known_metrics()
    return known[metric].title if metric in known else words(metric)


def score(metric: str, value: float) -> str:
    """A metric's value with its unit: `62.4 %`, `24.1 dB`."""
    if not math.isfinite(value):
        return "–"
    if is_percent(metric):
        return f"{100 * value:.1f}{NO_BREAK}%"
    unit = f"{NO_BREAK}dB" if metric.endswith("psnr") else ""
    return f"{plain(value, digits=3)}{unit}"
