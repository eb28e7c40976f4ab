"""The estimators in scikit-learn: its own checks, columns of every kind, pickles, and bad tables in one sentence."""

from __future__ import annotations

import doctest
import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

import openm6
from openm6.api.estimators import with_files
from openm6.api.frames import TableError
from openm6.core.errors import OpenM6Error
from openm6.data.records import Fields
from tests.api.test_frames import shop
from tests.data.sample_images import png, wav
from tests.train.tiny_recipe import MODEL

SMALL: dict[str, Any] = {"model": MODEL, "device": "cpu", "random_state": 0}
TINY = SMALL | {"max_steps": 1}
SLIGHT = {"preset": "nano", "overrides": {**MODEL["overrides"], "hidden_size": 32, "num_heads": 1, "num_layers": 1}}
CHECKED = [
    openm6.OpenM6Regressor(model=SLIGHT, device="cpu", max_steps=1),
    openm6.OpenM6Classifier(model=SLIGHT, device="cpu", max_steps=1),
]
# Rows share passes, in float32: alone and among others they are equal up to rounding, not to scikit-learn's 1e-7.
ROUNDED = dict.fromkeys(
    ("check_methods_subset_invariance", "check_methods_sample_order_invariance"), "equal within the rounding of float32"
)


@parametrize_with_checks(CHECKED, expected_failed_checks=lambda estimator: ROUNDED)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder to stand in, with files, and one for temporary folders, which is empty again in the end."""
    for index, colour in enumerate(("red", "blue")):
        (tmp_path / f"{index}.png").write_bytes(png(colour, 32))
        (tmp_path / f"{index}.wav").write_bytes(wav(seconds=0.2 + index / 10))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    # No time for trees, which take most of such a fit.
    monkeypatch.setattr("openm6.train.multimodal_data.DEFAULT_MINUTES", 0.01)
    monkeypatch.chdir(tmp_path)
    yield
    assert not list((tmp_path / "temporary").glob("openm6-*")) and {p.name for p in tmp_path.iterdir()} == {
        "0.png", "1.png", "0.wav", "1.wav", "empty.png", "temporary"
    }  # fmt: skip


def test_columns_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = shop(16).assign(sound=[f"{index % 2}.wav" for index in range(16)])
    frame.loc[3, ["weight", "title", "photo"]] = None
    prices = frame.pop("price")
    regressor = openm6.OpenM6Regressor(**TINY).fit(frame, prices)
    fields = regressor.fields_
    assert (fields.image, fields.audio, fields.text_en) == ("photo", "sound", "title")
    assert (fields.numbers, fields.categories) == (["weight", "price"], ["colour"])
    found = regressor.predict(frame, output_type="quantiles", quantile_levels=[0.1, 0.5, 0.9])
    assert found.shape == (16, 3) and (np.diff(found, axis=1) > 0).all()
    assert regressor.predict(frame, output_type="median") == pytest.approx(found[:, 1])
    changed = frame.assign(photo=frame["photo"].iloc[::-1].to_numpy())
    assert not np.allclose(regressor.predict(changed), regressor.predict(frame)), "the images are read"
    alone = np.concatenate([regressor.predict(frame.iloc[[row]], output_type="median") for row in range(16)])
    np.testing.assert_allclose(alone, found[:, 1], rtol=1e-4)
    words = SimpleNamespace(categories={"colour": ["red", "blue"]}, labels={})
    monkeypatch.setattr(regressor.model_.loaded.numbers, "predictors", [words])
    spelt = regressor._records(frame.assign(colour=frame["colour"].str.upper()))
    assert [one["categories"]["colour"] for one in spelt] == frame["colour"].tolist(), "as in the training"


def test_dates_of_a_frame_are_inputs(tmp_path: Path) -> None:
    frame = shop(16)[["weight"]].assign(
        sold=pd.date_range("2024-01-30", periods=16, freq="36h"), made=[f"{row + 13}.01.2023" for row in range(16)]
    )
    frame.loc[3, "sold"] = pd.NaT
    regressor = openm6.OpenM6Regressor(**TINY).fit(frame, shop(16)["price"])
    assert regressor.fields_.dates == {"sold": None, "made": "%d.%m.%Y"}
    found = regressor.predict(frame)
    assert np.isfinite(found).all()
    later = frame.assign(sold=frame["sold"] + pd.Timedelta(days=100))
    assert not np.allclose(regressor.predict(later), found), "the dates are read"
    # Typed dates and texts are the same, and those of a prompt the same as those of a table.
    assert regressor.predict(frame.assign(made=pd.to_datetime(frame["made"], dayfirst=True))) == pytest.approx(found)
    model = regressor.model_
    assert model.predict(frame, target="price")["0.5"].to_numpy() == pytest.approx(
        regressor.predict(frame, output_type="median")
    )
    row = {"weight": 3.0, "made": "14.01.2023", "sold": "2024-02-01T18:00"}
    assert np.isfinite(model.generate(numbers=row, output="numbers", target="price").median)
    with pytest.raises(OpenM6Error, match=r"column 'made' holds 'soon', which does not fit its format '%d.%m.%Y'"):
        model.generate(numbers=row | {"made": "soon"}, output="numbers", target="price")
    with pytest.raises(ValueError, match=r"row 0 of X: column 'made' holds 'soon'"):
        regressor.predict(frame.assign(made="soon"))


def test_a_classifier_and_its_pickle() -> None:
    frame = shop(16)
    classifier = openm6.OpenM6Classifier(**TINY).fit(frame.drop(columns="colour"), frame["colour"])
    found = classifier.predict_proba(frame.drop(columns="colour"))
    alone = [classifier.predict_proba(frame.drop(columns="colour").iloc[[row]])[0] for row in range(16)]
    np.testing.assert_allclose(alone, found, rtol=1e-4)
    assert list(classifier.classes_) == ["blue", "red"] and classifier.target_ == "colour"
    np.testing.assert_allclose(found.sum(1), 1)
    again = pickle.loads(pickle.dumps(classifier))  # noqa: S301
    np.testing.assert_array_equal(again.predict_proba(frame.drop(columns="colour")), found)
    assert not hasattr(clone(classifier), "model_")


@pytest.mark.parametrize("names", [("NA", "EU"), ("-", "+")])
def test_a_class_may_be_called_as_what_is_missing(names: tuple[str, str]) -> None:
    frame = pd.DataFrame({"x": [0.0, 1.0] * 20})
    classifier = openm6.OpenM6Classifier(**TINY | {"max_steps": 2}).fit(frame, [*names] * 20)
    assert {*classifier.predict(frame)} == {*names}


def test_weights_of_a_run_are_where_training_starts(run: Path) -> None:
    X, y = [[0.0], [1.0], [2.0], [3.0]] * 4, [0.0, 1.0, 2.0, 3.0] * 4  # noqa: N806
    started = openm6.OpenM6Regressor(base=str(run), device="cpu", max_steps=1, random_state=0).fit(X, y)
    trained = openm6.load(run).loaded.omni.state_dict()
    name = "backbone.layers.0.attention.qkv"
    (key,) = (one for one in trained if one.startswith(name))
    moved = (started.model_.loaded.omni.state_dict()[key] - trained[key]).abs().max()
    assert 0 < moved < 0.01


def test_a_time_limit_is_kept() -> None:
    X, y = np.arange(120.0).reshape(60, 2), np.arange(60.0)  # noqa: N806
    regressor = openm6.OpenM6Regressor(time_limit=2.0, **SMALL).fit(X, y)
    assert regressor.n_iter_ > 1 and regressor.__sklearn_tags__().non_deterministic


def test_validation_rows_are_drawn_by_number_whatever_a_column_is_called() -> None:
    rows = 60
    table = pd.DataFrame({"id": np.arange(rows) % 10 + 1, "x": np.arange(rows) * 1.0})
    openm6.OpenM6Regressor(model=MODEL, device="cpu", random_state=0, time_limit=4).fit(table, table["x"])


def test_examples_of_docstrings_run() -> None:
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    known = {"tiny": SLIGHT}
    classes = (openm6.OpenM6Regressor, openm6.OpenM6Classifier)
    results = [runner.run(one) for kind in classes for one in finder.find(kind, extraglobs=known)]
    assert sum(one.attempted for one in results) > 4 and not any(one.failed for one in results)


FRAME = shop(6).drop(columns="price")
Y = shop(6)["price"]
BAD: dict[str, tuple[Any, Any, str]] = {
    "mixed types": (
        FRAME.assign(weight=[1, "x", b"y", 1, 2, 3]),
        Y,
        "column 'weight' of X holds values of several types",
    ),
    "one row": (FRAME.iloc[:1], Y.iloc[:1], "one sample is too few"),
    "no target": (FRAME, Y * np.nan, "Input y contains NaN"),
    "words": (FRAME, ["a"] * 6, "y holds values that are no numbers"),
    "no file": (FRAME.assign(photo="x.png"), Y, "x.png cannot be read"),
    "no bytes": (FRAME.assign(photo="empty.png"), Y, "empty file|broken"),
    "two images": (FRAME.assign(other=FRAME["photo"]), Y, "both hold files of image"),
    "lists": (FRAME.assign(title=[["a"]] * 6), Y, "values of type list"),
    "other rows": (FRAME, Y.iloc[:5], "inconsistent numbers of samples"),
    "infinite": (FRAME.assign(weight=np.inf), Y, "infinite"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_one_sentence(case: str) -> None:
    X, y, sentence = BAD[case]  # noqa: N806
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        openm6.OpenM6Regressor(**TINY).fit(X, y)
    # Lengths are compared by scikit-learn itself.
    assert (isinstance(caught.value, OpenM6Error) or case == "other rows") and "\n" not in str(caught.value)


def test_missing_classes_are_one_sentence() -> None:
    with pytest.raises(TableError, match="y holds missing values"):
        openm6.OpenM6Classifier(**TINY).fit(FRAME, ["a", None] * 3)


def test_a_target_without_a_name_and_classes_alike_at_their_beginning() -> None:
    long = np.array(["the class of all that is red", "the class of all that is blue"] * 3)
    classifier = openm6.OpenM6Classifier(**SMALL | {"model": SLIGHT, "max_steps": 1})
    classifier.fit(pd.DataFrame({0: [1.0, 2.0] * 3, 1: [3.0, 4.0] * 3}), pd.Series(long, name=4))
    assert classifier.target_ == "target" and classifier.class_names_ == ["class 0", "class 1"]
    assert set(classifier.predict(pd.DataFrame({0: [1.0], 1: [3.0]}))) <= set(long)


def test_an_unknown_output_type_and_another_table() -> None:
    regressor = openm6.OpenM6Regressor(**TINY).fit(FRAME, Y)
    with pytest.raises(OpenM6Error, match="is not one of mean, median, quantiles"):
        regressor.predict(FRAME, output_type="mode")
    with pytest.raises(ValueError, match="feature names"):
        regressor.predict(FRAME.rename(columns={"title": "name"}))
    assert regressor.score(pd.DataFrame(FRAME), Y) <= 1


def test_arrays_and_frames_are_alike_and_a_column_may_be_named_split() -> None:
    table = pd.DataFrame({"split": ["train", "test"] * 8, "b": np.arange(16.0)})
    fitted = openm6.OpenM6Regressor(**TINY).fit(table, table["b"])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        found = fitted.predict(table.to_numpy())
    np.testing.assert_array_equal(found, fitted.predict(table))
    with pytest.warns(UserWarning, match="has feature names"):
        openm6.OpenM6Regressor(**TINY).fit(table[["b"]].to_numpy(), table["b"]).predict(table[["b"]])


def test_files_of_a_frame_may_be_bytes_and_paths() -> None:
    cells = [{"bytes": png("red", 8), "path": "a.png"}, {"bytes": None, "path": "0.png"}, b"large", "", None]
    table = pa.table({"photo": pa.array(cells[:2]), "text": ["a", "b"]})
    assert with_files(table, Fields(image="photo"))["photo"].to_pylist() == [png("red", 8), png("red", 32)]
    table = pa.table({"photo": pa.array(cells[2:3], pa.large_binary())})
    assert with_files(table, Fields(image="photo"))["photo"].to_pylist() == [b"large"]
    assert with_files(pa.table({"photo": cells[3:]}), Fields(image="photo"))["photo"].to_pylist() == [None, None]


def test_columns_other_than_those_of_the_training_are_an_error_of_ours() -> None:
    table = pd.DataFrame({"a": range(8), "b": range(8)})
    fitted = openm6.OpenM6Regressor(**TINY).fit(table, table["a"])
    with pytest.raises(OpenM6Error, match="- b"):
        fitted.predict(table[["a"]])
    with pytest.raises(OpenM6Error, match="features"):
        fitted.predict([[1.0]])
    with pytest.raises(TableError, match="y holds values that are no numbers"):
        fitted.fit(table[["a"]], ["x"] * 8)
    with pytest.raises(NotFittedError):
        fitted.predict(table[["a"]])
