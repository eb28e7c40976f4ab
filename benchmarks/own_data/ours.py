"""OpenM6 as a user runs it: `data inspect` and `train` of the recipe as it is, or estimators for scikit-learn."""

# Letters: N records, W windows, H steps ahead, Q quantiles, K classes

from __future__ import annotations

import io
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image

import openm6
from benchmarks.own_data.frame import Frame
from benchmarks.own_data.scores import SERIES_LEVELS, TABLE_LEVELS
from benchmarks.own_data.series import Panel, Window
from openm6.api.frames import class_probabilities, number_answers, trained_for
from openm6.core.errors import DataError
from openm6.data.records import Record
from openm6.data.source import Source
from openm6.data.windows import WindowsConfig
from openm6.evaluate.answers import answer
from openm6.evaluate.run import open_own_data, source_configs
from openm6.inference.load import LoadedModel, load
from openm6.inference.sampling import MaskedSampling
from openm6.modalities.histogram import Histogram

if TYPE_CHECKING:
    import pandas as pd
from openm6.models.description import TrainedTask
from openm6.tasks.registry import TASKS
from openm6.tasks.slots import Text
from openm6.tasks.task import Example, Task

LANGUAGE = "en"
CLASS_LEVELS = np.arange(0.005, 1.0, 0.01)  # of a number that stands for a class
COMMAND = (sys.executable, "-m", "openm6")
MAX_REASON = 240  # letters
GRACE = 10.0  # seconds that a training has to end


class FailedError(Exception):
    """One sentence: why OpenM6 has no prediction for a set or a target."""


@dataclass(frozen=True)
class Ours:
    """A trained model, and how long it took."""

    run: Path
    seconds: float

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, read when it is first needed."""
        return load(self.run, "cpu")

    @property
    def trained_tasks(self) -> list[str]:
        """The pairs of task and source, for the report."""
        return [f"{one.task}/{one.source}" for one in self.loaded.description.trained_tasks]


def train(data: Path, minutes: float, work: Path, command: Sequence[str] = COMMAND) -> Ours:
    """Inspect the data, train the recipe that was written with this time, in processes of their own.

    It is tested on other rows, so none of these are set aside for a report that nobody reads.

    Raises:
        FailedError: one of the commands failed; their output is in `work`.
    """
    recipe, run = work / "recipe.yaml", work / "run"
    _call([*command, "data", "inspect", str(data), "--out", str(recipe)], work / "inspect.log")
    began = time.monotonic()
    sources = yaml.safe_load(recipe.read_text(encoding="utf-8"))["sources"]
    own = [name for name, source in sources.items() if source["kind"] != "synthetic_series"]
    settings = [f"loop.minutes={minutes:g}", "eval.at_end=false", *(f"sources.{name}.test_fraction=0" for name in own)]
    _call([*command, "train", str(recipe), *settings, "--out", str(run)], work / "train.log")
    return Ours(run, time.monotonic() - began)


def _call(words: Sequence[str], log: Path) -> None:
    with log.open("w") as stream, _process(words, stream.fileno()) as process:
        status = process.wait()
    if status != 0:
        text = " ".join(log.read_text(errors="replace").split())
        reason = re.split(r"\berror: ", text, flags=re.IGNORECASE)[-1][:MAX_REASON]
        raise FailedError(f"`openm6 {words[len(COMMAND)]}` failed: {reason or 'it names no reason'}")


@contextmanager
def _process(words: Sequence[str], output: int) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a group of its own, which ends with the block."""
    process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def predict_numbers(ours: Ours, test: Path, target: str) -> np.ndarray:
    """Return quantiles of a column for the rows of a table; NaN for rows that cannot be asked about.  # N Q

    The trained task with the most inputs is asked, of those that predict a number.

    Raises:
        FailedError: no trained task predicts this column.
    """
    found = _number_answers(ours, test, target)
    quantiles = np.full((len(found), len(TABLE_LEVELS)), np.nan)
    for row, histogram in enumerate(found):
        if histogram is not None:
            quantiles[row] = [histogram.quantile(level)[0] for level in TABLE_LEVELS]
    return quantiles


def estimate(
    rows: tuple[Frame, Frame], target: str, classes: Sequence[str] | None, seconds: float
) -> np.ndarray:  # fmt: skip
    """Train an estimator for one target, and return quantiles, or probabilities of classes, of the second rows.

    # N Q, or N K
    """
    known = [row for row, value in enumerate(rows[0].columns[target]) if classes or math.isfinite(value)]
    (X, y), (tested, _) = (_cells(own, target) for own in (rows[0].rows(known), rows[1]))  # noqa: N806
    if classes is None:
        regressor = openm6.OpenM6Regressor(time_limit=seconds).fit(X, y)
        return regressor.predict(tested, output_type="quantiles", quantile_levels=TABLE_LEVELS.tolist())
    classifier = openm6.OpenM6Classifier(time_limit=seconds).fit(X, y)
    found = np.full((len(tested), len(classes)), 1e-9)
    found[:, [list(classes).index(name) for name in classifier.classes_]] = classifier.predict_proba(tested)
    return found / found.sum(1, keepdims=True)


def _cells(frame: Frame, target: str) -> tuple[pd.DataFrame, list[Any]]:
    """The columns without the target, images as bytes of PNG files, and the target."""
    # An optional package, which --estimators alone needs.
    import pandas as pd  # noqa: PLC0415

    columns = {}
    for name, column in frame.columns.items():
        columns[name] = [_png(image) for image in column] if frame.kinds[name] == "image" else list(column)
    y = columns.pop(target)
    return pd.DataFrame(columns), y


def _png(image: Image.Image) -> bytes:
    image.save(content := io.BytesIO(), "PNG")
    return content.getvalue()


def _number_answers(ours: Ours, test: Path, target: str) -> list[Histogram | None]:
    reasons = []
    for one in trained_for(ours.loaded, "numbers"):
        records = _records(ours, one.source, test)
        readable = {row: record for row, record in enumerate(records) if record is not None}
        known = {row: record for row, record in readable.items() if target in record.get("numbers", {})}
        if not known:
            reasons.append(f"{target} is no number of source {one.source}")
            continue
        found = number_answers(ours.loaded, ours.loaded.tasks[one.task], list(known.values()), target)
        if any(found):
            answers = dict(zip(known, found, strict=True))
            return [answers.get(row) for row in range(len(records))]
        reasons.append(f"no record can be asked in {one.task}")
    raise FailedError(f"no trained task predicts {target}: {'; '.join(dict.fromkeys(reasons)) or 'none is of numbers'}")


def predict_classes(ours: Ours, test: Path, target: str, classes: Sequence[str], truth: Sequence[str]) -> np.ndarray:
    """Return probabilities of the classes for each record, by the likelihoods of their names.  # N K

    A category that was taken for a number is predicted as one: the nearest class of each quantile counts. A record that
    cannot be asked about has NaN.

    Raises:
        FailedError: no trained task predicts this column.
    """
    for one in trained_for(ours.loaded, "text"):
        task, records = ours.loaded.tasks[one.task], _records(ours, one.source, test)
        if task.optional and any(target in (record or {}).get("categories", {}) for record in records):
            return _probabilities(ours, task, records, target, classes)
        if not (isinstance(task.target, Text) and task.target.name == "label"):
            continue
        labels = [str((record or {}).get("label")) for record in records]
        # The label of the source may be another column.
        if sum(own == true for own, true in zip(labels, truth, strict=True)) < len(truth) / 2:
            continue
        return _probabilities(ours, task, records, target, classes)
    try:
        answers, values = _number_answers(ours, test, target), np.asarray([float(name) for name in classes])
    except ValueError:
        raise FailedError(f"no trained task predicts {target}") from None
    found = np.full((len(answers), len(classes)), np.nan)
    for row, histogram in enumerate(answers):
        if histogram is not None:
            quantiles = np.asarray([histogram.quantile(level)[0] for level in CLASS_LEVELS])
            nearest = np.abs(quantiles[:, None] - values).argmin(1)
            found[row] = (np.bincount(nearest, minlength=len(classes)) + 0.5) / (len(quantiles) + 0.5 * len(classes))
    return found


def _probabilities(
    ours: Ours, task: Task, records: Sequence[Record | None], target: str, classes: Sequence[str]
) -> np.ndarray:
    """NaN for records that cannot be read or asked.  # N K"""
    known = {row: record for row, record in enumerate(records) if record is not None}
    found = np.full((len(records), len(classes)), np.nan)
    found[list(known)] = class_probabilities(ours.loaded, task, list(known.values()), target, classes)
    return found


def _records(ours: Ours, name: str, test: Path) -> list[Record | None]:
    """The test records in the order of their rows; None for one that cannot be read."""
    configs = source_configs(ours.loaded.description.sources, str(ours.run))
    source = open_own_data(str(test), {name: configs[name]})[name]
    records = [_record(source, index) for index in range(len(source))]
    if test.is_dir():
        # A file of an image folder is named by its row.
        return sorted(records, key=lambda record: int(Path(str((record or {})["id"])).stem))
    return records


def _record(source: Source, index: int) -> Record | None:
    try:
        return source[index]
    except DataError:
        return None


def forecast(ours: Ours, panel: Panel, table: Path) -> np.ndarray:
    """Return quantiles of each forecast; steps beyond the trained horizon follow forecasts of those before.  # W H Q

    Raises:
        FailedError: no trained task forecasts these columns.
    """
    for one in ours.loaded.description.trained_tasks:
        config = source_configs(ours.loaded.description.sources, str(ours.run))[one.source]
        if isinstance(config, WindowsConfig) and TASKS[one.task].output_modality == "numbers":
            if missing := [name for name in panel.targets if name not in config.columns]:
                raise FailedError(f"the series of the recipe lack {', '.join(missing)}")
            return _forecast(ours.loaded, one, config.model_copy(update={"path": str(table), "stride": 1}), panel)
    raise FailedError("the recipe has no series")


def _forecast(loaded: LoadedModel, trained: TrainedTask, config: WindowsConfig, panel: Panel) -> np.ndarray:
    task, steps = TASKS[trained.task], panel.horizon.steps
    found = np.full((len(panel.windows), steps, len(SERIES_LEVELS)), np.nan)
    for start in range(0, steps, config.horizon):
        ahead = min(config.horizon, steps - start)
        block = config.model_copy(update={"horizon": ahead})
        source = block.open_held_out(trained.source)
        by_row = {source[index]["id"]: index for index in range(len(source))}
        examples = {}
        for index, window in enumerate(panel.windows):
            first = panel.rows[window.group][window.origin + start - block.context]
            number = by_row.get(f"{trained.source}/{int(first)}")
            if number is not None:
                examples[index] = _window_example(task, source[number], window, found[index, :start])
        answers = answer(loaded, list(examples.values()), MaskedSampling())
        for index, histogram in zip(examples, answers, strict=True):
            if isinstance(histogram, Histogram):
                quantiles = np.stack([histogram.quantile(level) for level in SERIES_LEVELS], 1)
                found[index, start : start + ahead] = quantiles
    return found


def _window_example(task: Task, record: Record, window: Window, before: np.ndarray) -> Example:
    """A window of one column, in whose context the steps forecast so far stand for the true ones."""
    values = list(record["series"][window.column])
    context = record["extra"]["context"]
    for step, quantiles in enumerate(before[-context:]):
        value = float(quantiles[len(SERIES_LEVELS) // 2])
        values[context - min(len(before), context) + step] = None if np.isnan(value) else value
    # Every step ahead is asked for, whether or not its true value is there.
    asked = [value if value is not None else 0.0 for value in values[context:]]
    covariates = [*record["extra"].get("past_covariates", ()), *record["extra"].get("known_covariates", ())]
    beside = {name: record["series"][name] for name in covariates}
    own = {**record, "series": {**beside, window.column: [*values[:context], *asked]}}
    return task.example(own, np.random.default_rng(0), language=LANGUAGE)
