"""First values of the projections of encoders: least squares to the words of the answers."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from openm6.core.run_folder import RunFolder
from openm6.hub.importing import import_model
from openm6.modalities.codes import PatchAdapter
from openm6.modalities.text import Text
from openm6.train import alignment, multimodal
from openm6.train.alignment import LeastSquares
from openm6.train.multimodal import MultimodalTraining
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import read_recipe
from openm6.train.start import with_start
from tests.external_models import publish
from tests.hub.published import publish as publish_decoder
from tests.train.test_external import ENCODER, recipe_with
from tests.train.tiny_recipe import write_recipe


def test_least_squares_are_those_of_a_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 5)) + 3, rng.normal(size=(80, 2)) - 7
    fit = LeastSquares(5, 2)
    for rows in (slice(0, 30), slice(30, 80)):
        fit.add(torch.tensor(x[rows]), torch.tensor(y[rows]))
    weight, bias = fit.solve(0.5)
    reference = Ridge(80 * 0.5 * x.var(0).mean()).fit(x, y)
    np.testing.assert_allclose(weight, reference.coef_, atol=1e-9)
    np.testing.assert_allclose(bias, reference.intercept_, atol=1e-9)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    publish_decoder("llama", tmp_path / "theirs")
    publish(ENCODER, tmp_path / "siglip")
    import_model(str(tmp_path / "theirs"), tmp_path / "imported", receipt=False)
    found = recipe_with(tmp_path / "siglip", 2)
    found["modalities"] = {key: found["modalities"][key] for key in ("image", "audio")}
    found["mixture"] = [{"source": "digits", "task": "image_classification"}]
    found["sources"] = {"digits": found["sources"]["digits"]}
    monkeypatch.setattr(alignment, "EXAMPLES", 120)
    return found | {"model": {"start": str(tmp_path / "imported"), "freeze": ["text"]}}


def explained(recipe: dict[str, Any], folder: Path) -> float:
    """The fraction of the variance of the answers' embeddings that the projection of images explains."""
    run = RunFolder.open(folder / "run")
    built, values = read_recipe(Path(write_recipe(folder, recipe)), [])
    assert isinstance(built, MultimodalRecipe)
    built, _ = with_start(built, values, run)
    training = MultimodalTraining(built, run, torch.device("cpu"))
    adapter = training.omni.adapter("image_in")
    assert isinstance(adapter, PatchAdapter)
    wanted, got = [], []
    for batch in islice(training.batches(), 3):
        group = batch.groups["image_in"]
        answers, _ = alignment._answers(training.omni, cast(Text, training.modalities["text"]), batch)
        wanted.append(answers[group.example])
        got.append(adapter.outer(adapter.hidden(group.arrays)).detach())
    answers = torch.cat(wanted)
    return 1 - float((torch.cat(got) - answers).var(0).sum() / answers.var(0).sum())


def test_a_new_projection_begins_with_the_words_of_the_answers(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert explained(recipe, tmp_path) > 0.1
    monkeypatch.setattr(multimodal, "align", lambda *_: None)
    assert explained(recipe, tmp_path) < 0
