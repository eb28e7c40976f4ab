"""A run with validation windows: widths and regressions are in its checkpoint, and predictions use them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch

import openm6
from openm6.core.errors import OutputError, TrainingError
from openm6.core.run_folder import RunFolder
from openm6.data.records import Fields
from openm6.data.sources import open_sources
from openm6.data.text_tables import JsonlConfig
from openm6.evaluate.answers import answer
from openm6.inference.load import LoadedModel, load
from openm6.inference.sampling import MaskedSampling
from openm6.modalities.histogram import Histogram
from openm6.modalities.series import NumberSeries
from openm6.modalities.simple_predictors import EXPERTS, MAX_WEIGHT, RAW, LabelPrediction, likely_weights
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Example
from openm6.train import calibration, image_network
from openm6.train.multimodal import MultimodalTraining
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import train_recipe
from openm6.train.start import Start
from tests.train.test_simple_predictors import flags
from tests.train.tiny_recipe import tiny_recipe, write_recipe

STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    step, rng = np.arange(240), np.random.default_rng(0)
    values = 100 + 0.2 * step + 9 * np.sin(2 * np.pi * step / 7) + rng.normal(0, 1, 240)
    cells = ["" if n % 31 == 5 else f"{value:.2f}" for n, value in enumerate(values)]
    days = [np.datetime64("2024-01-01") + n for n in range(240)]
    (folder / "sales.csv").write_text("day,sales\n" + "".join(f"{d},{v}\n" for d, v in zip(days, cells, strict=True)))
    recipe = tiny_recipe(STEPS, save_every=STEPS)
    windows = {"kind": "windows", "path": str(folder / "sales.csv"), "columns": ["sales"], "time": "day"}
    windows |= {"context": 24, "horizon": 6, "test_fraction": 0.2, "validation_fraction": 0.4}
    recipe |= {"sources": {"sales": windows}, "mixture": [{"source": "sales", "task": "time_series_forecasting"}]}
    train_recipe(write_recipe(folder, {**recipe, "eval": {**recipe["eval"], "at_end": False}}), out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedModel:
    return load(run, "cpu")


def examples(run: Path, split: str, count: int, horizon: int = 6) -> list[Example]:
    recipe = RunFolder(run).read_config()
    config = MultimodalRecipe.model_validate(recipe).sources["sales"].model_copy(update={"horizon": horizon})
    source = open_sources({"sales": config}, split)["sales"]  # type: ignore[arg-type]
    rows = np.linspace(0, len(source) - 1, count).astype(int).tolist()
    task = TASKS["time_series_forecasting"]
    return [task.example(source[row], np.random.default_rng(0), language="en") for row in rows]


def coverage(loaded: LoadedModel, asked: list[Example]) -> tuple[float, float]:
    """The fraction of true values within the 80 % intervals, and the mean length of these."""
    inside, lengths = [], []
    for example, histogram in zip(asked, answer(loaded, asked, MaskedSampling()), strict=True):
        assert isinstance(histogram, Histogram)
        low, high = histogram.interval(0.8)
        truth = np.asarray([value for value in example.target.raw.values if value is not None])
        inside += ((low <= truth) & (truth <= high)).tolist()
        lengths += (high - low).tolist()
    return float(np.mean(inside)), float(np.mean(lengths))


def test_intervals_are_corrected_by_validation_windows(run: Path, loaded: LoadedModel) -> None:
    width = loaded.description.widths["series_out"]["sales"]
    assert loaded.numbers.widths == {"series_out": {"sales": width}}
    assert width < 0.9, "hardly trained, predictions are far too wide"
    asked = examples(run, "validation", 60)
    corrected, length = coverage(loaded, asked)
    loaded.numbers.widths = {}
    plain, plain_length = coverage(loaded, asked)
    loaded.numbers.widths = loaded.description.widths
    assert abs(corrected - 0.8) < abs(plain - 0.8) and plain > 0.95
    assert length < 0.9 * plain_length


def test_forecasts_without_validation_windows_are_wider_than_predicted(run: Path, tmp_path: Path) -> None:
    recipe = MultimodalRecipe.model_validate(RunFolder(run).read_config())
    recipe.sources["sales"] = recipe.sources["sales"].model_copy(update={"validation_fraction": 0.0})
    training = MultimodalTraining(recipe, RunFolder.open(tmp_path / "run"), torch.device("cpu"))
    own, found = training.description, []
    for calibrated in (True, False):  # offloaded and sharded ones are not
        training.calibration = training.calibration if calibrated else None
        found.append(json.loads(training.files()["model.json"])["widths"])
    assert found == [{"series_out": {"sales": 1.25}}] * 2 and training.numbers.widths == found[0]
    before = own.model_copy(update={"widths": {"series_out": {"sales": 1.4, "old": 0.9}, "numbers_out": {"x": 1.1}}})
    assert Start(before, "", [], None).merge(own).widths == before.widths, "those of a start stay"


def test_a_run_resumed_after_its_last_step_is_evaluated_with_its_widths(
    run: Path, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[LoadedModel] = []

    def evaluated(*_: Any, loaded: LoadedModel, **__: Any) -> None:
        found.append(loaded)
        raise OutputError("enough")

    monkeypatch.setattr("openm6.train.multimodal.evaluate", evaluated)
    copy = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(TrainingError, match="enough"):
        train_recipe(str(copy / "config.yaml"), overrides=["eval.at_end=true"], resume=True, out=copy)
    assert found[0].numbers.widths == found[0].description.widths == loaded.description.widths


def test_pairs_and_broken_records_are_no_obstacle(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (16, 16), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG broken")
    splits = ["train", "validation", "test"]
    files = [f"{name}.png,cat,{split}" for split in splits for name in ("good", "bad")]
    (tmp_path / "photos.csv").write_text("\n".join(["image,label,split", *files]) + "\n")
    (tmp_path / "sizes.csv").write_text(
        "\n".join(["label,size,split", *(f"cat,{n},{s}" for n, s in enumerate(splits))])
    )
    tables = {name: {"kind": "csv", "path": str(tmp_path / f"{name}.csv")} for name in ("photos", "sizes")}
    tables["photos"]["fields"] = {"image": "image", "label": "label"}
    tables["sizes"]["fields"] = {"label": "label", "numbers": ["size"]}
    both = {"kind": "pairs", "left": "photos", "right": "sizes"}
    mixture = [{"source": "both", "task": "image_regression"}]
    recipe = tiny_recipe() | {"sources": {**tables, "both": both}, "mixture": mixture}
    training = MultimodalTraining(
        MultimodalRecipe.model_validate(recipe), RunFolder.open(tmp_path / "run"), torch.device("cpu")
    )
    widths = json.loads(training.files()["model.json"])["widths"]
    assert [len(examples) for examples in training.calibration] == [1] and set(widths["numbers_out"]) == {"size"}


def test_each_number_column_of_a_table_is_asked_for_and_all_of_them_at_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = [f"{a:.2f},{a + b:.2f},{b:.2f},{('train', 'validation', 'test')[n % 3]}" for n, (a, b) in
            enumerate(rng.normal(size=(90, 2)))]  # fmt: skip
    (tmp_path / "table.csv").write_text("\n".join(["first,both,second,split", *rows]) + "\n")
    table = {"kind": "csv", "path": str(tmp_path / "table.csv"), "fields": {"numbers": ["first", "both", "second"]}}
    recipe = tiny_recipe() | {
        "sources": {"table": table},
        "mixture": [{"source": "table", "task": "record_regression"}],
    }
    training = MultimodalTraining(
        MultimodalRecipe.model_validate(recipe), RunFolder.open(tmp_path / "run"), torch.device("cpu")
    )
    assert training.calibration is not None
    (found,) = training.calibration
    asked = Counter(column for example in found for column in example.target.raw)
    assert asked == {"first": 30, "both": 30, "second": 30}
    assert all(len(example.target.options["given"]) == 2 for example in found)
    answered: list[int] = []

    def counted(loaded: LoadedModel, examples: list[Example], sampling: MaskedSampling) -> list[Any]:
        answered.append(len(examples))
        return answer(loaded, examples, sampling)

    monkeypatch.setattr(calibration, "answer", counted)
    monkeypatch.setattr("openm6.train.multimodal.EARLY_EXAMPLES", 45)
    for last in (False, True):
        widths = json.loads(training.files(last)["model.json"])["widths"]["numbers_out"]
        assert set(widths) == {"first", "both", "second"}
    assert answered == [45, 90]


def test_regressions_are_in_the_checkpoint_and_serve_any_horizon_with_and_without_times(
    run: Path, loaded: LoadedModel
) -> None:
    assert set(loaded.numbers.ridges) == {"sales"} and not loaded.numbers.ridges["sales"].folds
    (example,) = examples(run, "test", 1, horizon=24)
    raw = example.target.raw
    truth = np.asarray([np.nan if value is None else value for value in raw.values])
    for clock in (raw.clock, None):
        arrays = loaded.numbers.target(NumberSeries("sales", [1.0] * 24, raw.past, clock)).arrays
        ridge = arrays["units"][0, 0] + arrays["units"][0, 1] * arrays["forecasts"].reshape(24, -1)[:, -1]
        assert np.nanmean(np.abs(ridge - truth)) < 4, "the season goes on"


def trained(folder: Path, source: dict[str, Any], task: str) -> openm6.OpenM6:
    """A model of a few steps with all simple predictors."""
    recipe = tiny_recipe(STEPS, save_every=STEPS)
    recipe["modalities"]["numbers"] = {"predictors": "auto"}
    recipe["eval"]["at_end"] = False
    recipe |= {"sources": {"table": source}, "mixture": [{"source": "table", "task": task}]}
    train_recipe(write_recipe(folder, recipe), out=folder / "run")
    return openm6.load(folder / "run", device="cpu")


def test_labels_are_predicted_by_simple_predictors_too_with_weights_by_validation_records(tmp_path: Path) -> None:
    colours = ("red", "green", "blue")
    rows = [{"size": n % 60, "colour": colours[n % 60 // 20]} for n in range(300)]
    (tmp_path / "rows.csv").write_text("size,colour\n" + "".join(f"{row['size']},{row['colour']}\n" for row in rows))
    source = {"kind": "csv", "path": str(tmp_path / "rows.csv"), "test_fraction": 0.2, "validation_fraction": 0.2}
    source["fields"] = {"numbers": ["size"], "categories": ["colour"]}
    again = trained(tmp_path, source, "record_classification")
    ((key, weights),) = again.loaded.numbers.widths.items()
    assert key == "label 1 colour 1001" and weights["trees"] > 0.3
    frame = pd.DataFrame({"size": [5, 30, 55]})
    found = again.predict(frame, target="colour", classes=colours)
    for one in (found, again.predict(frame, target="colour")):
        assert one["predictions"].tolist() == list(colours)
    np.testing.assert_allclose(found[list(colours)].sum(axis=1), 1)
    ranked = again.rank("What is its colour?", colours, numbers={"size": 30.0})
    assert ranked[0].candidate == "green" and ranked[0].log_likelihood > -0.7


def test_a_network_of_images_is_in_the_checkpoint_with_a_weight_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_network, "CHANNELS", (8, 16, 16))
    monkeypatch.setattr(image_network, "MAX_EPOCHS", 40)
    rows, labels = flags(120)
    lines = ["image,label,split"]
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        PIL.Image.fromarray(row[RAW]).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{label['flag']},{'test' if number < 10 else 'val' if number < 30 else 'train'}")
    (tmp_path / "flags.csv").write_text("\n".join(lines) + "\n")
    source = {"kind": "csv", "path": str(tmp_path / "flags.csv"), "fields": {"image": "image", "label": "label"}}
    again = trained(tmp_path, source, "image_categorization")
    ((key, weights),) = again.loaded.numbers.widths.items()
    assert key == "label 1 label 00101" and list(weights) == ["model", *EXPERTS]
    assert weights["pixels"] > 0.3 and all(0 <= one <= MAX_WEIGHT for one in weights.values())
    ranked = [again.rank("What is its label?", ["left", "right"], image=tmp_path / f"{n}.png") for n in range(10)]
    images = [tmp_path / f"{number}.png" for number in range(10)]
    assert again.generate(image=images) == [label["flag"] for label in labels[:10]]
    assert [one[0].candidate for one in ranked] == [label["flag"] for label in labels[:10]]
    np.testing.assert_allclose([sum(np.exp(x.log_likelihood) for x in one) for one in ranked], 1)


@pytest.mark.parametrize(
    ("known", "weights"),
    [("01101", [1] * 6), ("00101", [0, 0, 0, 0, 0, 4]), ("0010", [2] * 5)],
)
def test_weights_are_drawn_to_equal_ones_or_to_the_network_of_an_image_alone(known: str, weights: list[int]) -> None:
    experts = -np.outer([int(one) for one in known], [0.5, 1.0])
    np.testing.assert_array_equal(likely_weights(experts), np.asarray(weights) / 4)


def test_weights_are_drawn_to_those_that_were_fitted_together() -> None:
    experts = -np.outer([1, 1, 0, 0, 1], [0.5, 1.0])
    found = likely_weights(experts, np.asarray([0.3, 0.1, 0.4, 0.0]))
    np.testing.assert_allclose(found[[0, 1, 2, 5]], [0.35, 0.3, 0.1, 1 / 4])


def test_labels_are_weighed_by_fewer_records_before_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(loaded: LoadedModel, examples: list[Example], classes: list[str]) -> np.ndarray:
        asked.append(len(examples))
        return np.zeros((len(examples), len(classes)))

    monkeypatch.setattr(calibration, "class_nll", counted)
    predicted = LabelPrediction("label 1 c 1000", ["x", "y"], np.log([[0.9, 0.1]]), np.full(2, 0.5))
    numbers = SimpleNamespace(label_predictions=lambda options: predicted)
    example: Any = SimpleNamespace(answer="x", target=SimpleNamespace(modality="text", options={}))
    loaded: Any = SimpleNamespace(numbers=numbers, omni=torch.nn.Identity())
    for most in (45, 3000):
        assert calibration.fit_widths(loaded, [[example] * 90, []], most).keys() == {predicted.key}
    assert asked == [45, 90]


def test_columns_are_asked_for_in_the_language_of_their_text(tmp_path: Path) -> None:
    rows = [{"price": n, "rating": n % 5, "text_en": f"a thing of {n} parts"} for n in range(20)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = JsonlConfig(path=str(tmp_path / "t.jsonl"), fields=Fields(numbers=["price", "rating"], text_en="text_en"))
    source = open_sources({"t": config}, "train")["t"]
    asked = calibration.asked_columns(TASKS["record_regression"], source)
    assert len(asked) == 2 and all(task.languages(source[0]) == ["en"] for task in asked)
