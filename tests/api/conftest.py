"""A model of a few steps in a run's folder, loaded once, and files to ask about."""

from __future__ import annotations

from pathlib import Path

import pytest

import openm6
from openm6.train.run import train_recipe
from tests.data.sample_images import png, wav
from tests.train.tiny_recipe import tiny_recipe, write_recipe


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    recipe = tiny_recipe(2, save_every=2)
    windows = {"columns": ["temp_max"], "time": "date", "context": 16, "horizon": 4, "stride": 50}
    recipe["sources"]["weather"] = {"kind": "windows", "path": "embedded:seattle_weather_daily", **windows}
    recipe["mixture"].append({"source": "weather", "task": "time_series_forecasting"})
    recipe["mixture"].append({"source": "penguins", "task": "tabular_classification"})
    train_recipe(write_recipe(folder, recipe), out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def m6(run: Path) -> openm6.OpenM6:
    return openm6.load(run)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in."""
    (tmp_path / "seven.png").write_bytes(png("red", 40))
    (tmp_path / "zero.wav").write_bytes(wav(seconds=0.5))
    (tmp_path / "empty.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path
