"""A training task whose batches can be split, and a program that trains it, for tests that stop or kill it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openm6.core.errors import DataError, Interrupted
from openm6.core.log import start_log
from openm6.core.run_folder import RunFolder
from openm6.core.seeds import numpy_generator
from openm6.nn.moe import RouterStats
from openm6.train.config import LoopConfig
from openm6.train.loop import train
from openm6.train.training_task import StepResult, TrainingTask
from tests.train.toy_training import toy_config


@dataclass(frozen=True)
class Part:
    points: Tensor
    corners: Tensor
    whole: int
    cursor: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return len(self.points)


class WorkersTraining(TrainingTask):
    """Learns corners from points; `second` has a gradient only where a point lies in its half."""

    max_parts = 4

    def __init__(self, pause: float = 0.0, broken_at: int = -1, dies: int = -1, spoilt: int = -1) -> None:
        torch.manual_seed(5)
        self.model = nn.ModuleDict({"first": nn.Linear(8, 16), "last": nn.Linear(16, 4), "second": nn.Linear(8, 4)})
        self.pause, self.broken_at, self.dies, self.spoilt = pause, broken_at, dies, spoilt
        self.index, self.loads = 0, torch.zeros(4)
        self.first_process = os.getpid()

    def batches(self) -> Iterator[Part]:
        index = self.index
        while True:
            if index == self.broken_at:
                raise DataError("the disk is gone: mount it again")
            draw = numpy_generator(3, "batch", index)
            corners = torch.from_numpy(draw.integers(0, 4, size=11))
            points = torch.from_numpy(draw.normal(size=(11, 8))).float()
            points[:, :4] += 3 * nn.functional.one_hot(corners, 4)
            index += 1
            yield Part(points, corners, 11, {"next": index})

    def split(self, batch: Part, parts: int) -> list[Part]:
        points, corners = batch.points.tensor_split(parts), batch.corners.tensor_split(parts)
        pieces = [Part(p.clone(), c.clone(), 11) for p, c in zip(points, corners, strict=True)]
        return [Part(pieces[0].points, pieces[0].corners, 11, batch.cursor), *pieces[1:]]

    def restore(self, cursor: dict[str, Any]) -> None:
        self.index = cursor["next"]

    def loss(self, batch: Part) -> StepResult:
        time.sleep(self.pause)
        self.dies -= 1
        if self.dies == 0 and os.getpid() != self.first_process:
            os._exit(7)
        logits = self.model["last"](torch.tanh(self.model["first"](batch.points)))
        far = batch.points[:, 7] > 1.2
        if far.any():
            logits = logits.index_add(0, far.nonzero()[:, 0], self.model["second"](batch.points[far]))
        total = nn.functional.cross_entropy(logits, batch.corners, reduction="sum")
        if batch.cursor.get("next") == self.spoilt:
            total = total * float("nan")
        zero = torch.zeros(())
        load = RouterStats(0, torch.bincount(batch.corners, minlength=4).float(), zero, zero)
        return StepResult(total / batch.whole, {"loss/toy": total.detach() / batch.whole}, [load])

    def after_step(self, result: StepResult) -> None:
        self.loads += result.loads[0].load

    def state(self) -> dict[str, Any]:
        return {"loads": self.loads}

    def load_state(self, state: dict[str, Any]) -> None:
        self.loads = state["loads"]


def workers_config(workers: int | Literal["auto"], optimizer: str = "adamw", steps: int = 20) -> LoopConfig:
    return toy_config(optimizer, steps, save_every=6).model_copy(update={"num_processes": workers})


def main(folder: str, workers: int) -> int:
    """Train slowly enough to be hit in the middle."""
    start_log()
    try:
        train(WorkersTraining(pause=0.1), workers_config(workers), RunFolder.open(folder))
    except Interrupted as stop:  # as the command line does
        sys.stderr.write(f"{stop}\n")
        return stop.exit_code
    return 0
