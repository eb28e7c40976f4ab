"""Metrics as TensorBoard events, where that package is installed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from openm6.base.files import told_as_output_error
from openm6.base.run_folder import RunFolder
from openm6.train.recorder import Line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class WriterErrors:
    """Keeps a failure of the writer's thread off the screen: its owner gets it with the next call, and says it better.

    Errors of other threads, and other errors than the system's, go where they went before.
    """

    def __init__(self) -> None:
        self._before = threading.excepthook
        self._hook = self._sift  # a method is a new object each time it is named
        threading.excepthook = self._hook

    def close(self) -> None:
        if threading.excepthook is self._hook:
            threading.excepthook = self._before

    def _sift(self, failure: threading.ExceptHookArgs) -> None:
        writers = type(failure.thread).__module__.startswith("tensorboard.")
        if not (writers and isinstance(failure.exc_value, OSError)):
            self._before(failure)


class TensorBoardEvents:
    """Writes every number of a line as a scalar."""

    def __init__(self, writer: SummaryWriter, folder: Path, errors: WriterErrors) -> None:
        self._writer, self._folder, self._errors = writer, folder, errors

    def step(self, step: int, steps: int | None) -> None:
        pass

    def line(self, line: Line) -> None:
        """Raises OutputError where an earlier line found the disk full: events are written by a thread."""
        with told_as_output_error(self._folder):
            self._add(line)

    def _add(self, line: Line) -> None:
        scores = line.get("evaluation")
        numbers = (
            {f"evaluation/{name}": value for name, value in scores.items()} if scores is not None else line
        )
        for name, value in numbers.items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, line["step"])
        for name in ("c_v", "dropped"):
            for layer, value in enumerate(line.get(name, [])):
                self._writer.add_scalar(f"{name}/{layer}", value, line["step"])

    def close(self) -> None:
        try:
            with told_as_output_error(self._folder):
                self._writer.close()
        finally:
            self._errors.close()


def open_tensorboard(run: RunFolder, step: int) -> TensorBoardEvents | None:
    """Events from `step` on, hiding later ones of an earlier try; None where the package is not installed.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional package
    except ImportError:
        return None
    errors = WriterErrors()
    try:
        with told_as_output_error(run.tensorboard):
            writer = SummaryWriter(str(run.tensorboard), purge_step=step + 1)
    except BaseException:
        errors.close()
        raise
    return TensorBoardEvents(writer, run.tensorboard, errors)
