"""What an evaluation found, as plain data: one result per task and source, with a few records to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from openm6.evaluate.energy import EnergyAccount
from openm6.modalities.interface import Part
from openm6.modalities.numbers import Histogram

Answer = str | Image.Image | np.ndarray | Histogram
"""Text, a picture, 16 kHz samples, or distributions of numbers: what a model gives back."""


@dataclass(frozen=True)
class Sample:
    """One test record: what was given, what the model answered, and the truth (text, file bytes, or an array)."""

    given: list[Part]
    answer: Answer
    truth: Any
    record_id: str


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task over one source's test records.

    `value` is the task's first metric, `baseline` the same metric for the stated baseline. `bits_gained` is the mean
    over records of NLL(target | another record's source) - NLL(target | source), in bits, with a bootstrap 95 %
    interval: how much the model uses what it is given.
    """

    task: str
    source: str
    reads: str
    gives: str
    metric: str
    value: float
    baseline: float
    better: Literal["higher", "lower"]
    baseline_name: str
    bits_gained: float
    bits_interval: tuple[float, float]
    records: int
    answered: int
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.task}/{self.source}"

    def to_json(self) -> dict[str, Any]:
        """The entry of this task in report.json."""
        return {
            "source": self.reads,
            "target": self.gives,
            "metric": self.metric,
            "value": self.value,
            "baseline": self.baseline,
            "baseline_name": self.baseline_name,
            "better": self.better,
            "bits_gained": self.bits_gained,
            "bits_ci": list(self.bits_interval),
            "n": self.records,
            "n_answered": self.answered,
            "metrics": self.metrics,
        }


@dataclass(frozen=True)
class Judgement:
    """All results of one evaluation and how long it took."""

    results: list[TaskResult]
    seconds: float
    checkpoint: str


@dataclass(frozen=True)
class RunFacts:
    """What the report tells of the training itself."""

    name: str
    preset: str
    total_parameters: int
    active_parameters: int
    tokens: int
    steps: int
    seconds: float  # of training
    codecs: dict[str, dict[str, float]]  # scores of the codecs used
    energy: EnergyAccount | None = None  # None: the run was not metered
