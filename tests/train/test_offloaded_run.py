"""A giant with everything at once: all modalities, offloaded, few bytes a parameter, from pseudo to real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from openm6.checkpoint.folder import latest, read_state, step_folder
from openm6.checkpoint.save import Snapshot, save
from openm6.core.config import build
from openm6.core.device import process_memory, reset_peak_memory
from openm6.core.errors import CheckpointError
from openm6.core.run_folder import RunFolder
from openm6.inference.load import load
from openm6.nn.config import ExpertsConfig
from openm6.train.config import PlateauConfig, StagesConfig, SwitchConfig
from openm6.train.convert import convert
from openm6.train.loop import train
from openm6.train.multimodal import MultimodalTraining
from openm6.train.offloaded import OffloadedTrainStep
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import train_recipe
from tests.offload.test_executor import SHARED, bytes_of, run_config
from tests.train.tiny_recipe import MODEL, tiny_recipe, write_recipe
from tests.train.words_training import WordsTraining, words_backbone

STEPS, SWITCH = 6, 3


def giant_recipe(switch: dict[str, Any], steps: int = STEPS, **model: Any) -> dict[str, Any]:
    loop = {
        "offload": {"num_gpu_layers": 0, "gradient_accumulation_steps": 2},
        "optimizer": {"learning_rate": 0.002, "precision": "bf16-adafactor"},
        "stages": {"switch": switch, "warmup_steps": 2},
    }
    recipe = tiny_recipe(steps, **{**loop, "save_every": SWITCH, "keep_last": 9})
    recipe["eval"] = {**recipe["eval"], "at_end": True}
    return {**recipe, "model": {**MODEL, "overrides": {**MODEL["overrides"], "sharing": "all", **model}}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("giant")
    train_recipe(write_recipe(folder, giant_recipe({"step": SWITCH})), out=folder / "run")
    return folder / "run"


def test_it_is_trained_judged_and_told_apart(finished: Path) -> None:
    lines = RunFolder(finished).read_metrics()
    assert [line["stage"] for line in lines] == ["pseudo"] * SWITCH + ["real"] * (STEPS - SWITCH)
    assert {"loss/text", "loss/image_out", "loss/audio_out", "loss/numbers_out"} <= set().union(*lines)
    assert (finished / "report.json").exists()
    sets = {}
    for step in (SWITCH, STEPS):
        folder = step_folder(finished / "checkpoints", step)
        backbone = load(folder).omni.backbone
        sets[read_state(folder)["stage"]] = (backbone.config.stage, len(backbone.config.group_layers))
    assert sets == {"pseudo": ("pseudo", 1), "real": ("real", 2)}


def test_a_shared_set_is_moved_once_a_pass(tmp_path: Path) -> None:
    """Four layers of one set fetch it once a step, and take it home once, whatever the batch is made of."""
    moved = {}
    for sharing in ("all", None):
        recipe = build(MultimodalRecipe, giant_recipe({"step": 9}, sharing=sharing, num_layers=4), "a test")
        training = MultimodalTraining(recipe, RunFolder.open(tmp_path / str(sharing)), torch.device("cpu"))
        train_step = OffloadedTrainStep(training, recipe.loop)
        batches = training.batches()
        for step in (1, 2):
            before = train_step.store.moved_bytes
            train_step.update(next(batches), step, 9)
        layout = train_step.store.layouts[0]
        moved[sharing] = (train_step.store.moved_bytes - before, layout.num_bytes, layout.read_bytes)
    total, whole, _ = moved["all"]
    assert total == whole  # held since the step before: it only goes home
    total, whole, read = moved[None]
    assert total >= 4 * whole + 4 * read  # each goes home, and comes at least once


def test_stage_and_bytes_are_converted_and_the_run_goes_on(finished: Path, tmp_path: Path) -> None:
    pseudo = step_folder(finished / "checkpoints", SWITCH)
    convert(pseudo, tmp_path / "real", precision="int8-adafactor", stage="real")
    config = str(tmp_path / "real" / "config.yaml")
    state = read_state(latest(tmp_path / "real"))
    assert (state["stage"], state["precision"], state["step"]) == ("real", "int8-adafactor", SWITCH)
    result = train_recipe(config, resume=True, out=tmp_path / "real")
    assert result is not None and result.steps == STEPS
    with pytest.raises(
        CheckpointError, match="holds weights of precision int8-adafactor, this run trains bf16-adafactor"
    ):
        train_recipe(config, ["loop.optimizer.precision=bf16-adafactor"], resume=True, out=tmp_path / "real")


@pytest.mark.parametrize(
    "switch", [SwitchConfig(plateau=PlateauConfig(window=2, improvement=0.99)), SwitchConfig(minutes=1e-9)]
)
def test_a_switch_by_loss_or_clock_happens_in_a_streamed_run(switch: SwitchConfig, tmp_path: Path) -> None:
    """A loss that does not fall by 99 % in two steps stands still; a moment is over after the first step."""
    run = RunFolder.open(tmp_path)
    train(WordsTraining(SHARED), run_config(stages=StagesConfig(switch=switch), steps=6), run)
    first = 1 if switch.plateau is None else 4
    assert [line["stage"] for line in run.read_metrics()] == ["pseudo"] * first + ["real"] * (6 - first)


STAGED = run_config(stages=StagesConfig(switch=SwitchConfig(step=5), warmup_steps=2))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(WordsTraining(SHARED), STAGED, RunFolder.open(folder))
    return folder


@pytest.mark.parametrize("stop", [4, 8])
def test_a_streamed_run_broken_on_either_side_of_the_switch_resumes_as_if_unbroken(
    stop: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = RunFolder.open(tmp_path)

    def crash(self: WordsTraining, batch: Any) -> Any:
        if batch.index == stop:
            raise OSError("the lights went out")
        return loss(self, batch)

    loss = WordsTraining.loss
    with monkeypatch.context() as patched:
        patched.setattr(WordsTraining, "loss", crash)
        with pytest.raises(OSError, match="lights"):
            train(WordsTraining(SHARED), STAGED, broken)
    train(WordsTraining(SHARED), STAGED, broken, resume=True)
    assert bytes_of(latest(broken.path)) == bytes_of(latest(whole))


@pytest.mark.skipif(process_memory("VmHWM") is None, reason="the system does not report a process's peak")
def test_sets_are_saved_and_read_without_a_second_copy(tmp_path: Path) -> None:
    """64 sets of 1 MiB: the peak may rise by a few of them, not by all."""
    experts = ExpertsConfig(intermediate_size=192, num_experts=8, top_k=1)
    backbone = words_backbone(hidden_size=192, num_layers=64, experts=experts, moe_layer_freq=1, dense=None)
    train_step = OffloadedTrainStep(WordsTraining(backbone), run_config())
    held = sum(stored.numel() for stored in train_step.store.storage)
    shards = {"shards": train_step.shards(), "num_shards": train_step.num_shards}
    snapshot = Snapshot(step=1, model=train_step.training.model, optimizer={}, state={}, **shards)
    folder, saved = peak_of(lambda: save(snapshot, tmp_path, keep=1))
    weights = [stored.clone() for stored in train_step.store.storage[:2]]
    for stored in train_step.store.storage:
        stored.zero_()
    _, read = peak_of(lambda: train_step.load(folder))
    assert held > 60 * 2**20 and max(saved, read) < held / 4, (held, saved, read)
    assert all(torch.equal(a, b) for a, b in zip(weights, train_step.store.storage, strict=False))


def peak_of(work: Callable[[], Any]) -> tuple[Any, int]:
    """What the work gives, and by how many bytes the process's memory rose meanwhile."""
    reset_peak_memory()
    before = process_memory("VmHWM") or 0
    if before > (process_memory("VmRSS") or 0) + 2**23:
        pytest.skip("the system does not let a process forget its peak")
    return work(), (process_memory("VmHWM") or 0) - before
