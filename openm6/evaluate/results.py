"""Results of an evaluation as plain data: one per task and source, with bootstrap intervals and a few samples."""

# Shapes: N records, B blocks, R resamples

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from openm6.evaluate.energy import EnergyAccount
from openm6.inference.run import Answer
from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries

Interval = tuple[float, float]
RESAMPLES = 2000


def bootstrap_interval(values: np.ndarray, seed: int, blocks: Sequence[str] = (), coverage: float = 0.95) -> Interval:
    """Percentile bootstrap interval of the mean; both ends are NaN without records.  # N -> low, high

    Records of one block are resampled together, since they depend on each other; "" marks an independent record.
    """
    if not len(values):
        return math.nan, math.nan
    blocks = blocks or [""] * len(values)
    indices: dict[str | int, int] = {}
    index = np.asarray([indices.setdefault(name or row, len(indices)) for row, name in enumerate(blocks)])  # N
    sums = np.bincount(index, weights=values)  # B
    counts = np.bincount(index).astype(float)  # B
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(sums), (RESAMPLES, len(sums)))  # R B
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, ((1 - coverage) / 2, (1 + coverage) / 2))
    return float(low), float(high)


@dataclass(frozen=True)
class Sample:
    """One test record: the inputs, the model's answer, and the truth (text, file bytes, or an array)."""

    inputs: list[Part]
    answer: Answer
    truth: Any
    record_id: str


def true_values(truth: Any) -> tuple[list[str], np.ndarray]:
    """Names and values of the truth of a numbers task; NaN if a value was not observed.  # V"""
    series = isinstance(truth, NumberSeries)
    names = [truth.name] * len(truth.values) if series else list(truth)
    return names, np.array(truth.values if series else list(truth.values()), float)


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task over one source's test records; every interval is a 95 % bootstrap interval.

    `value` is the task's first metric and `baseline` the same metric for the stated baseline; `advantage_interval`
    is of their difference over the same records, positive if the model is better. `information_gain` is the mean
    over records of log2 p(y | x) - log2 p(y | null input) in bits; `null_predictor` names what predicts the latter.
    Of the test records, `left_out` were not evaluated, to save time, and of the others `answered` were answered.
    `answer_entropy` is the entropy of the test answers given the language, if they come from a closed set: no gain
    can exceed it by more than sampling error.
    """

    task: str
    source: str
    input_modality: str
    output_modality: str
    metric: str
    value: float
    value_interval: Interval
    baseline: float
    better: Literal["higher", "lower"]
    baseline_name: str
    advantage_interval: Interval
    information_gain: float
    information_interval: Interval
    null_predictor: str
    records: int
    answered: int
    left_out: int = 0
    answer_entropy: float | None = None
    summary: str = ""  # of the task
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.task}/{self.source}"

    @property
    def uses_inputs(self) -> bool:
        """Whether the information gain is significant: its whole interval lies above 0."""
        return self.information_interval[0] > 0

    @property
    def beats_baseline(self) -> bool:
        """Whether metric and information agree: both intervals lie above 0."""
        return self.uses_inputs and self.advantage_interval[0] > 0

    def to_json(self) -> dict[str, Any]:
        """The entry of this task in report.json."""
        return {
            "input_modality": self.input_modality,
            "output_modality": self.output_modality,
            "metric": self.metric,
            "value": self.value,
            "value_ci": self.value_interval,
            "baseline": self.baseline,
            "baseline_name": self.baseline_name,
            "better": self.better,
            "advantage_ci": self.advantage_interval,
            "beats_baseline": self.beats_baseline,
            "information_gain": self.information_gain,
            "information_ci": self.information_interval,
            "significant": self.uses_inputs,
            "null_predictor": self.null_predictor,
            "answer_entropy": self.answer_entropy,
            "n": self.records,
            "n_answered": self.answered,
            "n_left_out": self.left_out,
            "metrics": self.metrics,
        }


@dataclass(frozen=True)
class EvalReport:
    """All results of one evaluation and the seconds it took."""

    results: list[TaskResult]
    seconds: float
    checkpoint: str


@dataclass(frozen=True)
class RunFacts:
    """Facts about the training for the report."""

    name: str
    preset: str
    total_parameters: int
    active_parameters: int
    tokens: int
    steps: int
    seconds: float  # of training
    codecs: dict[str, dict[str, float]]  # scores of the codecs used, by name
    energy: EnergyAccount | None = None  # None: the run was not metered
    weights_of_step: int | None = None  # the one with the lowest held-out loss; None: the last
    held_out_loss: float | None = None  # theirs
    stopped_at: int | None = None  # the step after which the held-out loss had not fallen for long

    @property
    def weights(self) -> str:
        """Which weights were chosen by the held-out loss, and why training ended early, if it did; else empty."""
        sentences = []
        if self.stopped_at is not None:
            sentences.append(f"Training ended early: the held-out loss no longer fell at step {self.stopped_at:,}.")
        if self.weights_of_step is not None and self.held_out_loss is not None:
            lowest = f"whose held-out loss was the lowest, {self.held_out_loss:.4g}"
            sentences.append(f"The weights are those of step {self.weights_of_step:,}, {lowest}.")
        return " ".join(sentences)
