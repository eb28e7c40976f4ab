"""A training task small enough for a test: two layers learn to tell which of four corners a noisy point lies in.

Its program trains into a folder, slowly, so that a test can kill it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openm6.checkpoint.folder import latest, read_state
from openm6.core.run_folder import RunFolder
from openm6.core.seeds import numpy_generator
from openm6.nn.moe import RouterStats
from openm6.optim.config import OptimizerConfig, ScheduleConfig
from openm6.train.config import LoopConfig
from openm6.train.loop import train
from openm6.train.metrics import Line
from openm6.train.training_task import StepResult, TrainingTask


@dataclass(frozen=True)
class ToyBatch:
    points: Tensor
    corners: Tensor
    index: int

    @property
    def tokens(self) -> int:
        return len(self.points)

    @property
    def cursor(self) -> dict[str, Any]:
        return {"next": self.index + 1}


class ToyTraining(TrainingTask):
    """Uses all that one may: dropout, a buffer, shared weights, averaged weights as tensor state, plain state."""

    def __init__(self, spoilt: tuple[int, ...] = (), pause: float = 0.0) -> None:
        torch.manual_seed(5)
        first = nn.Linear(8, 8)
        self.model = nn.Sequential(first, nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.2), first, nn.Linear(8, 4))
        self.average = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        self.spoilt, self.pause = spoilt, pause
        self.applied, self.first = 0, 0
        self.finished: list[Path] = []

    def batches(self) -> Iterator[ToyBatch]:
        index = self.first
        while True:
            draw = numpy_generator(3, "batch", index)
            corners = torch.from_numpy(draw.integers(0, 4, size=16))
            points = torch.from_numpy(draw.normal(size=(16, 8))).float()
            points[:, :4] += 3 * nn.functional.one_hot(corners, 4)
            yield ToyBatch(points, corners, index)
            index += 1

    def restore(self, cursor: dict[str, Any]) -> None:
        self.first = cursor["next"]

    def loss(self, batch: ToyBatch) -> StepResult:
        time.sleep(self.pause)
        loss = nn.functional.cross_entropy(self.model(batch.points), batch.corners)
        if batch.index + 1 in self.spoilt:
            loss = loss * float("nan")
        zero = torch.zeros(())
        load = RouterStats(0, torch.bincount(batch.corners, minlength=4).float(), zero + 0.25, zero)
        return StepResult(loss, {"loss/toy": loss, "seen": 1.0}, [load])

    def after_step(self, result: StepResult) -> None:
        self.applied += 1
        for name, parameter in self.model.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.1)

    def state(self) -> dict[str, Any]:
        return {
            "applied": self.applied,
            **{f"average.{name}": tensor for name, tensor in self.average.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.applied = state["applied"]
        self.average = {name: state[f"average.{name}"] for name in self.average}

    def files(self, last: bool = True) -> dict[str, str]:
        return {"model.json": '{"kind": "toy"}\n'}

    def evaluate(self, step: int) -> dict[str, float]:
        draw = torch.rand(3)  # what an evaluation draws must not change the training
        return {"draw": float(draw.sum()), "norm": float(self.model[0].weight.norm())}

    def finish(self, run: RunFolder) -> None:
        self.finished.append(run.path)


def toy_config(optimizer: str = "adamw", steps: int = 40, save_every: int = 7) -> LoopConfig:
    """Settings under which something is due at odd moments."""
    return LoopConfig(
        steps=steps,
        optimizer=OptimizerConfig(name=optimizer, learning_rate=0.02),
        schedule=ScheduleConfig(warmup_steps=4, decay_fraction=0.3),
        log_every=5,
        evaluate_every=9,
        save_every=save_every,
        tensorboard=False,
    )


def untimed(folder: Path) -> list[Line]:
    """The metrics of a run without what the clock, the energy meter and the memory decide."""
    measured = ("seconds", "tokens_per_second", "joules", "watts", "metering_seconds", "memory")
    lines = RunFolder(folder).read_metrics()
    return [{name: value for name, value in line.items() if not name.startswith(measured)} for line in lines]


def assert_same_run(left: Path, right: Path) -> None:
    """Weights, optimizer, averages and metrics agree to the bit."""
    first, second = latest(left), latest(right)
    assert first.name == second.name
    for name in ("model.safetensors", "optimizer.safetensors", "training.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    states = [read_state(folder) for folder in (first, second)]
    for state in states:
        state["progress"] = {name: x for name, x in state["progress"].items() if not name.startswith("seconds")}
        state["averager"].pop("seconds")
        state["callbacks"].pop("meter")
    assert states[0] == states[1]
    assert untimed(left) == untimed(right)


def main(folder: str, pause: float) -> None:
    train(ToyTraining(pause=pause), toy_config(), RunFolder.open(folder))
