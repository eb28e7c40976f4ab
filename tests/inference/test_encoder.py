"""A trained model as a frozen encoder of images and audio: its features, and a run that reads by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import openm6
from openm6.checkpoint.folder import latest
from openm6.checkpoint.load import open_reader
from openm6.codecs.external import weights_sha256
from openm6.core.config import read_yaml
from openm6.core.errors import CheckpointError, ConfigError
from openm6.inference import encoder
from openm6.inference.encoder import TrainedEncoder
from openm6.inference.load import load, read_texts
from openm6.modalities.batch import build_sequence, collate
from openm6.modalities.interface import Part
from openm6.modalities.pool import POOL, PoolAdapter, PoolConfig
from openm6.modalities.registry import source_segments
from openm6.train.run import train_recipe
from tests.train.tiny_recipe import tiny_recipe, write_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_recipe(write_recipe(folder, tiny_recipe(2)), out=folder / "run")
    return folder / "run"


def noise() -> PIL.Image.Image:
    levels = np.random.default_rng(0).integers(0, 255, (32, 32, 3))
    return PIL.Image.fromarray(levels.astype(np.uint8))


def test_features_are_the_states_before_the_last_layer(run: Path) -> None:
    loaded = load(run, "cpu")
    states: list[torch.Tensor] = []
    loaded.omni.backbone.layers[-2].register_forward_hook(lambda _, __, out: states.append(out[0]))
    reader = TrainedEncoder(str(run), "image")
    assert not reader.before and reader.after
    segments = source_segments([Part("image", noise()), Part("text", reader.after)], loaded.modalities)
    row = [*segments, loaded.text.target("")]
    batch = collate([[build_sequence(row)]], sum(map(len, row)))
    with torch.inference_mode():
        loaded.omni(batch.groups, batch.meta)
        (state,) = loaded.omni.backbone.final_norm(states[0])
    count = len(segments[0])
    features = reader(noise()).reshape(count, -1)
    expected = torch.cat([state[:count], state[-1].expand(count, -1)], 1)
    np.testing.assert_allclose(features, expected.numpy(), atol=2e-3)
    assert features.dtype == np.float16 and features.shape[1] == reader.width
    assert np.abs(features - reader(noise().rotate(90)).reshape(count, -1)).max() > 0.01


def test_embeddings_that_are_trained_later_change_no_encoder(run: Path, tmp_path: Path) -> None:
    loaded, before = load(run, "cpu"), TrainedEncoder(str(run), "image")
    loaded.omni.adapters[POOL] = PoolAdapter(loaded.description.backbone.hidden_size, PoolConfig(size=16))
    description = loaded.description.model_copy(update={"embedding": PoolConfig(size=16)})
    openm6.OpenM6(replace(loaded, description=description)).save_pretrained(tmp_path / "embeds")
    after = TrainedEncoder(str(tmp_path / "embeds"), "image")
    assert load(tmp_path / "embeds", "cpu").omni.pool is not None
    assert weights_sha256(before) == weights_sha256(after)
    np.testing.assert_array_equal(before(noise()), after(noise()))


@pytest.fixture(scope="module")
def drawing(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with experts for the images that it generates."""
    return with_experts(run, tmp_path_factory.mktemp("drawing"), "image")


def with_experts(start: Path, folder: Path, modality: str) -> Path:
    """Train experts for what is generated of a modality; all else is frozen, also experts that the start has."""
    experts = {"modalities": [f"{modality}_out"], "intermediate_size": 16, "num_experts": 2, "top_k": 1}
    other = {"image": "audio", "audio": "image"}[modality]
    recipe = tiny_recipe(3, num_processes=1, optimizer={"learning_rate": 0.01})
    recipe["model"] = {"start": str(start), "modality_experts": {**experts, "balance": "aux"}}
    recipe["model"]["freeze"] = ["text", "numbers", other, f"{modality}_in"]
    task = {"image": "text_to_image", "audio": "text_to_speech"}[modality]
    recipe["mixture"] = [part for part in recipe["mixture"] if part["task"] == task]
    used = {part["source"] for part in recipe["mixture"]}
    recipe["sources"] = {name: source for name, source in recipe["sources"].items() if name in used}
    del recipe["modalities"]
    train_recipe(write_recipe(folder, recipe), out=folder / "run")
    return folder / "run"


def test_experts_for_what_is_generated_change_nothing_that_is_read(run: Path, drawing: Path) -> None:
    before, after = (TrainedEncoder(str(folder), "image") for folder in (run, drawing))
    assert weights_sha256(before) == weights_sha256(after)
    np.testing.assert_array_equal(before(noise()), after(noise()))
    models = [openm6.load(folder) for folder in (run, drawing)]
    texts = [model.generate("What is this?", image=noise(), output="text", max_new_tokens=4) for model in models]
    drawn = [np.asarray(model.generate("draw 7", output="image", seed=0)) for model in models]
    assert texts[0] == texts[1] and not np.array_equal(*drawn)


def test_experts_are_added_to_those_of_a_start_which_stay_to_the_bit(drawing: Path, tmp_path: Path) -> None:
    speaking = with_experts(drawing, tmp_path, "audio")
    found = read_texts(latest(speaking))[0].backbone.modality_experts
    assert [one.modalities for one in found] == [("image_out",), ("audio_out",)]
    models = [openm6.load(folder) for folder in (drawing, speaking)]
    drawn = [np.asarray(model.generate("draw 7", output="image", seed=0)) for model in models]
    spoken = [model.generate("say 7", output="audio", seed=0).array for model in models]
    np.testing.assert_array_equal(*drawn)
    assert not np.array_equal(*spoken)
    total, active = models[1].loaded.omni.count_parameters()
    fewer, as_active = models[0].loaded.omni.count_parameters()
    assert total > fewer and active == as_active, "a token passes the experts of one kind"
    recipe = read_yaml(tmp_path / "tiny.yaml")
    recipe["model"]["start"], recipe["model"]["modality_experts"]["modalities"] = str(speaking), ["image", "audio_out"]
    with pytest.raises(ConfigError, match="two of modality_experts are for the tokens image_out: leave one out"):
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "third")


def test_audio_has_a_token_for_each_step_and_training_changes_what_is_read(run: Path) -> None:
    reader, samples = TrainedEncoder(str(run), "audio"), np.sin(np.arange(16_000) / 9).astype(np.float32)
    features = reader(samples)
    assert features.shape == (-(-16_000 // reader.step), reader.width)
    np.testing.assert_array_equal(features, reader(samples))
    changed = reader(samples, np.random.default_rng(1))
    assert len(changed) != len(features) or np.abs(changed - features).max() > 0.01


def test_a_run_reads_by_another_and_does_not_contain_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(2)
    monkeypatch.chdir(run.parent)
    for kind in ("image", "audio"):
        recipe["modalities"].setdefault(kind, {})["encoder"] = f"openm6:./{run.name}"
    train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "second")
    assert all(name.startswith(("adapters.", "backbone.")) for name in open_reader(latest(tmp_path / "second")).names)
    description, _ = read_texts(latest(tmp_path / "second"))
    assert {"image.encoder", "audio.encoder"} <= set(description.external)
    monkeypatch.chdir(tmp_path)  # a relative path holds in other folders, too
    model = openm6.load("second")
    assert isinstance(model.generate("What is this?", image=noise(), output="text", max_new_tokens=2), str)
    with pytest.raises(ConfigError, match="image.encoder is of this machine"):
        model.save_pretrained(tmp_path / "published")


def test_what_was_not_trained_on_such_inputs_or_is_not_there_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="no run or checkpoint at nothing"):
        TrainedEncoder("./nothing", "image")
    with pytest.raises(ConfigError, match="openm6:minj is no model of the package; did you mean 'mini'"):
        TrainedEncoder("minj", "image")
    monkeypatch.setattr(encoder, "trained_prompt", lambda *_: None)
    with pytest.raises(ConfigError, match="was not trained to answer image with text: name a model that was"):
        TrainedEncoder(str(run), "image")
