"""Callbacks: the held-out loss changes nothing of a run; spikes, failures of a device and swapping are reported."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from openm6.checkpoint.folder import latest, read_state
from openm6.core import device
from openm6.core.config import build
from openm6.core.errors import ConfigError, TrainingError
from openm6.core.run_folder import RunFolder
from openm6.distributed.process_group import ProcessGroupContext
from openm6.offload.config import OffloadConfig
from openm6.train.callbacks import MemoryCallback, SpikeCallback
from openm6.train.config import HeldOutConfig, LoopConfig
from openm6.train.loop import train
from openm6.train.multimodal import MultimodalTraining
from openm6.train.multimodal_data import pack_held_out
from openm6.train.offloaded import OffloadedTrainStep
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import TRAININGS, train_recipe
from openm6.train.step import TrainStep
from tests.small_model import modalities
from tests.train.tiny_recipe import tiny_recipe, write_recipe
from tests.train.toy_training import ToyTraining, toy_config
from tests.train.words_training import WordsTraining, words_backbone, words_config

CPU = torch.device("cpu")
# Without a decay, a run does not depend on its length.
EVERY: dict[str, Any] = {
    "held_out": {"every": 2, "batches": 2}, "schedule": {"decay_fraction": 0.0},
}  # fmt: skip


class UnevaluatedTraining(MultimodalTraining):
    def finish(self, run: RunFolder) -> None:
        pass


def run_to(steps: int, folder: Path, resume: bool = False, **loop: Any) -> RunFolder:
    """Trains the tiny recipe in one process."""
    recipe = build(MultimodalRecipe, tiny_recipe(6, num_processes=1, log_every=2, **loop), "tiny")
    run, config = RunFolder.open(folder), recipe.loop.model_copy(update={"steps": steps})
    train(UnevaluatedTraining(recipe, run, CPU), config, run, resume)
    return run


def weights(run: RunFolder) -> bytes:
    return (latest(run.path) / "model.safetensors").read_bytes()


def held_out(run: RunFolder) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if name == "step" or name.startswith("held_out/")}
        for line in run.read_metrics()
    ]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_to(6, tmp_path_factory.mktemp("observed"), **EVERY)


def test_every_line_that_is_due_has_it(observed: RunFolder) -> None:
    lines = held_out(observed)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert {"held_out/loss", "held_out/text", "held_out/image_out"} <= set(line)
        assert 0 < line["held_out/text"] < 10
    assert lines[-1]["held_out/loss"] < lines[0]["held_out/loss"]


def test_it_changes_nothing_in_the_training(observed: RunFolder, tmp_path: Path) -> None:
    assert weights(run_to(6, tmp_path, schedule=EVERY["schedule"])) == weights(observed)


def test_resumed_equals_unbroken(observed: RunFolder, tmp_path: Path) -> None:
    run_to(3, tmp_path, **EVERY)
    resumed = run_to(6, tmp_path, resume=True, **EVERY)
    assert weights(resumed) == weights(observed)
    assert held_out(resumed)[-1] == held_out(observed)[-1]


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    found = []
    for workers in (1, 2):
        values = tiny_recipe(2, num_processes=workers, log_every=2, **EVERY)
        recipe = build(MultimodalRecipe, {**values, "packing": {"batch_size": 2, "seq_len": 256}}, "tiny")
        run = RunFolder.open(tmp_path / str(workers))
        train(UnevaluatedTraining(recipe, run, CPU), recipe.loop, run)
        found.append(held_out(run)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_the_loss_is_that_of_training_on_other_records(tmp_path: Path) -> None:
    """Taken over training batches, it is what a step of training reports, side losses aside."""
    recipe = build(MultimodalRecipe, tiny_recipe(1), "tiny")
    training = MultimodalTraining(recipe, RunFolder.open(tmp_path), CPU)
    batch = next(training.batches())
    training.model.train()
    trained = training.loss(batch)
    side = float(sum(load.side_loss.detach() for load in trained.loads))
    training.model.eval()
    with torch.no_grad():
        found = training.held_out_loss([batch])
    assert found["loss"] == pytest.approx(float(trained.loss.detach()) - side, rel=1e-5)
    assert found["text"] == pytest.approx(float(trained.metrics["loss/text"]), rel=1e-5)


def test_ranks_share_the_same_rows(tmp_path: Path) -> None:
    recipe = build(MultimodalRecipe, tiny_recipe(1), "tiny")
    training = MultimodalTraining(recipe, RunFolder.open(tmp_path), CPU)
    whole = pack_held_out(recipe, training.modalities, ProcessGroupContext(), 1)[0]
    rows = []
    for rank in (0, 1):
        ranks = ProcessGroupContext()
        ranks.rank, ranks.size = rank, 2
        rows.append(pack_held_out(recipe, training.modalities, ranks, 1)[0])
    assert [row.meta.batch for row in rows] == [1, 1]
    assert torch.equal(torch.cat([row.meta.example_id for row in rows]), whole.meta.example_id)
    assert rows[0].tasks + rows[1].tasks == whole.tasks


def test_data_without_test_records_is_refused_before_the_first_step(tmp_path: Path) -> None:
    table = tmp_path / "words.csv"
    table.write_text("text_en\n" + "\n".join(f"some words {number}" for number in range(30)) + "\n")
    values = tiny_recipe(2, **EVERY) | {
        "sources": {"words": {"kind": "csv", "path": str(table), "test_fraction": 0.0}},
        "mixture": [{"source": "words", "task": "text_generation"}],
    }
    recipe, run = build(MultimodalRecipe, values, "tiny"), RunFolder.open(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"loop\.held_out needs validation or test records"):
        train(MultimodalTraining(recipe, run, CPU), recipe.loop, run)
    assert run.read_metrics() == []


def test_a_kind_of_training_without_it_says_so(tmp_path: Path) -> None:
    run, config = RunFolder.open(tmp_path), LoopConfig(steps=2, held_out=HeldOutConfig(every=1), tensorboard=False)
    with pytest.raises(ConfigError, match=r"leave loop\.held_out out"):
        train(ToyTraining(), config, run, settings={"loop": {"held_out": {"every": 1}}})
    assert not run.config.exists(), "a setting that is refused is not written"


class StrayTraining(ToyTraining):
    """The model is sound, yet its loss on other records and its scores are not finite."""

    def held_out_batches(self, count: int, choosing: bool = False) -> list[Any]:
        return []

    def held_out_loss(self, batches: Any) -> dict[str, float]:
        return {"loss": float("nan"), "text": 2.0}

    def evaluate(self, step: int) -> dict[str, float]:
        return {"accuracy": float("inf")}


def test_a_loss_that_is_not_finite_breaks_no_checkpoint_and_is_logged_as_null(tmp_path: Path) -> None:
    """It is that of its step, whatever the interval of the log."""
    run = RunFolder.open(tmp_path)
    config = toy_config(steps=7).model_copy(update={"held_out": HeldOutConfig(every=6), "evaluate_every": 6})
    config = config.model_copy(update={"log_every": 10, "save_every": 6})
    train(StrayTraining(), config, run)
    line, last = (line for line in run.read_metrics() if "loss" in line)
    assert line["held_out/loss"] is None and line["held_out/text"] == 2.0
    assert (line["step"], last["step"]) == (6, 7) and "held_out/text" not in last
    state = read_state(latest(tmp_path))
    assert state["scores"] == {"accuracy": None}


def test_validation_records_come_before_test_records(tmp_path: Path) -> None:
    """One source has some of its own; the other gives its test records."""
    marks = ["train", "train", "validation", "test"]
    rows = [f"text {marks[n % 4]} number {n},{'ab'[n % 2]},{marks[n % 4]}" for n in range(60)]
    (tmp_path / "x.csv").write_text("text_en,label,split\n" + "\n".join(rows) + "\n")
    sources = {
        "mine": {"kind": "csv", "path": str(tmp_path / "x.csv")},
        "penguins": {"kind": "embedded", "name": "penguins", "limit": 40},
    }
    mixture = [
        {"source": "mine", "task": "text_classification"},
        {"source": "penguins", "task": "tabular_regression"},
    ]
    recipe = build(MultimodalRecipe, {**tiny_recipe(), "sources": sources, "mixture": mixture}, "tiny")
    words = modalities()["text"]
    batches = pack_held_out(recipe, modalities(), ProcessGroupContext(), 3)
    texts = " ".join(words.decode(batch.groups["text"].arrays["ids"].tolist()) for batch in batches)
    assert "text validation number" in texts and "text test" not in texts and "text train" not in texts
    assert any("numbers_in" in batch.groups for batch in batches)


def noisy_losses(count: int) -> list[float]:
    draw = np.random.default_rng(1)
    return [5 * float(np.exp(-step / 200)) + 2 + 0.1 * float(draw.normal()) for step in range(count)]


def test_noise_is_no_spike() -> None:
    detector = SpikeCallback()
    assert not any(detector.observe(loss) for loss in noisy_losses(2000))


def test_a_spike_is_reported_and_the_next_ordinary_loss_is_not() -> None:
    detector = SpikeCallback()
    losses = noisy_losses(300)
    losses[200] += 5
    assert [step for step, loss in enumerate(losses) if detector.observe(loss)] == [200]


def test_the_first_losses_and_those_that_are_not_finite_are_no_spikes() -> None:
    detector = SpikeCallback()
    assert not detector.observe(2.0) and not detector.observe(50.0)
    assert not detector.observe(float("nan")) and not detector.observe(float("inf"))
    assert detector.seen == 2


def test_its_state_survives_json() -> None:
    whole, first, second = SpikeCallback(), SpikeCallback(), SpikeCallback()
    losses = noisy_losses(100)
    for loss in losses:
        whole.observe(loss)
    for loss in losses[:40]:
        first.observe(loss)
    run: Any = None
    second.load_state(run, json.loads(json.dumps(first.state())))
    for loss in losses[40:]:
        second.observe(loss)
    assert second.state() == whole.state()


@pytest.mark.parametrize(
    ("offload", "remedy"),
    [(None, "activation_checkpointing"), (OffloadConfig(), r"offload\.gradient_accumulation_steps or margin_gib")],
)
def test_too_little_memory_of_a_gpu_is_reported_in_one_sentence_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: OffloadConfig | None, remedy: str
) -> None:
    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(WordsTraining, "loss", full)
    with pytest.raises(TrainingError, match=rf"memory ran out in step 1: raise loop\.{remedy}") as caught:
        train(WordsTraining(words_backbone()), words_config(8, offload=offload), RunFolder.open(tmp_path))
    assert "\n" not in str(caught.value) and "--resume" in str(caught.value)


@pytest.mark.parametrize("offload", [None, OffloadConfig(num_gpu_layers=1)])
@pytest.mark.parametrize("moment", ["loss", "evaluate"])
def test_a_gpu_lost_in_the_middle_leaves_a_run_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, offload: OffloadConfig | None
) -> None:
    """Whatever is under way; and closing fails as well then, since everything on the device does."""
    config = words_config(8, save_every=2, evaluate_every=5, offload=offload)
    calls = iter(range(1, 99))

    def gone(*given: Any) -> Any:
        if moment == "evaluate" or next(calls) == 5:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")
        return loss(*given)

    loss = WordsTraining.loss
    with monkeypatch.context() as patched:
        patched.setattr(WordsTraining, moment, gone)
        patched.setattr(TrainStep, "close", gone_for_good)
        patched.setattr(OffloadedTrainStep, "close", gone_for_good)
        sentence = r"failed in step \d \(CUDA error[^\n]*\): what was saved [^\n]* go on with --resume$"
        with pytest.raises(TrainingError, match=sentence):
            train(WordsTraining(words_backbone()), config, RunFolder.open(tmp_path))
    assert latest(tmp_path).name == "step-4"
    assert train(WordsTraining(words_backbone()), config, RunFolder(tmp_path), resume=True).steps == 8


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("full\nmore"), "memory ran out before the first step: .* smaller model.preset$"),
        (torch.AcceleratorError("gone\nmore"), r"failed before the first step \(gone\): .* start it again$"),
    ],
)
@pytest.mark.parametrize("place", ["the task", "the run"])
def test_a_gpu_that_fails_before_the_first_step_is_reported_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception, sentence: str
) -> None:
    def failing(*given: Any) -> Any:
        raise error

    build_task = failing if place == "the task" else lambda *given: WordsTraining(words_backbone())
    monkeypatch.setitem(TRAININGS, "multimodal", (MultimodalRecipe, build_task))
    monkeypatch.setattr("openm6.train.loop.open_train_step", failing)
    with pytest.raises(TrainingError, match=sentence):
        train_recipe(write_recipe(tmp_path, tiny_recipe()), out=tmp_path / "run", device_name="cpu")


def gone_for_good(*given: Any) -> None:
    raise torch.AcceleratorError("CUDA error: unspecified launch failure")


def test_other_errors_are_bugs_and_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(ToyTraining, "loss", broken)
    with pytest.raises(RuntimeError, match="^shapes differ$"):
        train(ToyTraining(), toy_config(), RunFolder.open(tmp_path))


@pytest.mark.parametrize("offloaded", [True, False])
def test_swapping_of_offloaded_weights_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, offloaded: bool
) -> None:
    monkeypatch.setattr(device, "PROCESSES", tmp_path)
    (tmp_path / "self").mkdir()
    status, callback = tmp_path / "self/status", MemoryCallback()
    report: Any = SimpleNamespace(step=3)
    run: Any = SimpleNamespace(train_step=SimpleNamespace(device=CPU), config=SimpleNamespace(offloaded=offloaded))
    callback.start(run)
    with caplog.at_level(logging.WARNING, logger="openm6"):
        callback.after_step(report)
        status.write_text("Name: python\nVmSwap:\t 1048576 kB\n", encoding="utf-8")
        callback.after_step(report)
        callback.after_step(report)
    reported = [record.message for record in caplog.records if "swapped out" in record.message]
    assert len(reported) == offloaded and all("1.0 GiB" in message for message in reported)
