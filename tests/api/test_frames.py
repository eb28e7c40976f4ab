"""DataFrames in and out: predictions by columns, forecasts in the form of Chronos, and bad tables in one sentence."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import openm6
from openm6.api.frames import _forecasting, _without_category, spell_as_trained
from openm6.core.errors import ConfigError, OpenM6Error
from openm6.evaluate.answers import answer
from openm6.inference.sampling import MaskedSampling
from openm6.tasks.registry import TASKS
from openm6.train.run import train_recipe
from tests.data.sample_images import png
from tests.train.tiny_recipe import tiny_recipe, write_recipe

LEVELS = [0.1, 0.5, 0.9]


def shop(count: int = 24) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    weights = rng.uniform(1, 5, count).round(2)
    return pd.DataFrame({
        "photo": [f"{index % 2}.png" for index in range(count)],
        "title": [f"a {['red', 'blue'][index % 2]} toy of {index + 3} parts" for index in range(count)],
        "colour": [["red", "blue"][index % 2] for index in range(count)],
        "weight": weights,
        "price": (3 * weights + 1).round(2),
    })  # fmt: skip


def sales(items: tuple[str, ...] = ("b", "a"), days: int = 40) -> pd.DataFrame:
    tables = []
    for number, item in enumerate(items):
        steps = np.arange(days)
        tables.append(pd.DataFrame({
            "item_id": item,
            "timestamp": pd.date_range("2024-01-01", periods=days),
            "sales": 10.0 * (number + 1) + steps % 7,
            "visits": 100.0 + steps,
            "promo": (steps % 5 == 0).astype(float),
        }))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    for index, colour in enumerate(("red", "blue")):
        (folder / f"{index}.png").write_bytes(png(colour, 32))
    shop().to_csv(folder / "shop.csv", index=False)
    goods = pd.DataFrame({"photo": ["0.png", "1.png"] * 6, "类别": ["杯子", "盘子"] * 6})
    goods.to_csv(folder / "goods.csv", index=False)
    sales().to_csv(folder / "sales.csv", index=False)
    fields = {
        "image": "photo",
        "text_en": "title",
        "label": "colour",
        "numbers": ["weight", "price"],
        "categories": ["colour"],
    }
    windows = {"columns": ["sales"], "past_covariates": ["visits"], "known_covariates": ["promo"]}
    recipe = tiny_recipe(2, save_every=2) | {
        "sources": {
            "shop": {"kind": "csv", "path": str(folder / "shop.csv"), "fields": fields},
            "series": {"kind": "windows", "path": str(folder / "sales.csv"), "time": "timestamp", "group": "item_id",
                       "context": 12, "horizon": 4, **windows},
            "penguins": {"kind": "embedded", "name": "penguins", "limit": 40},
            "goods": {"kind": "csv", "path": str(folder / "goods.csv"),
                      "fields": {"image": "photo", "label_zh": "类别"}},
        },
        "mixture": [
            {"source": "shop", "task": "record_regression"},
            {"source": "shop", "task": "record_classification"},
            {"source": "series", "task": "time_series_forecasting"},
            {"source": "penguins", "task": "tabular_regression"},
            {"source": "penguins", "task": "tabular_classification"},
            {"source": "goods", "task": "image_categorization"},
        ],
    }  # fmt: skip
    train_recipe(write_recipe(folder, recipe), out=folder / "run")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> openm6.OpenM6:
    return openm6.load(folder / "run", device="cpu")


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_numbers_are_predicted_with_quantiles_and_the_same_index(model: openm6.OpenM6) -> None:
    frame = shop(5).drop(columns="price").set_index(pd.Index(list("vwxyz")))
    found = model.predict(frame, "price", LEVELS)
    assert list(found.columns) == ["predictions", "0.1", "0.5", "0.9"] and list(found.index) == list("vwxyz")
    assert (found["0.1"] < found["0.5"]).all() and (found["0.5"] < found["0.9"]).all()
    assert (found["predictions"] == found["0.5"]).all()


def test_the_target_does_not_show(model: openm6.OpenM6) -> None:
    frame = shop(5)
    pd.testing.assert_frame_equal(
        model.predict(frame, "price"), model.predict(frame.assign(price=1e6), "price"), rtol=1e-4
    )
    probable = model.predict(frame, "colour", classes=["red", "blue"])
    other = model.predict(frame.assign(colour="red"), "colour", classes=["red", "blue"])
    pd.testing.assert_frame_equal(probable[["red", "blue"]], other[["red", "blue"]], rtol=1e-3)
    assert not probable[["red", "blue"]].equals(
        model.predict(frame.assign(weight=frame["weight"] * 2), "colour", classes=["red", "blue"])[["red", "blue"]]
    )


def test_categories_are_predicted_as_text_or_with_probabilities(model: openm6.OpenM6) -> None:
    frame = shop(3).drop(columns="colour")
    assert all(isinstance(text, str) for text in model.predict(frame, "colour")["predictions"])
    found = model.predict(frame, "colour", classes=["red", "blue", "green"])
    assert list(found.columns) == ["predictions", "red", "blue", "green"]
    np.testing.assert_allclose(found[["red", "blue", "green"]].sum(axis=1), 1)
    assert (found["predictions"] == found[["red", "blue", "green"]].idxmax(axis=1)).all()
    series = pd.Series(["red", "blue", "green"], index=[2, 0, 7])
    pd.testing.assert_frame_equal(model.predict(frame, "colour", classes=series), found)


def test_the_keys_of_records_are_columns_of_a_source_without_fields(model: openm6.OpenM6) -> None:
    frame = pd.DataFrame({"bill_length_mm": [40.0, None], "body_mass_g": [4000, 5000], "flipper_length_mm": [190, 200]})
    assert model.predict(frame, "bill_depth_mm")["predictions"].notna().all()
    assert set(model.predict(frame, "label", classes=["Adelie", "Gentoo"]).columns) == {
        "predictions",
        "Adelie",
        "Gentoo",
    }


def test_rows_may_lack_cells(model: openm6.OpenM6) -> None:
    """A task that takes whatever there is has an answer without any of it; one of numbers alone has none."""
    frame = shop(2).drop(columns="price")
    frame.loc[1] = None
    assert model.predict(frame, "price", LEVELS).notna().all(axis=None)
    lengths = pd.DataFrame({"bill_length_mm": [40.0, None], "flipper_length_mm": [190.0, None]})
    found = model.predict(lengths, "body_mass_g", LEVELS)
    assert found.loc[0].notna().all()


def test_a_chinese_label_and_rows_that_cannot_be_asked(model: openm6.OpenM6) -> None:
    frame = pd.DataFrame({"photo": ["0.png", None], "类别": ["杯子", None]})
    found = model.predict(frame, "类别", classes=["杯子", "盘子"])
    assert found["predictions"][0] in ("杯子", "盘子") and found.loc[0, ["杯子", "盘子"]].sum() == pytest.approx(1)
    assert pd.isna(found["predictions"][1]) and found.loc[1, ["杯子", "盘子"]].isna().all()
    assert [isinstance(text, str) for text in model.predict(frame, "类别")["predictions"]] == [True, False]


def test_hidden_classes_are_asked_for_in_the_language_of_their_training() -> None:
    task = TASKS["record_classification"]
    for classes, language in ((["猫", "狗"], "zh"), (["cat", "dog"], "en")):
        trained = {"numbers": {"a": 1.0}, "categories": {"target": classes[1]}}
        assert task.example(trained, np.random.default_rng(0)).language == language
        [example] = _without_category(task, [{"numbers": {"a": 1.0}}], "target", classes, "label").values()
        assert example.language == language and not any(name in str(example.source) for name in classes)


def test_forecasts_have_the_form_of_chronos(model: openm6.OpenM6) -> None:
    history = sales()
    later = pd.concat(
        pd.DataFrame({"item_id": item, "timestamp": pd.date_range("2024-02-10", periods=6), "promo": 0.0})
        for item in ("a", "b")
    )
    found = model.forecast(history.sample(frac=1, random_state=0).sort_values("item_id", ascending=False), later,
                           target="sales", prediction_length=6, quantile_levels=LEVELS)  # fmt: skip
    assert list(found.columns) == ["item_id", "timestamp", "target_name", "predictions", "0.1", "0.5", "0.9"]
    assert found["item_id"].tolist() == ["b"] * 6 + ["a"] * 6 and set(found["target_name"]) == {"sales"}
    assert found["timestamp"].tolist() == 2 * pd.date_range("2024-02-10", periods=6).tolist()
    assert (found["0.1"] < found["0.9"]).all() and (found["predictions"] == found["0.5"]).all()
    assert found.groupby("item_id")["predictions"].mean()["a"] > found.groupby("item_id")["predictions"].mean()["b"]
    other = model.forecast(history, later.assign(promo=1.0), target="sales", prediction_length=6)
    assert not np.allclose(found["predictions"], other["predictions"]), "what is known of the steps ahead counts"


CHRONOS = {
    "future_df": None,
    "id_column": "item_id",
    "timestamp_column": "timestamp",
    "target": "target",
    "prediction_length": None,
    "quantile_levels": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "batch_size": 256,
    "context_length": None,
    "cross_learning": False,
    "validate_inputs": True,
    "freq": None,
}


def test_arguments_and_types_are_those_of_chronos(model: openm6.OpenM6) -> None:
    """`Chronos2Pipeline.predict_df` of chronos-forecasting 2.3.2, whose last argument takes any others."""
    signature = inspect.signature(openm6.OpenM6.forecast)
    assert list(signature.parameters) == ["self", "df", *CHRONOS]
    assert {name: signature.parameters[name].default for name in CHRONOS} == CHRONOS
    found = model.forecast(sales(), later(), "item_id", "timestamp", ["sales"], 4, [0.5], 1, 12, False, True, "D")
    types = dict(zip(found.columns, map(str, found.dtypes), strict=True))
    assert types["timestamp"].startswith("datetime64") and types["predictions"] == types["0.5"] == "float32"
    together = model.forecast(sales(), later(), target="sales", context_length=12, quantile_levels=[0.5])
    pd.testing.assert_frame_equal(found, together, rtol=1e-4)
    numbered = sales().assign(item_id=pd.Categorical(sales()["item_id"], ["a", "b", "c"]))
    assert model.forecast(numbered, later(), target="sales")["item_id"].tolist() == ["b"] * 4 + ["a"] * 4


def test_times_ahead_are_not_checked_if_that_is_asked(model: openm6.OpenM6) -> None:
    shifted = later().assign(timestamp=later()["timestamp"] + pd.Timedelta(days=3))
    found = model.forecast(sales(), shifted, target="sales", validate_inputs=False)
    pd.testing.assert_frame_equal(found, model.forecast(sales(), later(), target="sales"))


def test_a_short_series_has_the_frequency_of_the_others(model: openm6.OpenM6) -> None:
    rows = pd.concat([sales(("b",)), sales(("a",)).iloc[-1:]])
    found = model.forecast(rows, later(), target="sales", context_length=12)
    assert found["timestamp"].tolist() == 2 * pd.date_range("2024-02-10", periods=4).tolist()
    assert np.isfinite(found["predictions"]).all()


def test_a_forecast_of_known_windows_is_that_of_the_training_source(model: openm6.OpenM6) -> None:
    trained, config = _forecasting(model.loaded, ["sales"])
    source = config.open_held_out("series")
    windows = [source[index] for index in range(len(source))]
    window = next(one for one in windows if one["extra"]["group"] == "a" and "2024-01-03" in one["extra"]["start"])
    example = TASKS[trained.task].example(window, np.random.default_rng(0), language="en")
    (expected,) = answer(model.loaded, [example], MaskedSampling())
    rows = sales(("b", "a"))
    rows = rows[rows["item_id"] == "a"].iloc[:18]
    found = model.forecast(rows.iloc[2:14], rows.iloc[14:][["item_id", "timestamp", "promo"]], target="sales")
    np.testing.assert_allclose(found["predictions"], expected.median(), rtol=1e-4)


def test_the_clock_of_a_forecast_is_that_of_the_training_source(
    model: openm6.OpenM6, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = _forecasting(model.loaded, ["sales"])
    months = pd.date_range("2021-01-01", periods=24, freq="MS")
    seen: list[Any] = []

    def kept(loaded: Any, examples: list[Any], sampling: Any) -> Any:
        seen.extend(example.target.raw.clock for example in examples)
        return answer(loaded, examples, sampling)

    monkeypatch.setattr("openm6.api.frames.answer", kept)
    rows = pd.DataFrame({"item_id": "a", "timestamp": months[:20], "sales": np.arange(20.0), "promo": 0.0})
    rows["visits"] = 1.0
    ahead = pd.DataFrame({"item_id": "a", "timestamp": months[20:], "promo": 0.0})
    model.forecast(rows, ahead, target="sales", prediction_length=4)
    seconds = np.asarray([one.timestamp() for one in months[20 - config.context :]])
    assert seen == [(tuple(seconds), np.median(np.diff(seconds)))]


def later(items: tuple[str, ...] = ("b", "a")) -> pd.DataFrame:
    """What is known of the four steps ahead."""
    days = pd.date_range("2024-02-10", periods=4)
    return pd.concat(pd.DataFrame({"item_id": item, "timestamp": days, "promo": 0.0}) for item in items)


def twice(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([frame, frame.iloc[:1]])


BAD_TABLES: dict[str, tuple[Any, str]] = {
    "no such target": (lambda f: (f, "prise"), "the model predicts no column 'prise'; did you mean 'price'"),
    "an input as the target": (lambda f: (f, "title"), "the model predicts no column 'title'"),
    "no such column": (lambda f: (f.drop(columns="weight"), "price"), "the DataFrame has no column 'weight'"),
    "mixed types": (
        lambda f: (f.assign(weight=[1, "x", b"y"]), "price"),
        "column 'weight' of the DataFrame holds values of several",
    ),
    "a type of its own": (
        lambda f: (f.assign(weight=1j), "price"),
        "'weight' of the DataFrame holds values of a type that cannot be read .complex.: convert",
    ),
    "a number as the target": (lambda f: (f.set_axis(range(5), axis=1), 0), "the model predicts no column '0'"),
    "a text as a number": (lambda f: (f.assign(weight="heavy"), "price"), "row 0 of the DataFrame: column 'weight'"),
    "no file": (lambda f: (f.assign(photo="x.png"), "price"), "row 0 of the DataFrame: x.png cannot be read"),
    "an image of zero bytes": (lambda f: (f.assign(photo=b""), "price"), "column 'photo' holds an empty file"),
    "no rows": (lambda f: (f.iloc[:0], "price"), "at least one row"),
    "a list": (lambda f: ([1, 2], "price"), "at least one row"),
    "columns of one name": (lambda f: (f.set_axis(["a"] * 5, axis=1), "price"), "names of their own"),
    "no classes": (lambda f: (f, "colour", LEVELS, []), "classes must name at least one"),
    "a level": (lambda f: (f, "price", [0, 1]), "must lie between 0 and 1"),
}


@pytest.mark.parametrize(("word", "trained"), [("1.0", "1"), ("True", "true"), ("2", "2"), ("red", "red")])
def test_categories_are_spelt_as_in_the_training(word: str, trained: str, model: openm6.OpenM6) -> None:
    table = SimpleNamespace(categories={"rooms": ("1", "2", "true")}, labels={"size": SimpleNamespace(classes=["1"])})
    numbers = SimpleNamespace(predictors=[table])
    loaded: Any = SimpleNamespace(numbers=numbers)
    records = [{"categories": {"rooms": word, "other": word, "none": None}}]
    spell_as_trained(loaded, records)
    assert records == [{"categories": {"rooms": trained, "other": word, "none": None}}]


def test_another_spelling_changes_no_prediction(model: openm6.OpenM6) -> None:
    rows = shop(4)
    found = model.predict(rows.assign(colour=rows["colour"].str.upper()), "price")
    pd.testing.assert_frame_equal(found, model.predict(rows, "price"))


def test_a_sparse_column_is_that_of_its_values(model: openm6.OpenM6) -> None:
    rows = shop(3).assign(weight=[0.0, np.nan, 2.0])
    found = model.predict(rows.astype({"weight": pd.SparseDtype("float", 0.0)}), "price")
    pd.testing.assert_frame_equal(found, model.predict(rows, "price"))


def test_paths_as_cells_are_those_of_texts(model: openm6.OpenM6, folder: Path) -> None:
    rows = shop(2).assign(photo=[folder / "0.png", folder / "1.png"])
    found = model.predict(rows, "price")
    pd.testing.assert_frame_equal(found, model.predict(rows.assign(photo=rows["photo"].map(str)), "price"))


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_one_sentence(case: str, model: openm6.OpenM6) -> None:
    words, sentence = BAD_TABLES[case]
    with pytest.raises(OpenM6Error, match=sentence) as caught:
        model.predict(*words(shop(3)))
    assert "\n" not in str(caught.value)


BAD_SERIES: dict[str, tuple[Any, str]] = {
    "no such target": ({"target": "sale"}, "the model forecasts no series 'sale'; did you mean 'sales'"),
    "no such column": (lambda f: f.drop(columns="visits"), "df has no column 'visits'"),
    "no items": (lambda f: f.drop(columns="item_id"), "df has no column 'item_id'"),
    "one row": (
        lambda f: f[f["item_id"] == "b"].iloc[:1],
        "the times of item 'b' have no regular frequency, or are too few",
    ),
    "repeated times": (twice, "item 'b' has the time 2024-01-01 00:00:00 twice"),
    "irregular times": (lambda f: f.drop(index=[3]), "the times of item 'b' have no regular frequency"),
    "no time": (lambda f: f.assign(timestamp=pd.NaT), "has rows without a time"),
    "no dates": (lambda f: f.assign(timestamp="soon"), "holds times that cannot be read"),
    "nothing observed": (lambda f: f.assign(sales=np.nan), "item 'b' has no value of 'sales'"),
    "text": (lambda f: f.assign(sales="many"), "where numbers are expected"),
    "infinite": (lambda f: f.assign(sales=np.inf), "holds infinite values"),
    "no rows": (lambda f: f.iloc[:0], "df has no rows"),
    "no table": (lambda f: [1, 2], "a DataFrame"),
    "no targets": ({"target": []}, "at least one target"),
    "a number as a target": ({"target": 0}, "'0'"),
    "a level alone": ({"quantile_levels": 0.5}, r"quantile_levels=0.5 must be a list, as \[0.5\]"),
    "no such frequency": ({"freq": "often"}, "freq='often' does not lead beyond 2024-02-09"),
    "an item without a name": (lambda f: f.assign(item_id=None), "df has rows without 'item_id'"),
    "nothing known": ({"future_df": None}, "add future_df with them"),
    "another future": ({"prediction_length": 3}, "future_df must hold the 3 steps from 2024-02-10"),
    "no steps": ({"prediction_length": -1}, "must be at least 1"),
    "no batch": ({"batch_size": 0}, "batch_size must be at least 1"),
    "series together": ({"cross_learning": True}, "cross_learning=True is not supported"),
    "the target ahead": ({"future_df": later().assign(sales=1.0)}, "the column 'sales', which is forecast"),
    "an unknown column ahead": ({"future_df": later().assign(rain=1.0)}, "the column 'rain', which is not in df"),
    "another item ahead": ({"future_df": later(("b", "a", "c"))}, "the same items, and 'c' is in one alone"),
    "no table ahead": ({"future_df": [1]}, "future_df must be a DataFrame"),
}


@pytest.mark.parametrize("case", BAD_SERIES)
def test_a_bad_series_is_one_sentence(case: str, model: openm6.OpenM6) -> None:
    change, sentence = BAD_SERIES[case]
    history = change(sales()) if callable(change) else sales()
    ahead = later(("b",) if case == "one row" else ("b", "a"))
    settings = {"future_df": ahead, "target": "sales"} | ({} if callable(change) else change)
    with pytest.raises(OpenM6Error, match=sentence) as caught:
        model.forecast(history, **settings)
    assert "\n" not in str(caught.value) and isinstance(caught.value, ConfigError | ValueError)


def test_times_as_numbers_and_a_named_frequency(folder: Path, model: openm6.OpenM6) -> None:
    rows = sales(("a",), 20)
    days = pd.date_range("2024-01-21", periods=2, freq="D")
    later = pd.DataFrame({"item_id": "a", "timestamp": days, "promo": 0.0})
    gaps = model.forecast(rows.drop(index=[3]), later, target="sales", prediction_length=2, freq="D")
    assert gaps["timestamp"].tolist() == days.tolist()
    empty = rows.assign(sales=rows["sales"].where(rows.index != 3), promo=rows["promo"].where(rows.index != 3))
    same = model.forecast(empty, later, target="sales", prediction_length=2)
    pd.testing.assert_frame_equal(gaps, same)  # a step without a row is one without a value
    counted = model.forecast(rows.assign(timestamp=range(0, 40, 2)), later.assign(timestamp=[40, 42]), target="sales",
                             prediction_length=2)  # fmt: skip
    assert counted["timestamp"].tolist() == [40, 42]


def test_written_dates_are_in_the_order_of_their_times(model: openm6.OpenM6) -> None:
    rows = sales(("a",), 20).assign(timestamp=pd.date_range("2023-12-20", periods=20))
    later = pd.DataFrame({"item_id": "a", "timestamp": pd.date_range("2024-01-09", periods=4), "promo": 0.0})
    settings = {"target": "sales", "quantile_levels": []}
    written = [table.assign(timestamp=table["timestamp"].dt.strftime("%m/%d/%Y")) for table in (rows, later)]
    found = model.forecast(*written, freq="D", **settings)
    pd.testing.assert_frame_equal(found, model.forecast(rows, later, **settings))
    assert list(found.columns) == ["item_id", "timestamp", "target_name", "predictions"]


def test_a_named_frequency_goes_on_after_the_last_time(model: openm6.OpenM6) -> None:
    rows = sales(("a",), 20)  # the last one is a Saturday
    mondays = pd.date_range("2024-01-22", periods=4, freq="W-MON")
    later = pd.DataFrame({"item_id": "a", "timestamp": mondays, "promo": 0.0})
    assert model.forecast(rows, later, target="sales", freq="W-MON")["timestamp"].tolist() == mondays.tolist()
