"""Results of an evaluation as plain data: with bootstrap intervals and samples; saved until the report is written.

The energy account of a run is from the tracker in its last checkpoint and the lines of its metrics.jsonl.
"""

# Shapes: N records, B blocks, R resamples

import base64
import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from openm6.checkpoint.folder import STATE_FILE, latest, read_state
from openm6.codecs.registry import codec_scores
from openm6.core.config import build
from openm6.core.errors import CheckpointError
from openm6.core.files import replace_text
from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.energy.carbon import GPT3_JOULES_PER_TOKEN, JOULES_PER_KWH, Grid, grid
from openm6.energy.meter import EnergyConfig
from openm6.energy.tracker import EnergyTracker, EnergyUse
from openm6.inference.question import Answer
from openm6.modalities.histogram import Histogram
from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries
from openm6.models.description import CheckpointConfig
from openm6.models.omni import Omni

Lines = list[dict[str, Any]]
# Fraction of a stage's lines whose mean is its first, or its final, loss.
END_FRACTION = 0.1


def read_lines(run: RunFolder) -> Lines:
    """The averages that a run logged while training, without scores."""
    return [line for line in run.read_metrics() if isinstance(line.get("step"), int) and "evaluation" not in line]


@dataclass(frozen=True)
class EnergyAccount:
    """The joules of a run with the grid and the PUE behind them, and the losses of its stages.

    losses: stage -> mean loss at its beginning and at its end; evaluation: joules of evaluating the finished run.
    """

    tracker: EnergyTracker
    grid: Grid
    pue: float
    losses: dict[str, tuple[float, float]]
    evaluation: float = 0.0

    @property
    def joules_per_token(self) -> float:
        """Of the whole training, including the time between steps."""
        return self.tracker.joules / max(1, self.tracker.tokens)

    @property
    def of_gpt3(self) -> float:
        """Joules per token with the PUE, as a fraction of GPT-3's."""
        return self.joules_per_token * self.pue / GPT3_JOULES_PER_TOKEN

    def grams(self, joules: float) -> float:
        return self.grid.grams(joules, self.pue)

    def joules_per_point(self, stage: str) -> float | None:
        """Joules of a stage per nat by which its loss fell; None if it did not fall."""
        first, last = self.losses.get(stage, (0.0, 0.0))
        account = self.tracker.stages.get(stage)
        return account.joules / (first - last) if account is not None and first > last else None

    def to_json(self) -> dict[str, Any]:
        """The entry `energy` of report.json, and what `openm6 energy --json` writes."""
        tracker = self.tracker
        return {
            "joules": tracker.joules,
            "source": tracker.source,
            "by_source": tracker.by_source,
            "tokens": tracker.tokens,
            "joules_per_token": self.joules_per_token,
            "kwh": tracker.joules * self.pue / JOULES_PER_KWH,
            "g_co2e": self.grams(tracker.joules),
            "country": self.grid.code,
            "g_co2e_per_kwh": self.grid.grams_per_kwh,
            "grid_year": self.grid.year,
            "pue": self.pue,
            "of_gpt3_per_token": self.of_gpt3,
            "stages": {
                name: {**self._entry(use), "joules_per_point_of_loss": self.joules_per_point(name)}
                for name, use in tracker.stages.items()
            },
            "modalities": {name: self._entry(use) for name, use in tracker.modalities.items()},
            "tasks": {name: self._entry(use) for name, use in tracker.tasks.items()},
            "between_steps_joules": tracker.between,
            "repeated_joules": tracker.repeated,
            "evaluation_joules": self.evaluation,
        }

    def _entry(self, use: EnergyUse) -> dict[str, float]:
        return {
            "joules": use.joules,
            "g_co2e": self.grams(use.joules),
            "tokens": use.tokens,
            "joules_per_1000_tokens": 1000 * use.joules / max(1, use.tokens),
        }


def read_account(
    run: RunFolder, country: str | None = None, pue: float | None = None, evaluation: float = 0.0
) -> EnergyAccount:
    """The account of a run; `country` and `pue` override its settings (ConfigError); CheckpointError if not metered."""
    folder = latest(run.path)
    state = read_state(folder).get("callbacks", {}).get("meter", {})
    if not state.get("stages"):
        raise CheckpointError(f"{folder} was not metered: it is of a version before the energy meter")
    own = (run.read_config().get("loop") or {}).get("energy") or {}
    given = {name: value for name, value in (("country", country), ("pue", pue)) if value is not None}
    config = build(EnergyConfig, {**own, **given}, "the settings of energy")
    tracker = EnergyTracker.from_json(state)
    return EnergyAccount(tracker, grid(config.country), config.pue, _losses(run, tracker), evaluation)


def _losses(run: RunFolder, tracker: EnergyTracker) -> dict[str, tuple[float, float]]:
    """Mean loss over the first and over the last END_FRACTION of each stage's lines."""
    lines = [line for line in read_lines(run) if isinstance(line.get("loss"), float)]
    only = next(iter(tracker.stages)) if len(tracker.stages) == 1 else None
    found = {}
    for stage in tracker.stages:
        values = [line["loss"] for line in lines if line.get("stage", only) == stage]
        size = max(1, round(len(values) * END_FRACTION))
        if len(values) >= 2:
            found[stage] = (sum(values[:size]) / size, sum(values[-size:]) / size)
    return found


Interval = tuple[float, float]
RESAMPLES, DRAWN = 2000, 2**22  # in all, and indices that are drawn at once


def bootstrap_interval(
    values: np.ndarray, seed: int, blocks: Sequence[str] = (), weights: np.ndarray | None = None
) -> Interval:
    """95 % percentile bootstrap interval of the mean, by `weights`; NaN with fewer than two blocks.  # N -> low, high

    Records of one block are resampled together, since they depend on each other; "" marks an independent record.
    """
    if not len(values):
        return math.nan, math.nan
    blocks = blocks or [""] * len(values)
    indices: dict[str | int, int] = {}
    index = np.asarray([indices.setdefault(name or row, len(indices)) for row, name in enumerate(blocks)])  # N
    weights = np.ones(len(values)) if weights is None else weights
    sums, counts = np.bincount(index, weights * values), np.bincount(index, weights)  # B, B
    if len(sums) < 2:
        return math.nan, math.nan
    rng, means = np.random.default_rng(seed), np.empty(RESAMPLES)
    at_once = max(1, DRAWN // len(sums))
    for start in range(0, RESAMPLES, at_once):
        drawn = rng.integers(0, len(sums), (min(at_once, RESAMPLES - start), len(sums)))  # R B
        means[start : start + at_once] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
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
        return {
            "input_modality": self.input_modality, "output_modality": self.output_modality, "metric": self.metric,
            "value": self.value, "value_ci": self.value_interval, "baseline": self.baseline,
            "baseline_name": self.baseline_name, "better": self.better, "advantage_ci": self.advantage_interval,
            "beats_baseline": self.beats_baseline, "information_gain": self.information_gain,
            "information_ci": self.information_interval, "significant": self.uses_inputs,
            "null_predictor": self.null_predictor, "answer_entropy": self.answer_entropy, "n": self.records,
            "n_answered": self.answered, "n_left_out": self.left_out, "metrics": self.metrics,
        }  # fmt: skip


@dataclass(frozen=True)
class EvalReport:
    results: list[TaskResult]
    seconds: float
    checkpoint: str


@dataclass(frozen=True)
class RunFacts:
    name: str
    preset: str
    total_parameters: int
    active_parameters: int
    tokens: int
    steps: int
    seconds: float  # of training
    codecs: dict[str, dict[str, float]]  # scores of the codecs used, by name
    energy: EnergyAccount | None = None  # None: it is not known
    weights_of_step: int | None = None  # the one with the lowest held-out loss; None: the last
    held_out_loss: float | None = None  # theirs
    stopped_at: int | None = None  # the step after which the held-out loss had not fallen for long
    description: CheckpointConfig | None = None

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


def run_facts(
    name: str, omni: Omni, description: CheckpointConfig, state: dict[str, Any], energy: EnergyAccount | None
) -> RunFacts:
    """The facts about a model by the state of its checkpoint, which lacks progress if it was imported."""
    progress, best = state.get("progress", {}), state.get("callbacks", {}).get("held_out") or {}
    total, active = omni.count_parameters()
    codecs = (description.modalities.image.codec, description.modalities.audio.codec)
    return RunFacts(
        name=name, preset=description.preset, total_parameters=total, active_parameters=active,
        tokens=int(progress.get("tokens", 0)), steps=int(progress.get("step", 0)),
        seconds=float(progress.get("seconds", 0)), codecs={codec: codec_scores(codec) for codec in codecs},
        energy=energy, weights_of_step=best.get("loaded"), held_out_loss=best.get("loss"),
        stopped_at=best.get("stopped_at"), description=description,
    )  # fmt: skip


FILE = "evaluation.json"
REPORTS = ("report.json", "report.html", "README.md")  # what `write_report` writes
_TAG = "type"  # of a value that JSON cannot represent


def last_checkpoint(run: RunFolder) -> tuple[Path, bool]:
    """The newest checkpoint of a run, and whether its report is newer."""
    checkpoint = latest(run.path)
    saved = (checkpoint / STATE_FILE).stat().st_mtime_ns
    reports = [run.path / name for name in REPORTS]
    return checkpoint, all(path.is_file() and path.stat().st_mtime_ns >= saved for path in reports)


def save_evaluation(run: RunFolder, report: EvalReport, joules: float) -> None:
    """Write the results with their samples, and the joules of the evaluation; OutputError if that fails."""
    replace_text(run.path / FILE, json.dumps({"report": report, "joules": joules}, default=_encode))


def load_evaluation(run: RunFolder, checkpoint: str) -> tuple[EvalReport, float] | None:
    """The saved results of a checkpoint and their joules; None if there are none that can be read."""
    try:
        content = json.loads((run.path / FILE).read_text(encoding="utf-8"), object_hook=_decode)
        report, joules = content["report"], float(content["joules"])
        return (report, joules) if isinstance(report, EvalReport) and report.checkpoint == checkpoint else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        get_log().info(f"{run.path / FILE} cannot be read ({error}): evaluating again")
        return None


def drop_evaluation(run: RunFolder) -> None:
    (run.path / FILE).unlink(missing_ok=True)


def _encode(value: Any) -> Any:
    """What JSON cannot represent, as a mapping with the name of its type; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {_TAG: type(value).__name__, **fields}
    if isinstance(value, bytes):
        return {_TAG: "bytes", "content": base64.b64encode(value).decode()}
    if isinstance(value, Image.Image):
        return {_TAG: "image", "pixels": np.asarray(value.convert("RGB"))}
    if isinstance(value, np.ndarray):
        stream = io.BytesIO()
        np.save(stream, value, allow_pickle=False)
        return {_TAG: "array", "content": stream.getvalue()}
    if isinstance(value, Histogram):
        scale = np.stack([value.loc, value.scale], axis=1)
        fields = {"probability": value.probability, "scale": scale, "log": value.log, "most": value.most}
        return {_TAG: "Histogram", **fields}
    return value.item()  # a number of NumPy


_DECODERS: dict[Any, Callable[..., Any]] = {
    **{found.__name__: found for found in (EvalReport, TaskResult, Sample, Part, NumberSeries, Histogram)},
    "bytes": lambda content: base64.b64decode(content),
    "image": lambda pixels: Image.fromarray(pixels),
    "array": lambda content: np.load(io.BytesIO(content), allow_pickle=False),
}


def _decode(values: dict[str, Any]) -> Any:
    # A column may be called as the tag is, but its values are numbers.
    decoder = _DECODERS.get(values.get(_TAG))
    return values if decoder is None else decoder(**{name: value for name, value in values.items() if name != _TAG})
