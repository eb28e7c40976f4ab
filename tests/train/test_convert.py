"""Conversion between byte tiers and stages: the same answers, and a run that goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from openm6.checkpoint.folder import latest, read_state
from openm6.checkpoint.load import load_model, open_reader
from openm6.checkpoint.reader import CheckpointReader
from openm6.core.errors import CheckpointError, ConfigError
from openm6.core.run_folder import RunFolder
from openm6.hub.importing import import_model
from openm6.inference.load import read_texts
from openm6.modalities.registry import ModalitiesConfig
from openm6.models.description import MODEL_FILE, TOKENIZER_FILE, CheckpointConfig, read_description
from openm6.nn.config import ModalityExpertsConfig
from openm6.optim.config import PRECISION_OF_BYTES, OptimizerConfig
from openm6.train.convert import convert
from openm6.train.loop import train
from openm6.train.start import START_FILE
from tests.hub.published import publish
from tests.offload.test_executor import PLAIN, SHARED, run_config
from tests.train.words_training import WordsTraining, words_backbone, words_config


class DescribedTraining(WordsTraining):
    """Keeps what a multimodal run keeps beside the weights."""

    def files(self, last: bool = True) -> dict[str, str]:
        description = CheckpointConfig(
            backbone=self.words.backbone.config, modalities=ModalitiesConfig(), scales={}, trained_tasks=[]
        )
        return {MODEL_FILE: description.to_json(), TOKENIZER_FILE: "{}"}


def trained(folder: Path, backbone: Any, config: Any) -> Path:
    run = RunFolder.open(folder)
    run.write_config({"model": {"overrides": {"sharing": "all"}}, "loop": {"steps": 4, "stages": {"moments": "reset"}}})
    train(DescribedTraining(backbone), config, run)
    return folder


def answers(folder: Path, backbone: Any) -> torch.Tensor:
    training = WordsTraining(backbone)
    load_model(latest(folder), training.model)
    with torch.no_grad():
        return training.words(training.batch(99).words)[0]


@pytest.mark.parametrize(("size", "near"), [(4, 0.003), (2, 0.003), (1, 0.02)])
def test_a_plain_run_goes_on_with_fewer_bytes(tmp_path: Path, size: int, near: float) -> None:
    plain = trained(tmp_path / "plain", PLAIN, words_config(4))
    convert(plain, tmp_path / "small", precision=PRECISION_OF_BYTES[size])
    before, after = answers(plain, PLAIN), answers(tmp_path / "small", PLAIN)
    assert 0 < float((after - before).abs().mean()) < near
    kept, old = (CheckpointReader(latest(place), "optimizer") for place in (tmp_path / "small", plain))
    name = "backbone.layers.0.attention.qkv"
    torch.testing.assert_close(kept.read(f"{name}::row_var"), old.read(f"{name}::exp_avg_sq").mean(-1))
    assert RunFolder(tmp_path / "small").read_config()["loop"]["optimizer"]["precision"] == PRECISION_OF_BYTES[size]
    train(DescribedTraining(PLAIN), run_config(steps=6, bytes=size), RunFolder(tmp_path / "small"), resume=True)


def test_a_converted_run_has_the_settings_that_it_can_go_on_with(tmp_path: Path) -> None:
    """Offloaded weights are trained by one process, and the shape of a start is that of its description."""
    plain = trained(tmp_path / "plain", SHARED, words_config(1))
    start = CheckpointConfig(backbone=SHARED, modalities=ModalitiesConfig(), scales={}, trained_tasks=[])
    RunFolder(plain).write_config({"model": {"start": "runs/before"}, "loop": {"num_processes": 2}})
    (plain / START_FILE).write_text(start.to_json(), encoding="utf-8")
    convert(plain, tmp_path / "small", precision="int8-adafactor")
    convert(plain, tmp_path / "real", stage="real")
    small, real = (RunFolder(tmp_path / name).read_config() for name in ("small", "real"))
    assert "num_processes" not in small["loop"] and real["loop"]["num_processes"] == 2
    assert real["model"] == {"start": "runs/before"}
    found = [read_description((tmp_path / name / START_FILE).read_text(), name) for name in ("small", "real")]
    assert found[0] == start and found[1].backbone.sharing is None


@pytest.mark.parametrize("changes", [{}, {"stage": "real"}, {"precision": "int8-adafactor"}])
def test_the_state_of_other_optimizers_is_not_lost(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = trained(tmp_path / "plain", SHARED, words_config(1, optimizer=OptimizerConfig(name="muon")))
    with pytest.raises(ConfigError, match=r"trained with muon, whose state cannot be converted: .* set loop\.stages"):
        convert(plain, tmp_path / "out", **changes)


def test_an_imported_decoder_has_no_moments_to_convert(tmp_path: Path) -> None:
    publish("llama", tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "imported", receipt=False)
    convert(tmp_path / "imported", tmp_path / "small", precision="bf16-adafactor")
    weights = (
        open_reader(latest(tmp_path / name)).read("backbone.layers.0.attention.qkv") for name in ("imported", "small")
    )
    before, after = weights
    torch.testing.assert_close(after.float(), before.float(), rtol=0.01, atol=1e-6)


def test_an_imported_decoder_is_no_run_to_resume(tmp_path: Path) -> None:
    publish("llama", tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "imported", receipt=False)
    words = convert(tmp_path / "imported", tmp_path / "small", precision="bf16-adafactor")
    assert words.endswith(f"train it by a recipe with model: {{start: {tmp_path / 'small'}}}")
    with pytest.raises(CheckpointError, match="an imported model that was never trained: name it in the recipe"):
        train(DescribedTraining(PLAIN), run_config(), RunFolder(tmp_path / "small"), resume=True)


def test_a_small_run_goes_on_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = trained(tmp_path / "small", PLAIN, run_config(steps=4))
    convert(small, tmp_path / "plain", precision="fp32")
    assert torch.equal(answers(small, PLAIN), answers(tmp_path / "plain", PLAIN))
    train(DescribedTraining(PLAIN), words_config(6), RunFolder(tmp_path / "plain"), resume=True)
    monkeypatch.chdir(small / "checkpoints")
    convert(Path("step-4"), tmp_path / "inside", precision="fp32")
    assert RunFolder(tmp_path / "inside").read_config()["loop"]["steps"] == 4
    # A copy has no settings, and must not take those of a folder above it.
    shutil.copytree("step-4", small / "copies" / "step-4")
    said = convert(small / "copies" / "step-4", tmp_path / "copied", precision="fp32")
    assert not RunFolder(tmp_path / "copied").config.exists() and "openm6 train RECIPE --resume" in said


@pytest.mark.parametrize("share_routers", [False, True])
def test_a_pseudo_checkpoint_becomes_a_real_one(tmp_path: Path, share_routers: bool) -> None:
    shared = words_backbone(sharing=(0, 1, 0, 1), share_routers=share_routers)
    real = words_backbone(share_routers=share_routers)
    pseudo = trained(tmp_path / "pseudo", shared, words_config(4))
    convert(pseudo, tmp_path / "real", stage="real")
    assert torch.equal(answers(pseudo, shared), answers(tmp_path / "real", real))
    state = read_state(latest(tmp_path / "real"))
    assert state["stage"] == "real"
    assert json.loads((latest(tmp_path / "real") / MODEL_FILE).read_text())["backbone"]["sharing"] is None
    settings = RunFolder(tmp_path / "real").read_config()
    assert settings["model"]["overrides"]["sharing"] is None and "stages" not in settings["loop"]
    train(DescribedTraining(real), words_config(6), RunFolder(tmp_path / "real"), resume=True)


def test_what_cannot_be_converted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trained(tmp_path / "real", PLAIN, run_config(steps=1))
    with pytest.raises(ConfigError, match="--precision int4 must be one of fp32, bf16-adafactor-momentum"):
        convert(real, tmp_path / "out", precision="int4")
    description, tokenizer = read_texts(latest(real))
    experts = ModalityExpertsConfig(modalities=("image",), intermediate_size=32, num_experts=2, top_k=1)
    backbone = description.backbone.model_copy(update={"modality_experts": (experts,)})
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="experts, which are trained in fp32 alone"):
        found = description.model_copy(update={"backbone": backbone}), tokenizer
        patch.setattr("openm6.train.convert.read_texts", lambda _: found)
        convert(real, tmp_path / "out", precision="int8-adafactor")
    with pytest.raises(ConfigError, match="cannot share weights again"):
        convert(real, tmp_path / "out", stage="pseudo")
    with pytest.raises(ConfigError, match="already holds a run"):
        convert(real, real, precision="int8-adafactor")
    train(WordsTraining(SHARED), words_config(1), RunFolder.open(tmp_path / "bare"))
    with pytest.raises(CheckpointError, match=r"has no model\.json"):
        convert(tmp_path / "bare", tmp_path / "out")
    (latest(real) / "shard-00000-model-00001-of-00001.safetensors").touch()
    with pytest.raises(ConfigError, match="is in shards, one for each rank: resume the run with one process"):
        convert(real, tmp_path / "out", precision="int8-adafactor")
