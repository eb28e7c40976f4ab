"""Runs whose images and audio are read and written by frozen models of `transformers`."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

import openm6
from openm6.checkpoint.folder import latest
from openm6.checkpoint.load import open_reader
from openm6.codecs.external import PREFIX, load_external, weights_sha256
from openm6.core.errors import CheckpointError, OpenM6Error
from openm6.evaluate.run import evaluate
from openm6.hub.importing import import_model
from openm6.inference.load import load, read_texts
from openm6.train.run import train_recipe
from tests.external_models import publish, settings
from tests.hub.published import publish as publish_decoder
from tests.train.tiny_recipe import tiny_recipe, write_recipe

ENCODER = "siglip part"


def recipe_with(encoder: Path, steps: int, **changes: Any) -> dict[str, Any]:
    """A recipe with an encoder of images in a folder that a test may change."""
    recipe = tiny_recipe(steps, **changes)
    recipe["modalities"] |= settings()
    recipe["modalities"]["image"]["encoder"] = f"{PREFIX}{encoder}"
    return recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("external")
    publish(ENCODER, folder / "siglip")
    train_recipe(write_recipe(folder, recipe_with(folder / "siglip", 4)), out=folder / "run")
    return folder / "run"


def weights(run: Path) -> dict[str, torch.Tensor]:
    reader = open_reader(latest(run))
    return {name: reader.read(name) for name in reader.names}


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_a_run_names_its_models_and_their_weights_and_does_not_contain_them(run: Path) -> None:
    description, _ = read_texts(latest(run))
    name = f"{PREFIX}{run.parent / 'siglip'}"
    assert description.modalities.image.encoder == name
    assert set(description.external) == {"image.codec", "image.encoder", "audio.codec", "audio.encoder"}
    assert description.external["image.encoder"] == weights_sha256(load_external(name, "image encoder"))
    saved = weights(run)
    assert all(key.startswith(("adapters.", "backbone.")) for key in saved)
    shapes = {key: tuple(saved[f"adapters.{key}"].shape) for key in ("image_in.inner.weight", "audio_in.inner.weight")}
    assert shapes == {"image_in.inner.weight": (64, 32), "audio_in.inner.weight": (64, 128)}
    assert [len(saved[f"adapters.{kind}_out.to_codes"]) for kind in ("image", "audio")] == [1, 3]


def test_training_leaves_the_frozen_weights_and_goes_on_to_the_bit(run: Path, tmp_path: Path) -> None:
    before = hashes(run.parent / "siglip")
    shutil.copytree(run, tmp_path / "run")
    first = load_file(tmp_path / "run" / "checkpoints" / "step-2" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    result = train_recipe("demo", resume=True, out=tmp_path / "run")
    assert result is not None and result.steps == 4
    last, again = weights(run), weights(tmp_path / "run")
    assert all(torch.equal(last[key], again[key]) for key in last)
    assert not torch.equal(first["adapters.image_in.inner.weight"], last["adapters.image_in.inner.weight"])
    assert hashes(run.parent / "siglip") == before
    assert read_texts(latest(run)) == read_texts(latest(tmp_path / "run"))


def test_a_run_generates_and_is_evaluated(run: Path) -> None:
    model = openm6.load(run)
    image = model.generate("draw the digit seven", output="image", num_inference_steps=2)
    assert isinstance(image, PIL.Image.Image) and image.size == (32, 32)
    audio = model.generate("say seven", output="audio", num_inference_steps=2)
    assert audio.array.shape == (19_200,) and audio.sampling_rate == 16_000
    assert isinstance(model.generate("What is this?", image=image, output="text", max_new_tokens=4), str)
    assert isinstance(model.generate(audio=audio, output="text", max_new_tokens=4), str)
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert len(report["tasks"]) == 5
    assert len(evaluate(run, ["image_classification"]).results) == 1


def test_other_weights_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent / "siglip", tmp_path / "kept")
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    try:
        publish(ENCODER, run.parent / "siglip", seed=1)
        refused = r"modalities\.image\.encoder has other weights than in the training"
        for use in (lambda: load(run), lambda: train_recipe("demo", resume=True, out=tmp_path / "run")):
            with pytest.raises(CheckpointError, match=refused):
                use()
    finally:
        shutil.copytree(tmp_path / "kept", run.parent / "siglip", dirs_exist_ok=True)
    assert load(run).image.encoder is not None


def test_a_missing_model_stops_a_run_before_it_begins(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe_with(tmp_path / "none", 1))
    with pytest.raises(OpenM6Error, match="there is no folder .*none: name one with a model"):
        train_recipe(path, out=tmp_path / "run")
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def test_an_imported_decoder_gets_an_encoder(tmp_path: Path) -> None:
    publish_decoder("llama", tmp_path / "theirs")
    publish(ENCODER, tmp_path / "siglip")
    import_model(str(tmp_path / "theirs"), tmp_path / "imported", receipt=False)
    recipe = recipe_with(tmp_path / "siglip", 2)
    recipe["modalities"] = {key: recipe["modalities"][key] for key in ("image", "audio")}
    recipe["mixture"], recipe["eval"] = recipe["mixture"][:3], {"at_end": False}
    recipe |= {"model": {"start": str(tmp_path / "imported"), "freeze": ["text", "backbone"]}}
    train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    before, after = weights(tmp_path / "imported"), weights(tmp_path / "run")
    assert all(torch.equal(before[key], after[key]) for key in after if key.startswith(("backbone.", "adapters.text")))
    assert load(tmp_path / "run").image.encoder is not None
    recipe["modalities"]["image"] = recipe["modalities"]["image"] | {"encoder": None}
    recipe["model"] = {"start": str(tmp_path / "run"), "freeze": ["image"]}
    with pytest.raises(OpenM6Error, match=r"modalities\.image\.encoder is another one than in the start"):
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "other")
    recipe["model"] = {"start": str(tmp_path / "run"), "freeze": ["text", "backbone"]}
    train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "pixels")
    assert load(tmp_path / "pixels").image.encoder is None
