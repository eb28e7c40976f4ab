"""Pseudo-to-Real in a run: equal answers at the switch, exact resuming on both sides, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from openm6.checkpoint.folder import latest, read_state, step_folder
from openm6.checkpoint.load import load_model
from openm6.checkpoint.optimizer import optimizer_state_dict
from openm6.core.errors import CheckpointError, ConfigError
from openm6.core.run_folder import RunFolder
from openm6.nn.executor import CheckpointedExecutor
from openm6.train.callbacks import Progress, StagesCallback
from openm6.train.config import PlateauConfig, StagesConfig, SwitchConfig
from openm6.train.loop import train
from openm6.train.step import TrainStep
from tests.train.words_training import WordsTraining, words_backbone, words_config

SHARED = words_backbone(sharing="all")
STAGES = StagesConfig(switch=SwitchConfig(step=7), warmup_steps=2)


def staged(steps: int = 12, **changes: Any) -> Any:
    return words_config(steps, stages=STAGES.model_copy(update=changes))


def files_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    train(WordsTraining(SHARED), staged(), RunFolder.open(folder))
    return folder


@pytest.mark.parametrize("sharing", ["all", 2, (0, 1, 2, 1)])
@pytest.mark.parametrize("share_routers", [False, True])
def test_answers_are_equal_just_before_and_just_after_the_switch(sharing: Any, share_routers: bool) -> None:
    config = words_backbone(sharing=sharing, share_routers=share_routers, moe_layer_freq=1, dense=None)
    training = WordsTraining(config)
    train_step = TrainStep(training, words_config())
    for step in (1, 2, 3):
        train_step.update(training.batch(step), step, 10)
    words = training.batch(9).words
    with torch.no_grad():
        before = training.words(words)[0]
        train_step.delink("independent")
        after = training.words(words)[0]
    assert training.stage == "real" and training.words.backbone.config.group_layers == (0, 1, 2, 3)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    train_step.update(training.batch(4), 4, 10)
    first, second = (training.words.backbone.blocks[layer].attention.qkv for layer in (1, 3))
    assert not torch.equal(first, second)  # each layer goes its own way from here on


def test_every_delinked_parameter_is_trained_and_remembered() -> None:
    training = WordsTraining(SHARED)
    train_step = TrainStep(training, words_config())
    train_step.update(training.batch(1), 1, 10)
    shared = optimizer_state_dict(train_step.optimizer, training.model)
    train_step.delink("aligned")
    kept = optimizer_state_dict(train_step.optimizer, training.model)
    names = {name for name, _ in training.model.named_parameters()}
    assert {name.partition("::")[0] for name in kept} == names
    assert {id(parameter) for parameter in train_step.parameters} == {id(p) for p in training.model.parameters()}
    second = shared["backbone.layers.1.attention.qkv::exp_avg_sq"]
    for layer in (1, 3):  # the layers with experts
        torch.testing.assert_close(kept[f"backbone.layers.{layer}.attention.qkv::exp_avg_sq"], second / 4)


def test_how_blocks_run_is_chosen_again_for_separate_weights() -> None:
    training = WordsTraining(SHARED)
    train_step = TrainStep(training, words_config(activation_checkpointing=1))
    train_step.update(training.batch(1), 1, 10)
    train_step.delink("reset")
    train_step.config = words_config(activation_checkpointing=3)
    train_step.update(training.batch(2), 2, 10)
    executor = training.words.backbone.executor
    assert isinstance(executor, CheckpointedExecutor) and executor.num_layers == 3


def test_noise_breaks_the_symmetry_and_repeats() -> None:
    weights = []
    for _ in range(2):
        training = WordsTraining(SHARED)
        TrainStep(training, words_config()).delink("reset", noise=0.1)
        weights.append([block.attention.qkv for block in training.words.backbone.blocks])
    assert not torch.equal(weights[0][0], weights[0][2])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    moved = float((weights[0][0] - weights[0][2]).std() / weights[0][0].std())
    assert moved == pytest.approx(0.1 * 2**0.5, rel=0.1)


def test_the_run_tells_its_stage_and_saves_both(unbroken: Path) -> None:
    stages = [line["stage"] for line in RunFolder(unbroken).read_metrics()]
    assert stages == ["pseudo"] * 7 + ["real"] * 5
    saved = {n: read_state(step_folder(unbroken / "checkpoints", n)) for n in (5, 7, 10)}
    assert [saved[n]["stage"] for n in (5, 7, 10)] == ["pseudo", "pseudo", "real"]
    rates = [line["learning_rate"] for line in RunFolder(unbroken).read_metrics()]
    assert rates[7] == pytest.approx(rates[6] / 2)  # the first step of the new warm-up


@pytest.mark.parametrize("stop", [6, 9])
def test_resuming_on_either_side_of_the_switch_equals_an_unbroken_run(
    unbroken: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: WordsTraining, batch: Any) -> Any:
        if batch.index == stop:
            raise OSError("the lights went out")
        return loss(self, batch)

    loss = WordsTraining.loss
    monkeypatch.setattr(WordsTraining, "loss", crash)
    with pytest.raises(OSError, match="lights"):
        train(WordsTraining(SHARED), staged(), RunFolder.open(tmp_path))
    monkeypatch.undo()
    train(WordsTraining(SHARED), staged(), RunFolder.open(tmp_path), resume=True)
    assert files_of(latest(tmp_path)) == files_of(latest(unbroken))


def test_both_checkpoints_give_what_was_trained(unbroken: Path) -> None:
    pseudo, real = WordsTraining(SHARED), WordsTraining(words_backbone())
    for training, step in ((pseudo, 7), (real, 10)):
        first = {name: one.clone() for name, one in training.model.named_parameters()}
        load_model(step_folder(unbroken / "checkpoints", step), training.model)
        assert not any(torch.equal(one, first[name]) for name, one in training.model.named_parameters())


def test_a_switch_by_the_clock_is_written_down(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path)
    run.write_config({"loop": {"steps": 6, "stages": {"switch": {"minutes": 1e-9}, "warmup_steps": 2}}})
    config = words_config(4, stages=STAGES.model_copy(update={"switch": SwitchConfig(minutes=1e-9)}))
    train(WordsTraining(SHARED), config, run)
    step = run.read_config()["loop"]["stages"]["switch"]["step"]
    assert 1 <= step < 4 and run.read_config()["loop"]["stages"]["warmup_steps"] == 2


@pytest.mark.parametrize("offset", [0.0, -20.0])
def test_a_plateau_is_found_and_survives_a_restart(offset: float) -> None:
    """A loss may be negative, as the density of numbers has no upper limit."""
    config = StagesConfig(switch=SwitchConfig(plateau=PlateauConfig(window=5, improvement=0.05)))
    run: Any = SimpleNamespace(progress=Progress(), training=SimpleNamespace(stage="pseudo"))
    callback, due = StagesCallback(config), []
    for loss in [10 * 0.9**n for n in range(10)] + [4.0] * 10:
        report: Any = SimpleNamespace(applied=True, loss=loss + offset)
        callback.after_step(report)
        again = StagesCallback(config)
        again.load_state(run, callback.state())
        again.start(run)
        due.append(again.due())
    assert not any(due[:14]) and due[-1]


def test_a_skipped_step_does_not_enter_the_plateau_and_the_run_saves(tmp_path: Path) -> None:
    """Its loss is not a number, which no checkpoint can hold."""
    plateau = SwitchConfig(plateau=PlateauConfig(window=20))
    training = WordsTraining(SHARED, spoilt=(4, 5))
    result = train(training, staged(5, switch=plateau), RunFolder.open(tmp_path))
    assert result.non_finite == 2
    losses = read_state(latest(tmp_path))["callbacks"]["stages"]["losses"]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)


def test_the_rate_climbs_back() -> None:
    run: Any = SimpleNamespace(
        progress=Progress(), training=SimpleNamespace(stage="pseudo"), train_step=SimpleNamespace(lr_scale=1.0)
    )
    callback, rates = StagesCallback(StagesConfig(switch=SwitchConfig(step=10), warmup_steps=4)), []
    callback.start(run)
    for step, switched_at in ((3, None), (11, 10), (14, 10), (20, 10)):
        callback.switched_at = switched_at
        callback.before_step(step)
        rates.append(run.train_step.lr_scale)
    assert rates == [1.0, 0.25, 1.0, 1.0]


def test_a_checkpoint_of_another_stage_is_refused(unbroken: Path) -> None:
    with pytest.raises(CheckpointError, match="is of the real stage, this run is in the pseudo stage.*convert"):
        train(WordsTraining(SHARED), words_config(), RunFolder(unbroken), resume=True)


def test_stages_need_a_shared_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no layers of the model share weights"):
        train(WordsTraining(words_backbone()), staged(), RunFolder.open(tmp_path))


@pytest.mark.parametrize("ways", [{}, {"step": 3, "minutes": 1.0}])
def test_a_switch_has_one_reason(ways: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one of step, minutes and plateau"):
        SwitchConfig(**ways)
