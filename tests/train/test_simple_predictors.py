"""Simple predictors: what they learn, which rows they have not seen, missing values, and trees as scikit-learn's."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from openm6.core.errors import CheckpointError
from openm6.modalities.histogram import MOST
from openm6.modalities.image import ImageConfig
from openm6.modalities.interface import Part
from openm6.modalities.simple_predictors import (
    EXPERTS,
    FOLDS,
    IMAGE,
    RAW,
    TEXT,
    TablePredictors,
    Trees,
    fold_of,
    from_bytes,
    given_columns,
    image_features,
    to_bytes,
)
from openm6.tasks.task import fill_prompt
from openm6.train import image_network
from openm6.train.image_network import (
    BATCH,
    MAX_EPOCHS,
    MIN_STEPS,
    NO_NETWORKS,
    PIXEL_SECONDS,
    NetworkPlan,
    fit_network,
    fitting_side,
)
from openm6.train.simple_predictors import MIN_ROWS, fit_table, tree_arrays

Row = tuple[dict[str, float | None], dict[str, str | None]]
COLOURS = ("red", "green", "blue")


def made(count: int = 240, seed: int = 0) -> list[Row]:
    """Rows with an exact product, a step, a category that matters, a constant column and some missing values."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for _ in range(count):
        width, height = np.exp(rng.normal(size=2) / 2)
        colour = int(rng.integers(3))
        numbers: dict[str, float | None] = {
            "width": float(width), "height": float(height), "area": float(width * height), "same": 3.0,
            "step": float(10 * (width > 1) + colour + 0.1 * rng.normal()), "noise": float(rng.normal()),
        }  # fmt: skip
        if rng.random() < 0.1:
            numbers["noise"] = None
        rows.append((numbers, {"colour": COLOURS[colour] if rng.random() < 0.95 else None}))
    return rows


def fold(numbers: Any, categories: Any) -> int:
    return fold_of({"numbers": numbers, "categories": categories})


def fit(rows: list[Row], seconds: float) -> TablePredictors | None:
    folds = np.asarray([fold(*row) for row in rows])
    return fit_table([{**numbers, **categories} for numbers, categories in rows], folds, seconds)


@pytest.fixture(scope="module")
def table() -> TablePredictors:
    found = fit(made(), seconds=30)
    assert found is not None
    return found


def errors(table: TablePredictors, column: str, rows: list[Row]) -> np.ndarray:
    """Of the blend, in the typical error that it expects."""
    found = []
    for numbers, categories in rows:
        value = numbers[column]
        assert value is not None
        one = table.predict(column, {**numbers, **categories})
        loc, scale, log, _ = one.units
        u = ((math.log(value) if log else value) - loc) / scale
        found.append((one.values[0] - u) / one.change)
    return np.asarray(found)


def test_new_rows_are_predicted_about_as_well_as_expected(table: TablePredictors):
    for column in ("area", "step"):
        assert np.median(np.abs(errors(table, column, made(60, seed=1)))) < 1.5
    changes = {name: table.predict(name, made()[0][0]).change for name in ("area", "step", "noise")}
    assert changes["area"] < 0.01, "the logarithm of a product is a sum"
    assert changes["step"] < 0.5 < changes["noise"]


def test_logarithms_are_bounded_by_ten_times_the_largest_value(table: TablePredictors):
    *_, log, most = table.predict("area", made()[0][0]).units
    assert log and math.exp(most) == pytest.approx(10 * max(row[0]["area"] for row in made()))
    assert table.predict("noise", made()[0][0]).units[2:] == (False, MOST)


def test_a_row_does_not_influence_what_is_predicted_of_it_in_training(table: TablePredictors):
    rows = made()
    numbers, categories = rows[0]
    own = fold(numbers, categories)
    # Another value that leaves the row in its fold.
    changed = next(row for value in range(5000, 5100)
                   if fold(row := {**numbers, "step": float(value)}, categories) == own)  # fmt: skip
    other = fit([(changed, categories), *rows[1:]], seconds=30)
    assert other is not None
    given = {**numbers, **categories}
    for held in range(FOLDS):
        before, after = (one.predict("step", given, held).values for one in (table, other))
        # The scales of columns are fitted to all rows, and differ by a little.
        assert (np.abs(after[1:] - before[1:]).max() < 0.02) == (held == own)


def test_equal_rows_share_a_fold_and_folds_are_about_even():
    numbers: dict[str, float | None] = {"a": 1.0, "b": None}
    assert fold(numbers, {}) == fold({"b": None, "a": 1.0}, None)
    counts = np.bincount([fold(*row) for row in made(1000)], minlength=FOLDS)
    assert counts.min() > 140
    for key, values in (("text_en", ("a", "b", "c", "d")), ("extra", ({"note": "a"}, {"note": "b"}, {"note": "c"}))):
        rated = [{"id": index, "numbers": {"stars": 1.0}, key: value} for index, value in enumerate(values * 2)]
        assert len({fold_of(row) for row in rated}) > 1 and fold_of(rated[0]) == fold_of(rated[len(values)])
    images = [{"numbers": {"stars": 1.0}, "image": bytes([value])} for value in range(8)]
    assert len({fold_of(row) for row in images}) > 1 and fold_of(images[0]) == fold_of(dict(images[0]))


def test_trees_predict_as_scikit_learn_does():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4))
    y = x[:, 0] * x[:, 1] + (x[:, 2] > 0)
    x[rng.random(x.shape) < 0.2] = np.nan
    models = [HistGradientBoostingRegressor(max_iter=20, max_leaf_nodes=size).fit(x, y) for size in (8, 5)]
    trees = Trees({**tree_arrays(models), "words": np.zeros((2, 0))})
    for fold, model in enumerate(models):
        np.testing.assert_allclose(trees.predict(fold, x)[:, 0], model.predict(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "given",
    [{}, {"width": 2.0}, {"width": None, "height": math.nan}, {"colour": "violet"}, {"width": 0.0, "step": 1e300}],
)
def test_whatever_is_given_the_prediction_is_finite(table: TablePredictors, given: dict[str, float | str | None]):
    found = table.predict("area", given)
    assert np.isfinite(found.values).all() and found.change > 0 and 0 <= found.fraction <= 1
    whole = table.predict("area", {**made()[0][0], **made()[0][1]})
    assert found.change > whole.change and found.uncertainty > 0


def test_a_number_may_be_written_as_text(table: TablePredictors):
    row = made()[0][0]
    found = [table.predict("area", given).values for given in (row, {name: str(value) for name, value in row.items()})]
    np.testing.assert_array_equal(*found)


def test_a_column_is_never_predicted_from_itself(table: TablePredictors):
    row = made()[0][0]
    first, second = (table.predict("area", {**row, "area": area}).values for area in (row["area"], 77.0))
    np.testing.assert_array_equal(first, second)


def test_files_hold_the_same_predictors(table: TablePredictors):
    content = to_bytes([table, table])
    for read in from_bytes(content, "file"):
        for column in ("area", "noise", "step"):
            row = {**made()[3][0], **made()[3][1]}
            np.testing.assert_array_equal(read.predict(column, row).values, table.predict(column, row).values)
    assert to_bytes(from_bytes(content, "file")) == content
    with pytest.raises(CheckpointError, match="file is damaged"):
        from_bytes(content[:-10], "file")
    with pytest.raises(CheckpointError, match="file is damaged"):
        from_bytes(b"no", "file")
    with pytest.raises(CheckpointError, match="file is damaged, or from another version"):  # arrays have other names
        from_bytes(content.replace(b"/number", b"/nombre"), "file")


def test_the_same_rows_have_the_same_predictors(table: TablePredictors):
    again = fit(made(), seconds=30)
    assert again is not None and to_bytes([again]) == to_bytes([table])


@pytest.mark.parametrize(
    "rows", [made(1), [({"a": 1.0}, {}), ({"a": 2.0}, {})] * 30, [({"a": 3.0, "b": 1.0}, {})] * 30]
)
def test_tables_too_small_have_none(rows: list[Row]):
    assert fit(rows, seconds=30) is None


def test_columns_that_are_too_rare_or_constant_have_none(table: TablePredictors):
    rows = made(60)
    rare = fit([({**numbers, "rare": 1.0 * index if index < 10 else None}, categories)
                      for index, (numbers, categories) in enumerate(rows)], 0)  # fmt: skip
    given: dict[str, float | str | None] = {"width": 1.0, "same": 3.0, "colour": "red", "area": 2.0}
    assert rare is not None and rare.num_usable("rare", given) == 0 and rare.num_usable("area", given) == 2
    assert table.num_usable("same", given) == 0 and table.num_usable("area", {"another": 1.0}) == 0


def test_without_time_there_are_no_trees_and_with_little_the_worst_columns_have_them():
    none, few = fit(made(), seconds=0), fit(made(), seconds=0.5)
    assert none is not None and few is not None
    assert not none.trees and 0 < len(few.trees) < 5
    assert few.numbers.index("noise") in few.trees


def test_columns_given_are_those_of_all_parts():
    parts = [Part("numbers", {"a": 1.0}), Part("text", "b: x", {"columns": {"b": "x"}}), Part("text", "c: 3")]
    image = Part("image", b"pixels")
    assert given_columns([*parts, image]) == {"a": 1.0, "b": "x", TEXT: " c: 3", IMAGE: b"pixels"}


def test_words_of_a_prompt_are_no_text_of_the_record():
    inputs = {"title": Part("text", "a red sofa"), "maker": Part("text", "Holz")}
    prompt = fill_prompt("{title} by {maker}: what is the {column}?", inputs, {"column": "price"})
    assert len(prompt) == 1
    assert given_columns(prompt) == {TEXT: " a red sofa Holz"} == given_columns(inputs.values())


def seen(count: int = 150) -> list[dict[str, Any]]:
    """Rows whose text and image each tell the depth half of the time."""
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        told = rng.integers(3, size=3)
        pixels = np.full((8, 8, 3), 20, np.uint8)
        pixels[..., told[1]] = 200
        text = f"a {('rose', 'leaf', 'sea')[told[0]]} of {rng.integers(9)}"
        depth = float(told[rng.integers(2)] + 0.1 * rng.normal())
        rows.append({TEXT: text, IMAGE: image_features(pixels), "depth": depth, "same": COLOURS[told[2]]})
    return rows


def labelled(count: int = 150) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows whose text, image and number each tell the colour half of the time, and a column that equals it."""
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    labels = []
    for _ in range(count):
        colour = int(rng.integers(3))
        told = [colour if rng.random() < 0.5 else int(rng.integers(3)) for _ in range(3)]
        pixels = np.full((8, 8, 3), 20, np.uint8)
        pixels[..., told[1]] = 200
        rows.append({
            TEXT: f"a {('rose', 'leaf', 'sea')[told[0]]} of {rng.integers(9)}", IMAGE: image_features(pixels),
            "depth": told[2] + 0.1 * float(rng.normal()), "same": COLOURS[colour],
        })  # fmt: skip
        labels.append({"colour": COLOURS[colour], "same": COLOURS[colour]})
    return rows, labels


def test_labels_are_predicted_from_columns_texts_and_images_but_not_from_themselves():
    rows, labels = labelled()
    table = fit_table(rows[:100], np.arange(100) % FOLDS, 30, labels[:100])
    assert table is not None and table.labels == {"colour": (sorted(COLOURS), ["colour", "same"])}
    (read,) = from_bytes(to_bytes([table]), "file")
    truth = [sorted(COLOURS).index(label["colour"]) for label in labels[100:]]
    found = np.stack([read.predict_label("colour", row).experts for row in rows[100:]])
    np.testing.assert_array_equal(found[0], table.predict_label("colour", rows[100]).experts)
    for index, expert in enumerate(EXPERTS[:4]):
        right = (found[:, index].argmax(1) == truth).mean()
        assert right > 0.55, expert
    np.testing.assert_allclose(np.exp(found).sum(2), 1, atol=1e-3)
    alone = read.predict_label("colour", {TEXT: "the sea", "same": "red"})
    assert alone.key == "label 1 colour 0101" and alone.experts[1].argmax() == sorted(COLOURS).index("blue")
    assert not read.predict_label("colour", {"same": "red"}).experts.any()


def test_what_tells_a_label_has_more_weight_than_what_does_not():
    rng = np.random.default_rng(0)
    rows, labels = [], []
    for _ in range(120):
        depth = float(rng.normal())
        rows.append({"depth": depth, TEXT: f"a {COLOURS[rng.integers(3)]} {rng.integers(9)}"})
        labels.append({"kind": "deep" if depth + rng.normal() / 2 > 0 else "flat"})
    table = fit_table(rows, np.arange(120) % FOLDS, 30, labels)
    assert table is not None
    weights = dict(zip(EXPERTS, table.arrays["label kind weights"], strict=False))
    assert weights["columns"] > 1.5 * weights["text"] >= 0 == weights["image"]
    found = table.predict_label("kind", rows[0])
    assert found.prior[0] >= 1 / (1 + found.experts.any(1).sum()) and found.prior[1] > 1.5 * found.prior[2]
    assert found.prior[:3].sum() + found.prior[4] == pytest.approx(1)


def test_numbers_are_predicted_from_texts_and_images():
    rows = seen()
    table = fit_table(rows, np.arange(len(rows)) % FOLDS, 0)
    assert table is not None and table.num_usable("depth", rows[0]) == 3
    dark, red = (image_features(np.full((8, 8, 3), colour, np.uint8)) for colour in ((20, 20, 20), (200, 20, 20)))
    values = [table.predict("depth", {"same": "red", TEXT: "a rose", IMAGE: one}).values[0] for one in (dark, red)]
    assert np.isfinite(values).all() and values[0] != values[1]
    low, high = (table.predict("depth", {TEXT: text, IMAGE: red}) for text in ("a rose of 3", "a sea of 3"))
    assert low.values[0] < high.values[0] - 0.2
    (read,) = from_bytes(to_bytes([table]), "file")
    np.testing.assert_array_equal(read.predict("depth", {TEXT: "a rose of 3", IMAGE: red}).values, low.values)
    alone = [table.predict("depth", given) for given in ({TEXT: "a sea"}, {IMAGE: red}, {})]
    assert all(np.isfinite(one.values).all() and one.change >= low.change for one in alone)
    broken = table.predict("depth", {TEXT: "a sea", IMAGE: b"no image"})
    np.testing.assert_array_equal(broken.values, alone[0].values, "as without one")
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (200, 20, 20)).save(file, "PNG")
    for _ in range(2):  # decoded, and from the cache
        shown = table.predict("depth", {IMAGE: file.getvalue()})
        np.testing.assert_array_equal(shown.values, table.predict("depth", {IMAGE: red}).values)


@pytest.mark.parametrize(("levels", "fitted"), [(10, False), (40, True)])
def test_few_values_beside_images_alone_have_no_predictors(levels: int, fitted: bool):
    rng = np.random.default_rng(0)
    depths = rng.integers(0, levels, 200)
    rows = [{"depth": float(depth), IMAGE: image_features(np.full((8, 8, 3), 3 * depth, np.uint8))} for depth in depths]
    assert (fit_table(rows, np.arange(len(rows)) % FOLDS, 0) is not None) is fitted


@pytest.mark.parametrize("classes", [2, 3])
def test_trees_of_labels_predict_as_scikit_learn_does(classes: int):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    y = (np.digitize(x[:, 0] * x[:, 1], [-0.3, 0.3]) + classes - 3).clip(0)
    model = HistGradientBoostingClassifier(max_iter=10).fit(x, y)
    raw = Trees({**tree_arrays([model]), "words": np.zeros((1, 0))}).predict(0, x)
    np.testing.assert_allclose(np.squeeze(raw), np.squeeze(model.decision_function(x)), rtol=1e-5, atol=1e-6)


def flags(count: int, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Images of a flag at a random place, red and blue or blue and red: features count colours and unsigned slopes."""
    rng = np.random.default_rng(seed)
    rows, labels = [], []
    for number in rng.integers(0, 2, count).tolist():
        image = np.full((32, 32, 3), 230, np.uint8)
        top, left = rng.integers(0, 21, 2)
        for half, colour in enumerate((number, 1 - number)):
            image[top : top + 12, left + 6 * half : left + 6 * half + 6] = ((200, 20, 20), (20, 20, 200))[colour]
        rows.append({IMAGE: image_features(image), RAW: image})
        labels.append({"flag": ("left", "right")[number]})
    return rows, labels


def plan_of(steps: int, config: ImageConfig = NO_NETWORKS.config) -> NetworkPlan:
    """The time in which a network takes so many steps."""
    return NetworkPlan((steps + 0.5) * BATCH * 64**2 * PIXEL_SECONDS, config)


def fit_flags(steps: int, count: int = 160) -> TablePredictors:
    rows, labels = flags(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_network, "CHANNELS", (8, 16, 16))  # a second instead of ten
        table = fit_table(rows, np.arange(count) % FOLDS, 1, labels, networks=plan_of(steps))
    assert table is not None
    return table


@pytest.fixture(scope="module")
def network() -> TablePredictors:
    return fit_flags(MIN_STEPS)


def test_a_network_recognizes_what_features_do_not_tell(network: TablePredictors):
    rows, labels = flags(100, seed=1)
    found = [network.predict_label("flag", {IMAGE: row[RAW]}) for row in rows]
    assert found[0].key == "label 1 flag 00101", "from features of the image, and from its pixels"
    truth = [one.classes.index(label["flag"]) for one, label in zip(found, labels, strict=True)]
    linear, pixels = ((np.stack([one.experts[index] for one in found]).argmax(1) == truth).mean() for index in (2, 4))
    assert pixels > 0.9 and 0.3 < linear < 0.7
    np.testing.assert_allclose([np.exp(one.experts[4]).sum() for one in found], 1, atol=1e-3)
    for broken in ({}, {IMAGE: b"no image"}):
        assert not network.predict_label("flag", broken).experts.any()


def test_a_file_holds_the_same_network_and_the_same_images_have_it_again(network: TablePredictors):
    before = torch.get_rng_state()
    assert to_bytes([fit_flags(MIN_STEPS)]) == to_bytes([network])
    assert torch.equal(before, torch.get_rng_state()), "weights of the model are those without a network"
    (read,) = from_bytes(to_bytes([network]), "file")
    file = io.BytesIO()
    PIL.Image.fromarray(flags(1, seed=2)[0][0][RAW]).save(file, "PNG")
    for _ in range(2):  # computed, and from the cache
        one, other = (table.predict_label("flag", {IMAGE: file.getvalue()}).experts for table in (network, read))
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("steps", "count", "taken"), [(MIN_STEPS - 1, 200, 0), (70, 200, 70), (900, 64, MAX_EPOCHS)])
def test_the_steps_of_a_network_follow_from_its_time(
    steps: int, count: int, taken: int, monkeypatch: pytest.MonkeyPatch
):
    found = []

    def train(images: np.ndarray, truth: np.ndarray, steps: int, config: ImageConfig) -> dict[str, np.ndarray]:
        found.append((steps, images.shape))
        return {"0": np.zeros((2, 4))}

    monkeypatch.setattr(image_network, "_train", train)
    table = fit_flags(steps, count)
    assert found == ([(taken, (count, 64, 64, 3))] if taken else []) and bool(table.networks) == bool(taken)
    (rows, labels), folds = flags(count), np.arange(count) % FOLDS
    for other in ([{} for _ in labels], [{"flag": "same"} for _ in labels], [{"flag": str(n)} for n in range(count)]):
        fit_table(rows, folds, 1, other, networks=plan_of(steps))
    fit_table([{"size": n % 9, "half": n % 9 / 2} for n in range(count)], folds, 1, labels, networks=plan_of(steps))
    few = MIN_ROWS - 1
    fit_table([*rows[:few], *({"size": n} for n in range(30))], folds[: few + 30], 1, labels[: few + 30],
              networks=plan_of(steps))  # fmt: skip
    assert len(found) == bool(taken), "no image, too few images, or too few or too many classes"


@pytest.mark.parametrize(("longest", "side"), [(8, 64), (32, 64), (40, 40), (300, 64)])
def test_small_images_are_enlarged_and_large_ones_shrunk(longest: int, side: int):
    assert fitting_side([np.zeros((longest, longest // 2, 3))] * 3) == side


def test_images_of_a_network_are_augmented_as_the_recipe_has_it(monkeypatch: pytest.MonkeyPatch):
    rows, labels = flags(MIN_ROWS)
    shown: list[ImageConfig] = []

    def augment(values: np.ndarray, config: ImageConfig, rng: np.random.Generator, reach: float) -> np.ndarray:
        shown.append(config)
        return values

    monkeypatch.setattr(image_network, "augmented", augment)
    monkeypatch.setattr(image_network, "MIN_STEPS", 1)
    config = ImageConfig(flips=True)
    assert fit_table(rows, np.arange(len(rows)) % FOLDS, 1, labels, networks=plan_of(1, config))
    assert len(shown) == BATCH and all(one is config for one in shown)


def test_a_slow_machine_takes_fewer_steps_and_ends_with_a_low_learning_rate(monkeypatch: pytest.MonkeyPatch):
    rows, labels = flags(64)
    now, rates = iter(np.arange(0, 1_000, 0.5).tolist()), list[float]()

    def step(optimizer: torch.optim.AdamW) -> None:
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(image_network, "CHANNELS", (4,))
    monkeypatch.setattr(image_network, "time", SimpleNamespace(monotonic=lambda: next(now)))
    truth = np.asarray([one["flag"] == "left" for one in labels]).astype(int)
    fit_network([row[RAW] for row in rows], truth, plan_of(100))
    taken = (image_network.SLOWEST * 100 * BATCH * 64**2 * PIXEL_SECONDS + image_network.TOLERANCE) / 0.5
    assert len(rates) == math.ceil(taken) - 1 < 100
    assert max(rates) > 0.9 * image_network.PEAK_RATE > 9 * rates[-1] > 0
