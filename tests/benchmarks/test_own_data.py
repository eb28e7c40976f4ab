"""Benchmark own-data: baselines where the right answer is known, scores, the records that predictions belong to."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks.harness import Deadline
from benchmarks.own_data import cnn
from benchmarks.own_data import ours as ours_module
from benchmarks.own_data.command import Run, choose, run_one
from benchmarks.own_data.datasets import DATASETS, Horizon, OwnData, table
from benchmarks.own_data.frame import Frame, split, write_image_folder, write_table
from benchmarks.own_data.ours import FailedError, Ours, train
from benchmarks.own_data.packages import Package, read_member
from benchmarks.own_data.scores import (
    OURS,
    SERIES_LEVELS,
    TABLE_LEVELS,
    Measure,
    at_level,
    compare,
    label_measures,
    markdown,
    number_measures,
    pooled,
    series_measures,
)
from benchmarks.own_data.series import Panel, boosting_on_lags, filled, ridge_on_lags, seasonal_naive
from benchmarks.own_data.tables import (
    boosted_classes,
    boosted_quantiles,
    logistic_classes,
    word_classes,
    word_quantiles,
)
from openm6.core.errors import ConfigError, DataError
from openm6.data.inspect import inspect_path
from openm6.modalities.histogram import BINS, Histogram
from openm6.train.run import train_recipe

MINUTE = 60.0


def grown(rows: int, groups: tuple[str, ...] = ("",)) -> Frame:
    """Monthly sales that grow by 1 % a month, with a season: exact in logs."""
    months = np.arange(rows)
    columns: dict[str, list[Any]] = {"month": [], "shop": [], "sales": []}
    for number, group in enumerate(groups):
        sales = (100 + 50 * number) * 1.01**months * (1 + 0.3 * np.sin(2 * np.pi * months / 12))
        columns["month"] += [f"{2000 + month // 12}-{month % 12 + 1:02d}-01" for month in months]
        columns["shop"] += [group] * rows
        columns["sales"] += sales.tolist()
    return Frame(columns, {"month": "time", "shop": "category", "sales": "number"})


def monthly(group: str | None = None, steps: int = 12) -> Horizon:
    return Horizon(steps, season=12, test_rows=24, stride=6, time="month", group=group)


def errors(panel: Panel, found: np.ndarray | None) -> np.ndarray:
    assert found is not None
    return np.abs(found[..., len(SERIES_LEVELS) // 2] - panel.truth) / np.abs(panel.truth)


def test_ridge_on_lags_continues_a_trend_beyond_all_training_values() -> None:
    panel = Panel(grown(144, ("north", "south")), ("sales",), monthly("shop"))
    found = ridge_on_lags(panel, Deadline(MINUTE))
    assert found.shape == (6, 12, 9) and errors(panel, found).max() < 0.01
    assert panel.truth.max() > max(values.max() for values in panel.train_values("sales"))


def test_seasonal_naive_is_exact_on_a_season_alone_and_its_interval_empty() -> None:
    values = [10.0 + month % 12 for month in range(96)]
    frame = Frame({"month": [str(month) for month in range(96)], "x": values}, {"month": "time", "x": "number"})
    panel = Panel(frame, ("x",), monthly())
    found = seasonal_naive(panel, Deadline(MINUTE))
    assert errors(panel, found).max() == 0 and np.ptp(found, axis=-1).max() == 0


def test_boosting_on_lags_beats_the_last_season_where_it_shifts() -> None:
    panel = Panel(grown(108), ("sales",), monthly())
    boosted, naive = boosting_on_lags(panel, Deadline(MINUTE)), seasonal_naive(panel, Deadline(MINUTE))
    assert errors(panel, boosted).mean() < errors(panel, naive).mean() < 0.2
    assert boosting_on_lags(panel, Deadline(0.0)) is None


def test_windows_lie_in_the_test_rows_and_missing_values_are_filled_before_them() -> None:
    panel = Panel(grown(60), ("sales",), monthly())
    assert [window.origin for window in panel.windows] == [36, 42, 48]
    assert len(panel.training()) == 36
    # A season that holds no value is left out.
    gaps = np.asarray([np.nan, np.nan, np.nan, 3.0, np.nan, 5.0])
    assert filled(gaps, 2).tolist() == [3.0, 3.0, 3.0, 5.0] and filled(gaps[:2], 2).size == 0


def linear(count: int = 400) -> tuple[Frame, Frame]:
    """A number that follows from a number, a category and noise of 1; a class and words that follow from it."""
    rng = np.random.default_rng(0)
    x, kind = rng.uniform(0, 10, count), rng.integers(0, 2, count)
    y = 3 * x + 20 * kind + rng.normal(0, 1, count)
    columns = {
        "x": x.tolist(), "kind": ["left" if one else "right" for one in kind], "y": y.tolist(),
        "size": ["large" if value > 25 else "small" for value in y],
        "note": [f"it is {'huge' if value > 25 else 'tiny'} today" for value in y],
    }  # fmt: skip
    kinds = {"x": "number", "kind": "category", "y": "number", "size": "category", "note": "text"}
    return split(Frame(columns, kinds))


def test_boosted_quantiles_follow_number_and_category_with_the_width_of_the_noise() -> None:
    train_rows, test_rows = linear()
    found = boosted_quantiles(train_rows.without(["size"]), test_rows, "y", Deadline(MINUTE))
    truth = test_rows.numbers("y")
    assert np.abs(at_level(found, TABLE_LEVELS, 0.5) - truth).mean() < 2 and (np.diff(found) >= 0).all()
    assert 0.6 < ((truth > found[:, 0]) & (truth < found[:, -1])).mean() < 1
    assert boosted_quantiles(train_rows, test_rows, "y", Deadline(0.0)) is None


def test_classes_and_words_that_follow_from_the_row_are_found() -> None:
    train_rows, test_rows = linear()
    classes, truth = ["large", "small"], list(test_rows.columns["size"])
    predicted = {
        "boosting": boosted_classes(train_rows, test_rows, "size", classes),
        "logistic": logistic_classes(train_rows, test_rows, "size", classes),
        "words": word_classes(train_rows, test_rows, "note", "size", classes),
    }
    accuracy, log_loss = (measure.values for measure in label_measures("size", predicted, classes, truth))
    assert {name: round(found.mean(), 1) for name, found in accuracy.items()} == dict.fromkeys(predicted, 1.0)
    assert max(found.mean() for found in log_loss.values()) < 0.2
    found = word_quantiles(train_rows, test_rows, "note", "y")
    middle = np.median(test_rows.numbers("y"))
    large = np.asarray(truth) == "large"
    assert found[large, 5].min() > middle > found[~large, 5].max() - 5


def bars(count: int) -> tuple[list[Image.Image], list[str]]:
    """Images with a bright bar across or down, anywhere."""
    rng = np.random.default_rng(0)
    images, labels = [], []
    for number in range(count):
        values = rng.integers(0, 120, (16, 16, 3))
        first = int(rng.integers(2, 12))
        values[(slice(first, first + 3), slice(None)) if number % 2 else (slice(None), slice(first, first + 3))] += 130
        images.append(Image.fromarray(values.astype(np.uint8)))
        labels.append("across" if number % 2 else "down")
    return images, labels


def test_the_network_finds_shapes_and_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cnn, "WIDTHS", (8, 8, 16, 16))
    monkeypatch.setattr(cnn, "BATCH", 16)
    images, labels = bars(160)
    classes = ["across", "down"]
    found, epochs = cnn.cnn_classes(
        images[:128], labels[:128], images[128:], labels[128:], classes, True, Deadline(MINUTE), 12
    )
    assert epochs == 12 and found.shape == (32, 2) and np.allclose(found.sum(1), 1)
    assert (found.argmax(1) == np.asarray([classes.index(label) for label in labels[128:]])).mean() > 0.9
    values = np.arange(64, dtype=float)
    quantiles, epochs = cnn.cnn_quantiles(images[:64], values, images[:3], False, Deadline(0.0))
    assert epochs == 0 and quantiles.shape == (3, 10) and (np.diff(quantiles) >= 0).all()


def test_a_comparison_is_a_win_a_tie_or_a_loss_with_its_interval() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.uniform(1, 2, 200)
    half = compare(Measure("y", "MAE", "lower", {OURS: theirs / 2, "a": theirs, "b": 9 * theirs}, np.arange(200)))
    assert half["best"] == "a" and half["result"] == "win" and half["advantage"] == pytest.approx(0.5)
    assert half["against"]["b"]["advantage"] == pytest.approx(1 - 1 / 18)
    noisy = compare(Measure("y", "MAE", "lower", {OURS: rng.permutation(theirs), "a": theirs}, np.arange(200)))
    assert noisy["result"] == "tie" and noisy["advantage_interval"][0] < 0 < noisy["advantage_interval"][1]
    right = {OURS: np.zeros(50), "a": np.ones(50)}
    assert compare(Measure("y", "accuracy", "higher", right, np.arange(50)))["result"] == "loss"
    lacking = np.where(np.arange(200) == 7, np.nan, theirs)
    lost = compare(Measure("y", "MAE", "lower", {OURS: lacking, "a": theirs, "b": lacking}, np.arange(200)))
    assert (lost["best"], lost["result"], lost["against"]["b"]["result"]) == ("a", "loss", "loss")
    won = compare(Measure("y", "MAE", "lower", {OURS: theirs, "b": lacking}, np.arange(200)))
    assert won["result"] == "win"
    # A single block has no variation to estimate an interval from.
    one = compare(Measure("y", "MAE", "lower", {OURS: theirs, "a": theirs}, np.zeros(200)))
    assert one["intervals"][OURS] == [pytest.approx(theirs.mean())] * 2


def test_relative_crps_is_that_of_the_evaluation_and_coverage_counts_what_lies_inside() -> None:
    truth = {"y": np.asarray([1.0, np.nan, 5.0]), "z": np.asarray([2.0, 2.0, 3.0])}
    exact = {name: np.tile(values[:, None], len(TABLE_LEVELS)) for name, values in truth.items()}
    middle = {name: np.full((3, len(TABLE_LEVELS)), 3.0) for name in truth}
    measures = number_measures({OURS: exact, "median": middle}, truth, {"y": np.full(4, 3.0), "z": np.full(4, 3.0)})
    mean = measures[0]
    assert mean.target == "mean of 2 columns" and mean.values[OURS].max() == 0
    # A point prediction by the median has the mean absolute error as its CRPS.
    assert measures[1].values["median"].mean() == pytest.approx(1.0)
    assert [len(measure.blocks) for measure in measures[1:]] == [2, 2, 3, 3]
    offsets = (SERIES_LEVELS - 0.5) * 10
    found = {"a": np.tile(100.0 + offsets, (2, 4, 1))}
    future = np.asarray([[96.0, 104.0, 95.9, 104.1], [100.0, 103.0, np.nan, np.nan]])
    mae, _, coverage = series_measures(found, future, np.asarray(["x", "x"]), np.arange(2))
    assert coverage.values["a"].tolist() == [0.5, 1.0]
    assert mae.values["a"] * np.nanmean(future) == pytest.approx([4.05, 1.5])


def test_a_set_is_split_the_same_way_each_time_and_written_as_a_user_has_it(tmp_path: Path) -> None:
    images, labels = bars(10)
    frame = Frame({"photo": images, "price": [1.5, np.nan, *range(8)], "label": labels},
                  {"photo": "image", "price": "number", "label": "category"})  # fmt: skip
    first, again = split(frame), split(frame)
    assert [len(part) for part in first] == [8, 2]
    assert first[1].columns["price"] == again[1].columns["price"]
    tested = [price for fold in range(5) for price in split(frame, fold)[1].columns["price"]]
    assert sorted(map(str, tested)) == sorted(map(str, frame.columns["price"]))
    lines = write_table(frame, tmp_path / "shop.csv").read_text().splitlines()
    assert lines[:3] == ["photo,price,label", "shop-photo/0.png,1.5,down", "shop-photo/1.png,,across"]
    assert (tmp_path / "shop-photo" / "9.png").is_file()
    folder = write_image_folder(frame.without(["price"]), "label", tmp_path / "images")
    assert sorted(path.name for path in (folder / "across").iterdir()) == [f"{row}.png" for row in (1, 3, 5, 7, 9)]
    marked = Frame(frame.columns, frame.kinds, np.arange(10) < 4)
    assert [len(part) for part in split(marked)] == [6, 4]
    assert table("a;b\nx;y\n1;NA\n", {"b": "number"}, ";", skip=(1,)).columns["b"] == pytest.approx(
        [np.nan], nan_ok=True
    )


def test_a_package_is_read_from_the_cache_and_must_be_the_one_named(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-1.0"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny.whl", "w") as wheel:
        wheel.writestr(zipfile.ZipInfo("tiny/data.csv"), "a,b\n")
    digest = hashlib.sha256((folder / "tiny.whl").read_bytes()).hexdigest()
    package = Package("PyPI", "tiny", "1.0", digest)
    assert read_member(package, "tiny/data.csv", tmp_path) == b"a,b\n"
    with pytest.raises(DataError, match="holds no file"):
        read_member(package, "tiny/other.csv", tmp_path)
    with pytest.raises(DataError, match="not that of tiny 1.0"):
        read_member(Package("PyPI", "tiny", "1.0", "0" * 64), "tiny/data.csv", tmp_path)


def test_each_kind_has_unseen_sets_and_all_name_source_and_license() -> None:
    kinds = Counter(data.kind for data in DATASETS)
    unseen = Counter(data.kind for data in DATASETS if data.unseen)
    assert kinds.keys() == unseen.keys() and min(kinds.values()) >= 4 and min(unseen.values()) >= 2
    assert all(data.source and data.license and data.targets for data in DATASETS)
    assert len({data.name for data in DATASETS}) == len(DATASETS)
    assert not any(data.unseen for data in choose(None, None, True))
    assert [data.name for data in choose("wine, digits", None, False)] == ["wine", "digits"]
    with pytest.raises(ConfigError, match="wine"):
        choose("whine", None, False)
    with pytest.raises(ConfigError, match="no set is left"):
        choose("wine", "series", False)


def quick(path: Path, minutes: float, work: Path) -> Ours:
    """A training of two steps in this process, without the artificial series and the trees, which take seconds."""
    recipe = work / "recipe.yaml"
    found = yaml.safe_load(inspect_path(str(path)).usable_recipe())
    found["mixture"] = [part for part in found["mixture"] if part["source"] in (path.stem, f"{path.stem}_series")]
    found["sources"] = {part["source"]: found["sources"][part["source"]] for part in found["mixture"]}
    recipe.write_text(yaml.safe_dump(found))
    settings = ["loop.steps=2", "eval.at_end=false", "model.overrides.num_layers=1", "packing.batch_size=2"]
    settings += ["loop.num_processes=1", "modalities.numbers.predictors=ridge"]
    train_recipe(str(recipe), settings, False, work / "run", "cpu")
    return Ours(work / "run", 1.0)


def exact(loaded: object, examples: list[Any], sampling: object) -> list[Histogram]:
    """The truth of each example as its answer."""
    found = []
    for example in examples:
        answer = example.answer
        values = list(answer.values()) if isinstance(answer, dict) else answer.values
        probability = np.zeros((len(values), BINS))
        probability[:, BINS // 2] = 1
        found.append(Histogram(probability, np.asarray([[value, 1e-9] for value in values])))
    return found


def test_forecasts_belong_to_their_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model's answers replaced by the truth: more steps than the recipe's horizon, several groups."""
    monkeypatch.setattr(ours_module, "answer", exact)
    frame = grown(132, ("north", "south"))
    data = OwnData("tiny", "series", "a test", "none", lambda _: frame, ("sales",), monthly("shop"))
    report = run_one(data, 0.05, tmp_path, tmp_path / "kept", quick)
    assert "time_series_forecasting/tiny_series" in report["tasks"] and report["failure"] == ""
    mae = report["scores"][0]
    assert mae["metric"] == "MAE" and mae["values"][OURS] < 1e-6 < mae["values"]["seasonal naive"]
    text = markdown([report])
    assert (
        "| `tiny` | MAE | " in text and "| series | 1 development | 1 | 0 | 0 | below seasonal naive 1, below" in text
    )


def test_predictions_belong_to_their_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, _ = linear(120)
    frame = whole.without(["note"])
    data = OwnData("tiny", "table", "a test", "none", lambda _: frame, ("y", "x", "size"))
    monkeypatch.setattr("openm6.api.frames.answer", exact)
    report = run_one(data, 1.0, tmp_path, None, quick)
    numbers = [score for score in report["scores"] if score["metric"] == "relative CRPS"]
    assert [score["values"][OURS] < 1e-6 for score in numbers] == [True] * 3
    (accuracy,) = (score["values"] for score in report["scores"] if score["metric"] == "accuracy")
    assert report["notes"] == {} and set(accuracy) == {"boosting", "logistic", OURS}


def test_a_record_that_cannot_be_asked_about_gets_the_frequencies_of_the_classes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = next(iter(exact(None, [SimpleNamespace(answer={"y": 1.0})], None)))
    monkeypatch.setattr(ours_module, "trained_for", lambda *_: [])
    monkeypatch.setattr(ours_module, "_number_answers", lambda *_: [answer, None])
    rows = [Frame({"y": labels}, {"y": "category"}) for labels in (["0", "2", "2", "1"], ["1", "2"])]
    frame = Frame({"y": [*rows[0].columns["y"], *rows[1].columns["y"]]}, {"y": "category"})
    data = OwnData("tiny", "table", "a test", "none", lambda _: frame, ("y",))
    report: dict[str, Any] = {"notes": {}, "seconds": {}, "failure": ""}
    labels: dict[str, dict[str, np.ndarray]] = {"y": {}}
    Run(data, frame, 1.0, tmp_path, report, None).predict(SimpleNamespace(loaded=None), tmp_path, *rows, {}, labels)
    assert report["failure"] == "" and labels["y"][OURS][1].tolist() == [0.25, 0.25, 0.5]
    assert labels["y"][OURS][0].argmax() == 1
    assert report["notes"] == {"openm6: y": "1 of 2 records lack what the task needs"}


def test_folds_are_pooled(tmp_path: Path) -> None:
    def failing(path: Path, minutes: float, work: Path) -> Ours:
        assert path.is_file() and not (work / "run").exists()
        raise FailedError("not trained")

    frame, _ = linear(60)
    data = OwnData("tiny", "table", "a test", "none", lambda _: frame, ("size",))
    report = run_one(data, 1.0, tmp_path, tmp_path / "kept", failing, folds=3)
    assert report["folds"] == 3 and report["failure"] == "not trained"
    assert {score["records"] for score in report["scores"]} == {3 * round(0.2 * len(frame))}
    parts = [Measure("y", "MAE", "lower", values, np.arange(2))
             for values in ({OURS: np.ones(2), "a": np.zeros(2)}, {"a": np.full(2, 4.0)})]  # fmt: skip
    (both,) = pooled([[one] for one in parts])
    assert both.values["a"].tolist() == [0, 0, 4, 4] and OURS not in both.values and len(set(both.blocks)) == 4


def test_estimators_predict_the_rows_target_by_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("openm6.train.multimodal_data.DEFAULT_MINUTES", 0.01)
    frame, _ = linear(60)
    data = OwnData("tiny", "table", "a test", "none", lambda _: frame, ("y", "size"))
    # A busy machine must leave boosting its time, which ends by itself.
    monkeypatch.setattr("benchmarks.own_data.command.Deadline", lambda _: Deadline(600))
    report = run_one(data, 0.06, tmp_path, None, None)
    assert report["notes"] == {} and report["failure"] == "" and report["tasks"] == []
    found = {(score["target"], score["metric"]): score["values"][OURS] for score in report["scores"]}
    assert 0 <= found["size", "accuracy"] <= 1 and 0 < found["y", "relative CRPS"] < 2, found


def test_images_are_classified_in_the_order_of_their_rows(tmp_path: Path) -> None:
    images, labels = bars(60)
    frame = Frame({"image": images, "label": labels}, {"image": "image", "label": "category"})
    data = OwnData("tiny", "image", "a test", "none", lambda _: frame, ("label",))
    report = run_one(data, 0.02, tmp_path, tmp_path / "kept", quick)
    accuracy = report["scores"][0]["values"]
    assert set(accuracy) == {"CNN", "pixel forest", OURS} and 0 <= accuracy[OURS] <= 1
    trained = Ours(tmp_path / "kept" / "tiny" / "run", 1.0)
    records = ours_module._records(trained, "tiny", tmp_path / "kept" / "tiny" / "tiny-new")
    assert [record["label"] for record in records if record] == list(split(frame)[1].columns["label"])


def test_a_failed_command_is_a_loss_with_its_reason(tmp_path: Path) -> None:
    def failing(path: Path, minutes: float, work: Path) -> Ours:
        script = "import sys; print('Error: nothing can be read'); sys.exit(1)"
        return train(path, minutes, work, (sys.executable, "-c", script))

    frame = grown(132)
    data = OwnData("tiny", "series", "a test", "none", lambda _: frame, ("sales",), monthly())
    report = run_one(data, 0.05, tmp_path, None, failing)
    assert report["failure"] == "`openm6 data` failed: nothing can be read"
    assert "| series | 1 development | 0 | 0 | 1 | below seasonal naive 0, below all 0, coverage" in markdown([report])
    with pytest.raises(FailedError):
        failing(tmp_path, 0.05, tmp_path)
