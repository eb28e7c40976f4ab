"""Command `own-data`: one set after the other, baselines first, then OpenM6; a table of wins and losses."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.harness import Deadline, Json, Report
from benchmarks.own_data.cnn import cnn_classes, cnn_quantiles
from benchmarks.own_data.datasets import DATASETS, OwnData
from benchmarks.own_data.frame import FOLDS, Frame, split, write_image_folder, write_table
from benchmarks.own_data.ours import FailedError, Ours, estimate, forecast, predict_classes, predict_numbers, train
from benchmarks.own_data.scores import (
    OURS,
    TABLE_LEVELS,
    Measure,
    compare,
    label_measures,
    marginal_quantiles,
    markdown,
    number_measures,
    pooled,
    series_measures,
)
from benchmarks.own_data.series import (
    NO_ETS,
    Panel,
    boosting_on_lags,
    exponential_smoothing,
    ridge_on_lags,
    seasonal_naive,
)
from benchmarks.own_data.tables import (
    boosted_classes,
    boosted_quantiles,
    forest_classes,
    logistic_classes,
    word_classes,
    word_quantiles,
)
from openm6.core.errors import ConfigError, DataError, OpenM6Error, nearest
from openm6.core.files import check_writable, replace_text, to_json

KINDS = ("series", "table", "image", "mixed")
CACHE = Path("~/.cache/openm6/own-data")
LIMIT = 24 * 3600.0  # seconds; a whole run takes hours
OVER = "its time was over"
Method = Callable[[Deadline], Any]
Train = Callable[[Path, float, Path], Ours]


def bench_own_data(
    minutes: Annotated[float, typer.Option("--minutes", min=0.01, help="Time of each method per set.")] = 8.0,
    only: Annotated[str | None, typer.Option("--only", metavar="A,B", help="Sets to run; default: all.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", metavar="|".join(KINDS), help="Sets of one kind.")] = None,
    development: Annotated[bool, typer.Option("--development", help="Leave out the sets that are unseen.")] = False,
    folds: Annotated[
        int, typer.Option("--folds", min=1, max=FOLDS, help="Fifths of the rows that are tested, one after the other.")
    ] = 1,
    estimators: Annotated[
        bool, typer.Option("--estimators", help="Fit OpenM6Regressor or OpenM6Classifier to each target instead.")
    ] = False,
    cache: Annotated[Path, typer.Option("--cache", metavar="DIR", help="Folder that keeps fetched packages.")] = CACHE,
    keep: Annotated[Path | None, typer.Option("--keep", metavar="DIR", help="Keep data, recipes and runs.")] = None,
    table: Annotated[
        Path | None, typer.Option("--table", metavar="FILE", help="Also write the tables to this.")
    ] = None,
    json_path: Json = None,
) -> dict[str, Any]:
    """Train on data that OpenM6 was not made for, with `data inspect` and `train`, against simple methods.

    One thing runs at a time; a second run waits for the first.

    \b
    Example: python -m benchmarks own-data --kind series --minutes 5 --json own.json
    """
    if estimators and importlib.util.find_spec("pandas") is None:
        raise ConfigError("--estimators needs pandas: pip install pandas")
    chosen = choose(only, kind, development)
    if table is not None:
        check_writable(table, "--table")
    found: list[dict[str, Any]] = []
    report = Report(json_path, LIMIT)  # before a wait for another run, because it checks its path
    with alone(), report:
        report.update({"minutes": minutes, "folds": folds, "estimators": estimators, "sets": found})
        report.at_end(lambda: _print_tables(found, table))
        for data in chosen:
            found.append(run_one(data, minutes, cache.expanduser(), keep, None if estimators else train, folds))
            _log(found[-1])
    return report.found


def choose(only: str | None, kind: str | None, development: bool) -> list[OwnData]:
    """Return the chosen sets in their order.

    Raises:
        ConfigError: an unknown name or kind, or none is left.
    """
    by_name = {data.name: data for data in DATASETS}
    names = list(by_name) if only is None else [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in by_name:
            raise ConfigError(f"no set {name!r}; {nearest(name, list(by_name))}")
    if kind not in (None, *KINDS):
        raise ConfigError(f"no kind {kind!r}: choose one of {', '.join(KINDS)}")
    chosen = [by_name[name] for name in names]
    chosen = [one for one in chosen if kind in (None, one.kind) and not (development and one.unseen)]
    if not chosen:
        raise ConfigError("no set is left: change --only, --kind or --development")
    return chosen


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other run of this benchmark is in progress on this machine: their times would be wrong."""
    with (Path(tempfile.gettempdir()) / "openm6-own-data.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write("another run of own-data is in progress: waiting for its end\n")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_one(
    data: OwnData, minutes: float, cache: Path, keep: Path | None, trainer: Train | None = train, folds: int = 1
) -> dict[str, Any]:  # fmt: skip
    """Return the report of one set: scores of all methods, or the sentence why it was not run.

    trainer: None: an estimator for scikit-learn is fitted to each target, series apart
    folds: how many fifths of the rows are tested, if the data has no split of its own
    """
    report: dict[str, Any] = {
        "name": data.name, "kind": data.kind, "unseen": data.unseen, "source": data.source, "license": data.license,
        "scores": [], "failure": "", "notes": {}, "seconds": {}, "tasks": [], "folds": 1,
    }  # fmt: skip
    try:
        frame = data.load(cache)
    except (DataError, ImportError) as error:
        report["failure"] = f"not run: {error}"
        return report
    work = Path(tempfile.mkdtemp(prefix=f"own-data-{data.name}-")) if keep is None else keep / data.name
    if keep is not None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    try:
        run = Run(data, frame, minutes, work, report, trainer)
        if data.horizon:
            measures = run.series()
        else:
            report["folds"] = 1 if frame.test is not None else folds
            measures = pooled([run.records(fold) for fold in range(report["folds"])])
        report["scores"] = [compare(measure) for measure in measures]
        if keep is not None:
            replace_text(work / "report.json", to_json(report, indent=1) + "\n")
    finally:
        if keep is None:
            shutil.rmtree(work, ignore_errors=True)
    return report


class Run:
    """One set: its files, the baselines, the model, and the report that they fill."""

    def __init__(
        self, data: OwnData, frame: Frame, minutes: float, work: Path, report: dict[str, Any], trainer: Train | None
    ) -> None:
        self.data, self.frame, self.minutes = data, frame, minutes
        self.whole, self.work, self.report, self.trainer = work, work, report, trainer

    def series(self) -> list[Measure]:
        """Forecast all windows with each method."""
        horizon = self.data.horizon
        assert horizon is not None
        panel = Panel(self.frame, self.data.targets, horizon)
        predicted = {
            name: found
            for name, method in (
                ("seasonal naive", seasonal_naive),
                ("ridge on lags", ridge_on_lags),
                ("boosting on lags", boosting_on_lags),
                ("ETS", exponential_smoothing),
            )
            if (found := self.timed(name, partial(method, panel))) is not None
        }
        whole = write_table(self.frame, self.work / f"{self.data.name}-all.csv")
        history = write_table(panel.training(), self.work / "history" / f"{self.data.name}.csv")
        ours = self.train(history)
        if ours is not None:
            self.ours(OURS, lambda: predicted.update({OURS: forecast(ours, panel, whole)}))
        return series_measures(predicted, panel.truth, panel.columns, panel.blocks)

    def records(self, fold: int) -> list[Measure]:
        """Predict all test records of a fold with each method, target by target."""
        train_rows, test_rows = split(self.frame, fold)
        self.work = self.whole / f"fold-{fold}" if fold else self.whole
        self.work.mkdir(exist_ok=True)
        numbers: dict[str, dict[str, np.ndarray]] = {}
        labels: dict[str, dict[str, np.ndarray]] = {}
        for target in self.data.targets:
            is_label = self.frame.kinds[target] == "category"
            own = self.label_baselines(train_rows, test_rows, target) if is_label else {}
            labels |= {target: own} if is_label else {}
            for method, found in {} if is_label else self.number_baselines(train_rows, test_rows, target).items():
                numbers.setdefault(method, {})[target] = found
        if self.trainer is None:
            for target in self.data.targets:
                self.ours(target, partial(self.estimate, (train_rows, test_rows), target, numbers, labels))
        else:
            paths = self.write(train_rows, test_rows)
            ours = self.train(paths[0])
            if ours is not None:
                self.predict(ours, paths[1], train_rows, test_rows, numbers, labels)
        measures: list[Measure] = []
        for target, own in labels.items():
            measures += label_measures(target, own, self.classes(target), test_rows.columns[target])
        truth, train_values = (
            {target: rows.numbers(target) for target in self.data.targets if target not in labels}
            for rows in (test_rows, train_rows)
        )
        return measures + (number_measures(numbers, truth, train_values) if truth else [])

    def classes(self, target: str) -> list[str]:
        """Return the classes of a label, in order."""
        return sorted(set(self.frame.columns[target]))

    def write(self, train_rows: Frame, test_rows: Frame) -> tuple[Path, Path]:
        """Write training and test rows as files of their own; only those for training are inspected and trained on."""
        if self.data.kind == "image":
            label = self.data.targets[0]
            train_path, test_path = (self.work / f"{self.data.name}{end}" for end in ("", "-new"))
            return write_image_folder(train_rows, label, train_path), write_image_folder(test_rows, label, test_path)
        # In folders of their own, since inspection reads a file `x-test.csv` beside `x-train.csv`, too.
        paths = [self.work / folder / f"{self.data.name}.csv" for folder in ("history", "new")]
        return write_table(train_rows, paths[0]), write_table(test_rows, paths[1])

    def label_baselines(self, train_rows: Frame, test_rows: Frame, target: str) -> dict[str, np.ndarray]:
        """Return probabilities of the classes by each baseline that fits the columns."""
        frame, classes, methods = self.frame, self.classes(target), dict[str, Method]()
        rows = (train_rows, test_rows)
        if len(frame.names("number")) + len(frame.names("category")) > 1:
            with_words = self.data.kind == "table"
            boosted = partial(boosted_classes, *rows, target, classes, with_words)
            methods[self.named("numbers", "boosting")] = untimed(boosted)
            methods[self.named("numbers", "logistic")] = untimed(partial(logistic_classes, *rows, target, classes))
        for name in frame.names("text"):
            methods[self.named(name, "TF-IDF")] = untimed(partial(word_classes, *rows, name, target, classes))
        for name in frame.names("image"):
            known = (train_rows.columns[name], train_rows.columns[target], test_rows.columns[name], classes)
            with_truth = (*known[:3], test_rows.columns[target], classes, self.data.flips)
            methods[self.named("image", "CNN")] = partial(cnn_classes, *with_truth)
            methods[self.named("image", "pixel forest")] = untimed(partial(forest_classes, *known))
        return self.all_of(target, methods)

    def number_baselines(self, train_rows: Frame, test_rows: Frame, target: str) -> dict[str, np.ndarray]:
        """Return quantiles by each baseline that fits the columns."""
        rows, methods = (train_rows, test_rows), dict[str, Method]()
        values = train_rows.numbers(target)
        methods["training median"] = untimed(partial(marginal_quantiles, values, TABLE_LEVELS, len(test_rows)))
        methods[self.named("numbers", "boosting")] = partial(
            boosted_quantiles, *rows, target, with_words=self.data.kind == "table"
        )
        for name in self.frame.names("text") if self.data.kind == "mixed" else ():
            methods[self.named(name, "TF-IDF")] = untimed(partial(word_quantiles, *rows, name, target))
        for name in self.frame.names("image"):
            known = (train_rows.columns[name], values, test_rows.columns[name])
            methods[self.named("image", "CNN")] = partial(cnn_quantiles, *known, self.data.flips)
        return self.all_of(target, methods)

    def named(self, inputs: str, method: str) -> str:
        """Return the name of a method, with what it is given if other methods are given something else."""
        return f"{inputs}: {method}" if self.data.kind == "mixed" else method

    def all_of(self, target: str, methods: dict[str, Method]) -> dict[str, np.ndarray]:
        """Return what each method predicts of a target, without those that failed."""
        predicted = {}
        for name, method in methods.items():
            found = self.timed(name, method, target)
            if isinstance(found, tuple):
                found, epochs = found
                self.note(name, f"{epochs:g} epochs")
            if found is not None:
                predicted[name] = found
        return predicted

    def timed(self, name: str, method: Method, target: str = "") -> Any:
        """Return what a method predicts within its time; None with a note if it cannot."""
        began, found = time.monotonic(), None
        try:
            found = method(Deadline(60 * self.minutes))
            if found is None:
                self.note(name, OVER)
        except ImportError:
            self.note(name, NO_ETS)
        except (DataError, ValueError) as error:
            self.note(name, f"{target}: {error}" if target else str(error))
        seconds = self.report["seconds"]
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - began, 1)
        return found

    def note(self, name: str, sentence: str) -> None:
        """Note why a method has no result."""
        self.report["notes"][name] = sentence

    def train(self, path: Path) -> Ours | None:
        """Train OpenM6; None with the reason if that fails."""
        try:
            ours = (self.trainer or train)(path, self.minutes, self.work)
        except FailedError as error:
            self.report["failure"] = str(error)
            return None
        seconds = self.report["seconds"]
        seconds["openm6: train"] = round(seconds.get("openm6: train", 0.0) + ours.seconds, 1)
        self.report["tasks"] = ours.trained_tasks
        return ours

    def ours(self, target: str, predict: Callable[[], None]) -> None:
        """Predict with OpenM6, or note why it cannot."""
        began = time.monotonic()
        try:
            predict()
        except (FailedError, OpenM6Error) as error:
            self.report["failure"] = self.report["failure"] or str(error)
            self.note(f"{OURS}: {target}", str(error))
        seconds = self.report["seconds"]
        seconds["openm6: predict"] = round(seconds.get("openm6: predict", 0.0) + time.monotonic() - began, 1)

    def estimate(
        self, rows: tuple[Frame, Frame], target: str, numbers: dict[str, dict[str, np.ndarray]],
        labels: dict[str, dict[str, np.ndarray]],
    ) -> None:  # fmt: skip
        """Add the predictions of an estimator that is fitted to one target."""
        if target in labels:
            labels[target][OURS] = estimate(rows, target, self.classes(target), 60 * self.minutes)
        else:
            numbers.setdefault(OURS, {})[target] = estimate(rows, target, None, 60 * self.minutes)

    def predict(
        self,
        ours: Ours,
        path: Path,
        train_rows: Frame,
        test_rows: Frame,
        numbers: dict[str, dict[str, np.ndarray]],
        labels: dict[str, dict[str, np.ndarray]],
    ) -> None:
        """Add the predictions of OpenM6; a record that it cannot be asked about gets what the training rows have."""

        def filled(target: str, found: np.ndarray, marginal: np.ndarray) -> np.ndarray:
            lacking = np.isnan(found).any(1)
            if lacking.any():
                self.note(f"{OURS}: {target}", f"{lacking.sum()} of {len(found)} records lack what the task needs")
            return np.where(lacking[:, None], marginal, found)

        def predict_number(target: str) -> None:
            found = predict_numbers(ours, path, target)
            marginal = marginal_quantiles(train_rows.numbers(target), TABLE_LEVELS, len(found))
            numbers.setdefault(OURS, {})[target] = filled(target, found, marginal)

        def predict_label(target: str) -> None:
            train_labels, classes = list(train_rows.columns[target]), self.classes(target)
            found = predict_classes(ours, path, target, classes, list(test_rows.columns[target]))
            frequencies = np.asarray([train_labels.count(name) for name in classes]) / len(train_labels)
            labels[target][OURS] = filled(target, found, frequencies)

        for target in self.data.targets:
            self.ours(target, partial(predict_label if target in labels else predict_number, target))


def untimed(call: Callable[[], Any]) -> Method:
    """Return a method that needs no time limit."""
    return lambda deadline: call()


def _log(one: dict[str, Any]) -> None:
    best = next((row for row in one["scores"] if "result" in row), None)
    words = one["failure"] or "no comparison"
    if best is not None:
        words = (
            f"{best['result']}: {best['metric']} {best['values'][OURS]:.4g} against {best['values'][best['best']]:.4g}"
        )
    sys.stderr.write(f"{one['name']}: {words}\n")
    sys.stderr.flush()


def _print_tables(found: Sequence[dict[str, Any]], path: Path | None) -> dict[str, Any]:
    text = markdown(found)
    sys.stderr.write(text)
    if path is not None:
        replace_text(path, text)
    return {}
