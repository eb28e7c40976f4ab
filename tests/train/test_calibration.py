"""A run with validation windows: widths and regressions are in its checkpoint, and predictions use them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from openm6.core.run_folder import RunFolder
from openm6.data.sources import open_sources
from openm6.evaluate.answers import answer
from openm6.inference.load import LoadedModel, load
from openm6.inference.sampling import MaskedSampling
from openm6.modalities.histogram import Histogram
from openm6.modalities.series import NumberSeries
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Example
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import train_recipe
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
    windows |= {"context": 24, "horizon": 6, "test_fraction": 0.2, "validation_fraction": 0.2}
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


def coverage(loaded: LoadedModel, asked: list[Example]) -> float:
    inside = []
    for example, histogram in zip(asked, answer(loaded, asked, MaskedSampling()), strict=True):
        assert isinstance(histogram, Histogram)
        low, high = histogram.interval(0.8)
        truth = np.asarray([value for value in example.target.raw.values if value is not None])
        inside += ((low <= truth) & (truth <= high)).tolist()
    return float(np.mean(inside))


def test_intervals_are_corrected_by_validation_windows(run: Path, loaded: LoadedModel) -> None:
    width = loaded.description.widths["series_out"]["sales"]
    assert loaded.numbers.widths == {"series_out": {"sales": width}}
    assert width < 0.9, "hardly trained, predictions are far too wide"
    asked = examples(run, "validation", 20)
    corrected = coverage(loaded, asked)
    loaded.numbers.widths = {}
    plain = coverage(loaded, asked)
    loaded.numbers.widths = loaded.description.widths
    assert abs(corrected - 0.8) < abs(plain - 0.8) and plain > 0.95


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
