"""Lines of metrics become TensorBoard events that its own reader finds again."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from openm6.base.errors import OutputError
from openm6.base.run_folder import RunFolder
from openm6.train.tensorboard import open_tensorboard


def test_a_full_disk_is_told_with_the_folder_and_not_by_the_writers_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer")
    seen: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    before = threading.excepthook
    full = threading.Event()
    write = record_writer.RecordWriter.write

    def write_unless_full(writer: object, content: bytes) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, content)

    monkeypatch.setattr(record_writer.RecordWriter, "write", write_unless_full)
    run = RunFolder.open(tmp_path)
    events = open_tensorboard(run, 0)
    assert events is not None
    full.set()
    sentence = r"tensorboard could not be written \(No space left on device\): free some"
    with pytest.raises(OutputError, match=sentence):
        for step in range(1, 100):  # the thread is seen to have failed at the latest when its queue is full
            events.line({"step": step, "loss": 2.0})
    other = threading.Thread(target={}.popitem)
    other.start()
    other.join()
    assert [failure.thread for failure in seen] == [other]
    with pytest.raises(OutputError, match=sentence):
        events.close()
    assert threading.excepthook is before
    with pytest.raises(OutputError, match=sentence):
        open_tensorboard(run, 0)
    assert threading.excepthook is before and len(seen) == 1


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
