"""Lines of metrics become TensorBoard events that its own reader finds again."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm6.base.run_folder import RunFolder
from openm6.train.tensorboard import open_tensorboard


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
