"""Lines of metrics become TensorBoard events that its own reader finds again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from openm6.base.errors import OutputError
from openm6.base.run_folder import RunFolder
from openm6.train.tensorboard import TensorBoardEvents, open_tensorboard


class FullDisk:
    """As TensorBoard's writer fails: in the call after the one that its thread could not write."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_with_the_folder(tmp_path: Path) -> None:
    events = TensorBoardEvents(FullDisk(), tmp_path / "tensorboard")  # type: ignore[arg-type]
    with pytest.raises(
        OutputError, match=r"tensorboard could not be written \(No space left on device\): free some"
    ):
        events.line({"step": 1, "loss": 2.0})


def test_every_number_is_a_scalar(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = RunFolder.open(tmp_path)
    events = open_tensorboard(run, 0)
    assert events is not None
    events.line({"step": 5, "loss": 2.5, "c_v": [0.25, 0.5]})
    events.line({"step": 5, "evaluation": {"accuracy": 0.75}})
    events.close()
    found = accumulator.EventAccumulator(str(run.tensorboard)).Reload()
    values = {
        name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]
    }
    assert values == {
        "loss": [(5, 2.5)],
        "c_v/0": [(5, 0.25)],
        "c_v/1": [(5, 0.5)],
        "evaluation/accuracy": [(5, 0.75)],
    }
