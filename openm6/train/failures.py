"""What a person is told when a device fails, or the host runs short, in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from openm6.base.errors import OpenM6Error, TrainingError
from openm6.base.log import get_log
from openm6.train.hooks import Hook
from openm6.train.step import StepReport

STATUS = Path("/proc/self/status")
WORTH_TELLING = 2**28  # bytes swapped out


@contextmanager
def device_failures(step: Callable[[], int], streamed: bool = True) -> Iterator[None]:
    """Turns a GPU's failures into one sentence; the run's checkpoints are whole, whatever happened.

    `step` tells which one is under way when it happens.

    Raises:
        TrainingError: the GPU's memory ran out, or the GPU is gone.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        mend = "raise loop.streaming.micro_batches or margin_gib"
        mend = mend if streamed else "raise loop.recompute, make batches smaller, or add loop.streaming"
        raise TrainingError(
            f"the GPU's memory ran out in step {step()}: {mend}, then go on with --resume"
        ) from error
    except torch.AcceleratorError as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"the GPU failed in step {step()} ({reason}): what was saved is whole, go on with --resume"
        ) from error


@contextmanager
def failures_after_training(checkpoint: Path) -> Iterator[None]:
    """Turns what fails once a run is trained into one sentence that says that nothing of the training is lost.

    Raises:
        TrainingError: evaluating or reporting failed, for a reason that a person can do something about.
    """
    try:
        yield
    except (OpenM6Error, OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TrainingError(
            f"the run is trained and saved as {checkpoint}, but evaluating or reporting it failed ({reason}): "
            "fix that and go on with --resume"
        ) from error


class SwapHook(Hook):
    """Warns once when the system moves the run's memory to the disk, where weights would come from at its speed."""

    name = "swap"

    def __init__(self, status: Path = STATUS) -> None:
        self._status = status
        self._told = False

    def after_step(self, report: StepReport) -> dict[str, float]:
        swapped = 0 if self._told else swapped_bytes(self._status)
        if swapped > WORTH_TELLING:
            self._told = True
            get_log().warning(
                f"step {report.step}: the host has swapped out {swapped / 2**30:.1f} GiB of this run, so steps will "
                "be slow; end other programs, or lower loop.streaming.host_gib and train fewer layers"
            )
        return {}


def swapped_bytes(status: Path = STATUS) -> int:
    """Bytes of this process that lie on the disk; 0 where the system does not say."""
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    found = next((line for line in lines if line.startswith("VmSwap:")), "VmSwap: 0")
    return int(found.split()[1]) * 1024
