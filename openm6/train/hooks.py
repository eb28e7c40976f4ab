"""What acts beside the loop at its moments: each hook is one concern with a state of its own in the checkpoints."""

from __future__ import annotations

from typing import Any, Protocol

from openm6.base.run_folder import RunFolder
from openm6.train.config import LoopConfig
from openm6.train.job import Job
from openm6.train.progress import Progress
from openm6.train.step import StepReport, Updater


class Running(Protocol):
    """What a hook sees of the run that it is part of."""

    job: Job
    config: LoopConfig
    run: RunFolder
    updater: Updater
    progress: Progress

    def save(self) -> None:
        """Write a checkpoint of the run as it is now."""


class Hook:
    """Parent of all hooks; every moment is empty unless it is overridden.

    `name` is the key of the hook's state in checkpoints. Moments, in order: `before_load` and `load_state` (only where
    a run goes on), `start`, then for each step `before_step` and `after_step`, `totals` where a line is due, and
    `close` at the end, also after a failure.
    """

    name: str

    def before_load(self, run: Running, state: dict[str, Any]) -> None:
        """The run goes on from a checkpoint with this state: give the model the shape that its weights had there."""

    def start(self, run: Running) -> None:
        """Before the first step of this process; model, optimizer and progress are as they will be trained."""

    def before_step(self, step: int) -> None:
        """The batch of step number `step` is there, nothing is computed yet."""

    def after_step(self, report: StepReport) -> dict[str, float]:
        """The step is done and counted; gives numbers that the next line averages over its steps."""
        return {}

    def totals(self) -> dict[str, Any]:
        """Further entries of a line that is written now, as they are: sums, names."""
        return {}

    def state(self) -> dict[str, Any]:
        """What must survive a restart; JSON-able."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""

    def close(self) -> None:
        """Let go of what was opened."""
