"""The mean of the weights of runs: each weight, what is kept of the last run, and its own report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from openm6.checkpoint.folder import latest
from openm6.checkpoint.load import open_reader
from openm6.core.errors import CheckpointError, ConfigError
from openm6.train.run import train_recipe
from tests.train.tiny_recipe import tiny_recipe, write_recipe
from tools.mini.average import average


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of four steps, its run after two of them, and the whole run."""
    path = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(path, tiny_recipe(4))
    train_recipe(recipe, ["loop.steps=2"], out=path / "last")
    shutil.copytree(path / "last", path / "first")
    train_recipe(recipe, ["loop.steps=4"], resume=True, out=path / "last")
    return path


def weights(run: Path) -> dict[str, torch.Tensor]:
    reader = open_reader(latest(run))
    return {name: reader.read(name) for name in reader.names}


def test_the_mean_is_a_run_that_gets_a_report_of_its_own(folder: Path) -> None:
    average([folder / "first", folder / "last"], folder / "mean")
    first, last, mean = (weights(folder / name) for name in ("first", "last", "mean"))
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (first[name] + last[name]) / 2)
    assert any(not torch.equal(first[name], tensor) for name, tensor in last.items())
    assert not (folder / "mean" / "report.json").exists() and not (folder / "mean" / "README.md").exists()
    train_recipe(str(folder / "tiny.yaml"), resume=True, out=folder / "mean")
    reports = [json.loads((folder / name / "report.json").read_text(encoding="utf-8")) for name in ("last", "mean")]
    assert reports[0]["steps"] == reports[1]["steps"] == 4 and reports[0]["tasks"] != reports[1]["tasks"]
    assert all(torch.equal(tensor, mean[name]) for name, tensor in weights(folder / "mean").items())


def test_runs_of_other_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(1)
    recipe["model"]["overrides"]["num_layers"] = 1
    train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "other")
    with pytest.raises(ConfigError, match="other and .*last have other weights: name runs of one training"):
        average([tmp_path / "other", folder / "last"], tmp_path / "mean")
    with pytest.raises(CheckpointError):
        average([tmp_path / "nowhere", folder / "last"], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
