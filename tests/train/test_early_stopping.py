"""The lowest held-out loss: its weights are kept, a run that gets no better ends early, and resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from openm6.checkpoint.folder import latest, list_checkpoints, read_state
from openm6.core.config import build
from openm6.core.errors import ConfigError
from openm6.core.run_folder import RunFolder
from openm6.distributed.process_group import ProcessGroupContext
from openm6.train.config import HeldOutConfig, LoopConfig
from openm6.train.loop import TrainResult, train
from openm6.train.multimodal import MultimodalTraining
from openm6.train.multimodal_data import pack_held_out
from openm6.train.recipe import MultimodalRecipe
from openm6.train.training_task import StepResult
from tests.small_model import modalities
from tests.train.test_callbacks import UnevaluatedTraining
from tests.train.tiny_recipe import tiny_recipe
from tests.train.toy_training import ToyBatch, ToyTraining, assert_same_run, toy_config

CPU = torch.device("cpu")
BEST = 12


class OverfittingTraining(ToyTraining):
    """Its held-out loss is lowest after step BEST; step `broken` fails."""

    def __init__(self, broken: int = 0, falling: bool = False) -> None:
        super().__init__()
        self.broken, self.falling = broken, falling

    def held_out_batches(self, count: int, choosing: bool = False) -> list[Any]:
        return []

    def held_out_loss(self, batches: Any) -> dict[str, float]:
        return {"loss": -self.applied if self.falling else 2.0 + abs(self.applied - BEST)}

    def loss(self, batch: ToyBatch) -> StepResult:
        if batch.index + 1 == self.broken:
            raise RuntimeError("killed")
        return super().loss(batch)


def overfit(folder: Path, training: ToyTraining, resume: bool = False, **loop: Any) -> TrainResult:
    """Train for 60 steps, with a held-out loss every 3, unless the run ends early."""
    chosen = {"early_stopping_patience": 3, "load_best_model_at_end": True, "keep_last": 1, **loop}
    config = toy_config(steps=60).model_copy(update={"held_out": HeldOutConfig(every=3), **chosen})
    return train(training, config, RunFolder.open(folder), resume, settings={"loop": {"steps": config.steps}})


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def best_of(folder: Path) -> dict[str, Any]:
    return dict(read_state(latest(folder))["callbacks"]["held_out"])


def test_a_run_that_gets_no_better_decays_and_ends_with_its_best_weights(tmp_path: Path) -> None:
    plain = overfit(tmp_path / "plain", ToyTraining(), early_stopping_patience=None, load_best_model_at_end=False,
                    held_out=None, save_every=3, keep_last=99)  # fmt: skip
    training = OverfittingTraining()
    result = overfit(tmp_path / "early", training)
    # No better after steps 15, 18 and 21: the rate decays from there, over 30 % of the whole.
    assert plain.steps == 60 and result.steps == 29
    assert best_of(tmp_path / "early") == {"loss": 2.0, "step": 29, "since": 6, "stopped_at": 21, "loaded": BEST}
    assert weights(result.checkpoint) == weights(tmp_path / f"plain/checkpoints/step-{BEST}")
    assert training.applied == BEST
    assert [one.name for one in list_checkpoints(tmp_path / "early/checkpoints")] == ["step-29"]
    assert RunFolder(tmp_path / "early").read_config()["loop"]["steps"] == 29


def test_a_run_that_improves_to_the_end_ends_with_its_last_weights(tmp_path: Path) -> None:
    result = overfit(tmp_path, OverfittingTraining(falling=True))
    assert result.steps == 60 and best_of(tmp_path)["loaded"] is None and best_of(tmp_path)["step"] == 60


@pytest.mark.parametrize("broken", [11, 14, 23, 29])
def test_resumed_equals_unbroken(tmp_path: Path, broken: int) -> None:
    overfit(tmp_path / "whole", OverfittingTraining(), save_every=10)
    with pytest.raises(RuntimeError, match="killed"):
        overfit(tmp_path / "broken", OverfittingTraining(broken), save_every=10)
    # The command line reads the number of steps from there. After step 21, which fixes it, nothing is saved.
    settings = RunFolder(tmp_path / "broken").read_config().get("loop", {})
    overfit(tmp_path / "broken", OverfittingTraining(), resume=True, save_every=10, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    finished = overfit(tmp_path / "broken", OverfittingTraining(), resume=True, save_every=10)
    assert finished.steps == RunFolder(tmp_path / "broken").read_config()["loop"]["steps"] == 29
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_without_patience_a_resumed_run_goes_on(tmp_path: Path) -> None:
    overfit(tmp_path, OverfittingTraining())
    assert overfit(tmp_path, OverfittingTraining(), resume=True, early_stopping_patience=None).steps == 60
    best = best_of(tmp_path)
    assert best["stopped_at"] is None and best["loaded"] not in (None, best["step"])


def test_a_run_may_keep_its_best_weights_from_a_later_part_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        overfit(tmp_path, OverfittingTraining(broken=25), load_best_model_at_end=False, save_every=10)
    result = overfit(tmp_path, OverfittingTraining(), resume=True)
    assert best_of(tmp_path)["loaded"] == 21, "the weights of step 12 were not kept"
    assert list_checkpoints(tmp_path / "checkpoints") == [result.checkpoint]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_best_weights_of_several_processes(tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 4.0])
    monkeypatch.setattr(MultimodalTraining, "held_out_loss", lambda *given: {"loss": next(losses)})
    values = tiny_recipe(6, num_processes=processes, held_out={"every": 2, "batches": 1}, load_best_model_at_end=True,
                         keep_last=9)  # fmt: skip
    penguins = {"kind": "parquet", "path": "embedded:penguins-train", "limit": 40, "validation_fraction": 0.3}
    values["sources"]["penguins"] = penguins
    recipe = build(MultimodalRecipe, {**values, "packing": {"batch_size": 2, "seq_len": 256}}, "tiny")
    run = RunFolder.open(tmp_path)
    training = UnevaluatedTraining(recipe, run, CPU)
    train(training, recipe.loop, run)
    last, best = latest(tmp_path), run.checkpoints / "step-4"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (last / name).read_bytes() == (best / name).read_bytes(), name
    assert last.name == "step-6" and best_of(tmp_path)["loaded"] == 4


def test_a_model_is_never_chosen_by_test_records(tmp_path: Path) -> None:
    rows = "\n".join(f"word{number},{number % 7}" for number in range(200))
    (tmp_path / "x.csv").write_text(f"text_en,hours\n{rows}\n")
    source = {"kind": "csv", "path": str(tmp_path / "x.csv"), "fields": {"text_en": "text_en", "numbers": ["hours"]}}
    mixture = [{"source": "mine", "task": "text_regression"}]

    def texts(validation_fraction: float) -> str:
        sources = {"mine": {**source, "validation_fraction": validation_fraction}}
        recipe = build(MultimodalRecipe, {**tiny_recipe(), "sources": sources, "mixture": mixture}, "tiny")
        batches = pack_held_out(recipe, modalities(), ProcessGroupContext(), 3, choosing=True)
        opened = {split: recipe.sources["mine"].open("mine", split, None) for split in ("train", "validation", "test")}
        sides = {split: {x["text_en"] for x in (records[i] for i in range(len(records)))}
                 for split, records in opened.items()}  # fmt: skip
        assert not (sides["train"] & sides["validation"] or sides["test"] & sides["validation"])
        return " ".join(modalities()["text"].decode(batch.groups["text"].arrays["ids"].tolist()) for batch in batches)

    assert "word" in texts(0.2)
    with pytest.raises(ConfigError, match=r"add validation_fraction: 0\.1 to a source"):
        texts(0.0)


def test_broken_validation_records_are_passed_over(tmp_path: Path) -> None:
    rows = "\n".join(
        f"word{number},{'train' if number % 9 else 'validation'},{number % 27 or 'x'}" for number in range(200)
    )
    (tmp_path / "x.csv").write_text(f"text_en,split,hours\n{rows}\nlast,test,1\n")
    source = {"kind": "csv", "path": str(tmp_path / "x.csv"), "fields": {"text_en": "text_en", "numbers": ["hours"]}}
    mixture = [{"source": "mine", "task": "text_regression"}]
    recipe = build(MultimodalRecipe, {**tiny_recipe(), "sources": {"mine": source}, "mixture": mixture}, "tiny")
    assert len(pack_held_out(recipe, modalities(), ProcessGroupContext(), 12, choosing=True)) == 12


@pytest.mark.parametrize("setting", [{"early_stopping_patience": 2}, {"load_best_model_at_end": True}])
def test_it_needs_a_held_out_loss(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"need the loss on held-out records[^\n]*add e\.g\. held_out: \{every: 50\}"):
        LoopConfig(**setting)
