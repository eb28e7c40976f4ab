"""A program for the launcher: the tiny recipe on two ranks, killed first while it trains and then while it saves."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from openm6.checkpoint import save as saving
from openm6.checkpoint.folder import list_checkpoints, step_of
from openm6.distributed.processes import DistributedContext
from openm6.modalities.batch import Batch
from openm6.train.training_task import StepResult
from tests.distributed import recording_training

ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingTraining(recording_training.RecordingTraining):
    """On the first attempt rank 1 dies in step 5, when what was saved beside the training after step 3 is there."""

    def loss(self, batch: Batch) -> StepResult:
        if ATTEMPT == 0 and self.ranks.rank == 1 and self.first_step + len(self.seen) == 5:
            until = time.monotonic() + 60
            while not list_checkpoints(self.run.checkpoints) and time.monotonic() < until:
                time.sleep(0.01)
            die()
        return super().loss(batch)


def main(recipe: str, folder: Path) -> None:
    ranks = DistributedContext(torch.device("cpu"), 20)  # kept open for what follows
    recording_training.RecordingTraining = DyingTraining  # type: ignore[misc]
    if (
        ATTEMPT == 1 and ranks.is_main_process
    ):  # rank 0 dies when the weights are written, and the folder has no name yet
        saving.os = type("Os", (), {"rename": staticmethod(lambda *_: die())})  # type: ignore[assignment]
    done = list_checkpoints(folder / "checkpoints")
    begin = step_of(done[-1]) + 1 if done else 1
    with ranks.guard():
        seen, _ = recording_training.run_steps(recipe, str(folder), (1, 1, 2), begin, None)
    (folder / f"seen-{ATTEMPT}-{ranks.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
