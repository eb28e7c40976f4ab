"""Joules of a run: every one has a stage and a task, and a resumed run goes on with its sum."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from openm6.checkpoint.folder import latest, read_state
from openm6.core.run_folder import RunFolder
from openm6.energy.meter import EnergyReading, Meter
from openm6.energy.tracker import EnergyTracker, WorkCount
from openm6.modalities.batch import build_sequence, collate
from openm6.models.config import count_parameters
from openm6.models.omni import Omni
from openm6.nn.config import LoraConfig, ModalityExpertsConfig
from openm6.train.callbacks import Callback, RunState
from openm6.train.loop import train
from openm6.train.metering import PASSES, Attribution
from openm6.train.step import StepReport
from openm6.train.training_task import StepResult
from tests.small_model import BACKBONE, modalities
from tests.train.toy_training import ToyBatch, ToyTraining, toy_config


class Witness(Callback):
    """Records its calls."""

    name = "witness"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.seen = 0

    def start(self, run: RunState) -> None:
        self.calls.append(f"start {run.progress.step}")

    def before_step(self, step: int) -> None:
        self.calls.append(f"before {step}")

    def after_step(self, report: StepReport) -> dict[str, float]:
        self.calls.append(f"after {report.step}")
        self.seen += 1
        return {"seen twice": 2.0 * report.step}

    def totals(self) -> dict[str, Any]:
        return {"stage": "real"}

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state(self, run: RunState, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    def close(self) -> None:
        self.calls.append("close")


def test_callbacks_are_called_in_order_and_their_state_is_kept(tmp_path: Path) -> None:
    run, first = RunFolder.open(tmp_path), Witness()
    train(ToyTraining(), toy_config(steps=5), run, callbacks=[first])
    assert first.calls[:3] == ["start 0", "before 1", "after 1"] and first.calls[-2:] == ["after 5", "close"]
    line = run.read_metrics()[0]
    assert line["seen twice"] == pytest.approx(6.0) and line["stage"] == "real"
    second = Witness()
    train(ToyTraining(), toy_config(steps=8), run, resume=True, callbacks=[second])
    assert second.calls[0] == "start 5" and second.seen == 8


def test_a_callback_is_closed_when_the_run_fails(tmp_path: Path) -> None:
    class Failing(Witness):
        def after_step(self, report: StepReport) -> dict[str, float]:
            raise OSError("the lights went out")

    callback = Failing()
    with pytest.raises(OSError, match="lights"):
        train(ToyTraining(), toy_config(steps=5), RunFolder.open(tmp_path), callbacks=[callback])
    assert callback.calls[-1] == "close"


def test_lines_and_checkpoints_hold_joules_and_a_resumed_run_continues_them(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path)
    train(ToyTraining(), toy_config(steps=10), run)
    lines = [line for line in run.read_metrics() if "joules" in line]
    assert len(lines) == 2 and 0 < lines[0]["joules"] <= lines[1]["joules"]
    assert lines[1]["energy_source"] and lines[1]["watts"] >= 0 and lines[1]["joules_per_token"] >= 0
    tracker = EnergyTracker.from_json(read_state(latest(tmp_path))["callbacks"]["meter"])
    assert tracker.joules >= lines[1]["joules"]
    assert tracker.joules == pytest.approx(tracker.in_steps + tracker.between + tracker.repeated)
    assert tracker.tokens == lines[1]["tokens"]
    train(ToyTraining(), toy_config(steps=15), run, resume=True)
    after = [line for line in run.read_metrics() if "joules" in line][-1]
    assert after["step"] == 15 and after["joules"] >= tracker.joules


def test_steps_that_a_crash_lost_are_accounted_as_repeated(tmp_path: Path) -> None:
    class Failing(Witness):
        def after_step(self, report: StepReport) -> dict[str, float]:
            if report.step == 13:  # the last checkpoint is of step 7, the last line of step 10
                raise OSError("the lights went out")
            return {}

    run = RunFolder.open(tmp_path)
    with pytest.raises(OSError, match="lights"):
        train(ToyTraining(pause=0.002), toy_config(steps=20), run, callbacks=[Failing()])
    reported = [line["joules"] for line in run.read_metrics() if "joules" in line][-1]
    at_checkpoint = EnergyTracker.from_json(read_state(latest(tmp_path))["callbacks"]["meter"])
    train(ToyTraining(), toy_config(steps=20), run, resume=True)
    tracker = EnergyTracker.from_json(read_state(latest(tmp_path))["callbacks"]["meter"])
    assert tracker.repeated == pytest.approx(reported - at_checkpoint.joules)
    assert tracker.joules > reported and tracker.tokens == 20 * 16


@pytest.mark.parametrize("start", [0, 3])
def test_watts_after_a_crash_are_those_of_the_steps_since_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    """A step takes a second and ten joules; steps that are lost and waiting for the restart are no power of a step.

    Nor is a start of some seconds, such as computing a held-out loss or forking, whose joules count all the same.
    """

    class Starting(Witness):
        def start(self, run: RunState) -> None:
            Steady.now += start

    class Steady(ToyTraining):
        now, crash = 0.0, 0

        def loss(self, batch: ToyBatch) -> StepResult:
            Steady.now += 1.0
            if batch.index + 1 == self.crash:
                raise OSError("the lights went out")
            return super().loss(batch)

    def metered(*_: object) -> Meter:
        began = Steady.now

        def spent() -> EnergyReading:
            return EnergyReading({"rapl": 10.0 * (Steady.now - began)})

        return cast(Meter, SimpleNamespace(joules=spent, close=lambda: None))

    for module in ("loop", "metering"):
        monkeypatch.setattr(f"openm6.train.{module}.time", SimpleNamespace(perf_counter=lambda: Steady.now))
    monkeypatch.setattr("openm6.train.metering.open_meter", metered)
    run, config = RunFolder.open(tmp_path), toy_config(steps=20)
    Steady.crash = 13
    with pytest.raises(OSError, match="lights"):
        train(Steady(), config, run, callbacks=[Starting()])
    Steady.crash, Steady.now = 0, 1000.0
    train(Steady(), config, run, resume=True, callbacks=[Starting()])
    lines = [line for line in run.read_metrics() if "watts" in line]
    assert [line["watts"] for line in lines] == pytest.approx([10.0] * 4)
    assert [line["joules_per_token"] for line in lines] == pytest.approx([10.0 / 16] * 4)
    # The last line before the crash was of step 10, the checkpoint of step 7.
    beside = [10 * start, *[20 * start] * 3]
    assert [line["joules"] for line in lines] == pytest.approx(np.add([50, 130, 180, 230], beside))


EXPERTS = ModalityExpertsConfig(
    modalities=("audio",), intermediate_size=32, num_experts=3, top_k=1, balance="aux", lora=LoraConfig(r=8)
)


OTHERS = EXPERTS.model_copy(update={"modalities": ("image",), "intermediate_size": 16})


@pytest.mark.parametrize(
    "added", [(), (EXPERTS,), (OTHERS, EXPERTS)], ids=["alike", "with experts for audio", "with others for images"]
)
def test_operations_follow_tokens_and_the_weights_that_they_pass(added: tuple[ModalityExpertsConfig, ...]) -> None:
    omni = Omni(BACKBONE.model_copy(update={"modality_experts": added}), modalities())
    text = modalities()["text"]
    read = text.source("seven red apples")
    target = text.target("apples")
    rng = np.random.default_rng(0)
    audio = modalities()["audio"].source(rng.normal(size=8000).astype(np.float32) * 0.1)
    batch = collate(
        [[build_sequence([read, target], "echo"), build_sequence([audio, target], "speech_recognition")]], 256
    )
    work = Attribution(omni, ["echo", "speech_recognition", "translation"]).work(batch)
    kinds, tasks = (
        {name: share for name, share in work[kind].items() if share.tokens} for kind in ("modality", "task")
    )
    assert set(tasks) == {"echo", "speech_recognition"} and set(kinds) == set(batch.groups)
    assert set(work["modality"]) == set(omni.adapters) and work["task"]["translation"] == WorkCount(0, 0.0)
    assert sum(share.tokens for share in kinds.values()) == batch.tokens
    assert sum(share.tokens for share in tasks.values()) == batch.tokens
    operations = sum(share.operations for share in tasks.values())
    assert sum(share.operations for share in kinds.values()) == pytest.approx(operations)
    backbone = PASSES * count_parameters(omni.config).active
    head = PASSES * omni.text.embedding.weight.numel()
    omni.text.head = nn.Parameter(torch.zeros_like(omni.text.embedding.weight))
    untied = Attribution(omni, ["echo", "speech_recognition", "translation"]).work(batch)
    assert untied["modality"]["text"] == kinds["text"], "a head of its own is for learned tokens alone, too"
    learned = 2 * len(target)
    assert kinds["text"].operations == pytest.approx((len(read) + learned) * backbone + learned * head)
    for name in kinds.keys() - {"text"}:
        adapter = PASSES * sum(weight.numel() for weight in omni.adapters[name].parameters())
        passed = backbone // PASSES + (2 * (64 * 3 + 3 * 64 * 32) if added else 0)
        # Of q, k, v and o in two layers: 8 times the inputs and the outputs.
        passed += 2 * 8 * (4 * 64 + 64 + 32 + 32 + 64) if added else 0
        assert kinds[name].operations == pytest.approx(kinds[name].tokens * (PASSES * passed + adapter))
