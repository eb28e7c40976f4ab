"""The tiny recipe as a training task that notes which records each step saw, and may fall over at a step."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from openm6.core.run_folder import RunFolder
from openm6.distributed.process_group import ProcessGroupContext
from openm6.distributed.processes import DistributedContext
from openm6.modalities.batch import Batch
from openm6.train.loop import train
from openm6.train.multimodal import MultimodalTraining
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import read_recipe
from openm6.train.start import with_start
from openm6.train.training_task import StepResult

Records = dict[int, list[tuple[int, int, int]]]  # step -> component, epoch and index of each example


class FallError(Exception):
    """What the training task raises on request."""


class RecordingTraining(MultimodalTraining):
    """`seen` holds the records of each step that this rank took; nothing is judged at the end."""

    def prepare(self, fall_at: int | None, checkpoints: Path) -> None:
        self.fall_at, self.seen, self.checkpoints = fall_at, {}, checkpoints

    def loss(self, batch: Batch) -> StepResult:
        step = self.first_step + len(self.seen)
        if step == self.fall_at:
            # Ranks that fall leave a checkpoint that is being written incomplete; on a slow disk it still is.
            end = time.monotonic() + 60
            while any(self.checkpoints.glob(".step-*.partial")) and time.monotonic() < end:
                time.sleep(0.01)
            raise FallError
        self.seen[step] = [(draw.component, draw.epoch, draw.index) for draw in batch.samples]
        return super().loss(batch)

    def finish(self, run: RunFolder) -> None:
        pass


def run_steps(
    recipe: str, folder: str, axes: tuple[int, int, int], begin: int, fall_at: int | None
) -> tuple[Records, dict[int, float]]:
    """Goes on in a run's folder from step `begin`; gives this rank's records and the losses of all steps so far."""
    names = ("dp_replicate", "dp_shard", "ep")
    settings = [f"parallel.{name}={size}" for name, size in zip(names, axes, strict=True)]
    run, (checked, values) = RunFolder.open(folder), read_recipe(Path(recipe), settings)
    assert isinstance(checked, MultimodalRecipe)
    checked, _ = with_start(checked, values, run)
    ranks = DistributedContext(torch.device("cpu"), 20) if dist.is_initialized() else ProcessGroupContext()
    training = RecordingTraining(checked, run, torch.device("cpu"), ranks)
    training.first_step = begin
    training.prepare(fall_at, run.checkpoints)
    with contextlib.suppress(FallError):
        train(training, checked.loop, run, resume=True)
    losses: dict[int, Any] = {line["step"]: line["loss"] for line in run.read_metrics() if "loss" in line}
    return training.seen, losses
