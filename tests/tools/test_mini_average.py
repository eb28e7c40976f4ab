"""The mean of checkpoints: each weight, and what is kept of the last one."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openm6.api.model import OpenM6, load
from openm6.core.errors import ConfigError
from openm6.inference.load import LoadedModel
from tests.small_model import embedding_model, loaded
from tools.mini.average import average


def saved(path: Path, change: float, model: LoadedModel) -> Path:
    omni = deepcopy(model.omni)
    with torch.no_grad():
        for parameter in omni.parameters():
            parameter.add_(change)
    OpenM6(replace(model, omni=omni)).save_pretrained(path)
    return path


def test_weights_are_the_mean_and_all_else_is_of_the_last_one(tmp_path: Path) -> None:
    model, other = loaded(), loaded(trained_tasks=(("text_to_image", "digits"),))
    first = saved(tmp_path / "first", 0.0, model)
    last = saved(tmp_path / "last", 1.0, replace(model, description=other.description))
    average([first, last], tmp_path / "mean")
    mean, before = load(tmp_path / "mean").loaded, dict(load(first).loaded.omni.named_parameters())
    for name, parameter in mean.omni.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.5)
    assert mean.description.trained_tasks == load(last).loaded.description.trained_tasks
    assert mean.description.trained_tasks != load(first).loaded.description.trained_tasks


def test_models_of_other_weights_are_refused(tmp_path: Path) -> None:
    first, other = saved(tmp_path / "first", 0.0, loaded()), saved(tmp_path / "other", 0.0, embedding_model())
    with pytest.raises(ConfigError, match="other and .*first have other weights: name checkpoints of one training"):
        average([other, first], tmp_path / "mean")
