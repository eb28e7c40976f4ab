"""Metrics: averages over steps, the file that a resumed run continues, TensorBoard events, and the display."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import threading
from pathlib import Path

import pytest
from rich.console import Console

from openm6.core.errors import OutputError
from openm6.core.files import to_json
from openm6.core.run_folder import RunFolder
from openm6.train.metrics import (
    LiveDisplay,
    MetricAverager,
    MetricsFile,
    Pace,
    PlainDisplay,
    TensorBoardEvents,
    describe,
    open_loggers,
)
from openm6.train.step import StepReport

LINE = {
    "step": 20,
    "loss": 2.5,
    "loss/text": 2.25,
    "grad_norm": 1.0,
    "expert_load_cv": [0.5, 0.7],
    "tokens_per_second": 6123.4,
}
LINE |= {"tokens": 1000, "non_finite": 0, "spikes": 0, "learning_rate": 0.001, "seconds": 3.0}
SCORES = {"step": 20, "evaluation": {"accuracy": 0.625}}


def report(step: int, loss: float, applied: bool = True, **metrics: float) -> StepReport:
    return StepReport(step, 10, loss, 1.0, 0.1, applied, metrics, expert_load_cv=[loss, 2.0], dropped=[0.0, 0.0])


def test_means_are_over_the_steps_that_had_the_metric_since_the_last_call() -> None:
    averager = MetricAverager()
    averager.add(report(1, 4.0, text=1.0), 0.5)
    averager.add(report(2, 2.0, text=3.0, audio=7.0), 0.5)
    averager.add(report(3, float("nan"), applied=False, audio=float("nan")), 1.0)
    line = averager.compute()
    assert (line["loss"], line["text"], line["audio"]) == (3.0, 2.0, 7.0)
    assert line["expert_load_cv"] == [3.0, 2.0]
    assert "dropped" not in line  # nothing was
    assert line["tokens_per_second"] == 15.0
    averager.add(report(4, 1.0), 1.0)
    assert averager.compute()["loss"] == 1.0


def test_the_state_survives_json_in_the_middle() -> None:
    whole, first, second = MetricAverager(), MetricAverager(), MetricAverager()
    for averager in (whole, first):
        averager.add(report(1, 0.1), 0.1)
    second.load_state(json.loads(json.dumps(first.state())))
    for averager in (whole, second):
        averager.add(report(2, 0.7), 0.3)
    assert second.compute() == whole.compute()


def test_opening_the_file_drops_steps_that_will_be_taken_again(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path)
    lines = [{"step": step, "loss": 1.0} for step in (5, 10, 15)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "lo'  # cut short by a crash
    run.metrics.write_text(text)
    file = MetricsFile(run, 10)
    file.log({"step": 15, "loss": float("nan")})
    assert run.read_metrics() == [*lines[:2], {"step": 15, "loss": None}]


def test_a_mean_over_a_number_that_is_not_finite_survives_a_restart() -> None:
    averager = MetricAverager()
    averager.add_numbers({"held_out/loss": float("inf")})
    text = to_json(averager.state())
    again = MetricAverager()
    again.load_state(json.loads(text))
    for one in (averager, again):
        one.add_numbers({"held_out/loss": 1.0})
    assert not math.isfinite(averager.compute()["held_out/loss"])
    assert not math.isfinite(again.compute()["held_out/loss"])


def test_a_full_disk_is_reported_with_the_folder_and_not_by_the_writers_thread(
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
    events = TensorBoardEvents(run.tensorboard, 0)
    full.set()
    sentence = r"tensorboard could not be written \(No space left on device\): free some"
    with pytest.raises(OutputError, match=sentence):
        for step in range(1, 100):  # the thread is seen to have failed at the latest when its queue is full
            events.log({"step": step, "loss": 2.0})
    other = threading.Thread(target={}.popitem)
    other.start()
    other.join()
    assert [failure.thread for failure in seen] == [other]
    with pytest.raises(OutputError, match=sentence):
        events.close()
    assert threading.excepthook is before
    with pytest.raises(OutputError, match=sentence):
        TensorBoardEvents(run.tensorboard, 0)
    assert threading.excepthook is before and len(seen) == 1


def test_every_number_is_a_scalar(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = RunFolder.open(tmp_path)
    events = TensorBoardEvents(run.tensorboard, 0)
    events.log({"step": 5, "loss": 2.5, "expert_load_cv": [0.25, 0.5]})
    events.log({"step": 5, "evaluation": {"accuracy": 0.75}})
    events.close()
    found = accumulator.EventAccumulator(str(run.tensorboard)).Reload()
    values = {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert values == {
        "loss": [(5, 2.5)],
        "expert_load_cv/0": [(5, 0.25)],
        "expert_load_cv/1": [(5, 0.5)],
        "evaluation/accuracy": [(5, 0.75)],
    }


def test_the_energy_of_a_line() -> None:
    few = {name: value for name, value in LINE.items() if name != "loss/text"}
    metered = few | {"joules": 12_340.0, "watts": 41.2, "joules_per_token": 0.01, "energy_source": "rapl"}
    words = describe(metered, 40, Pace(0))
    assert "6,123 tokens/s  12.3 kJ at 41 W (rapl)  load CV" in words and "joules" not in words


def test_a_line_in_words() -> None:
    pace = Pace(0)
    words = describe(LINE, 40, pace)
    assert words.startswith("step 20/40  loss 2.5000  loss/text 2.2500  6,123 tokens/s  load CV 0.60  ")
    assert words.endswith("s left")
    assert describe(SCORES, 40, pace) == "step 20/40  scores  accuracy 0.625"
    assert "measuring the speed" in describe(LINE, None, pace)


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    display = open_loggers(RunFolder.open(tmp_path), 0, tensorboard=False)[-1]
    assert isinstance(display, PlainDisplay)
    display.step(20, 40)
    display.log(LINE)
    display.close()
    assert capsys.readouterr().err.count("\n") == 1


def test_plain_lines_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {f"loss/{kind}": 12.3456 for kind in ("text", "image_out", "audio_out", "numbers_out", "pool")}
    line = LINE | kinds | {"joules": 12_340.0, "watts": 41.2, "energy_source": "nvml+rapl", "metering_seconds": 0.1}
    words = describe(line | {"step": 123_456}, 200_000, Pace(0))
    assert len(words) <= 100 and words.startswith("step 123456/200000  loss 2.5000  loss/text 12.3456")
    assert "6,123 tokens/s" in words and "metering" not in words


def test_plain_lines_come_every_ten_seconds_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    display = PlainDisplay(0, lambda: now[0])
    for step in range(1, 41):
        now[0] += 1.0
        display.step(step, 40)
        display.log(LINE | {"step": step})
    display.log(SCORES)
    shown = [words.split("  ")[0] for words in capsys.readouterr().err.splitlines()]
    assert shown == [f"step {step}/40" for step in (1, 11, 21, 31, 40, 20)]


def test_the_live_table_shows_losses_speed_balance_and_scores() -> None:
    screen = io.StringIO()
    display = LiveDisplay("demo", 0, Console(file=screen, force_terminal=True, width=100))
    display.log(LINE)
    display.log(SCORES)
    display.step(20, 40)
    display.close()
    shown = screen.getvalue()
    expected = (
        "demo",
        "step 20 of 40",
        "loss/text",
        "2.2500",
        "6,123",
        "0.50 0.70",
        "accuracy (step 20)",
        "0.625",
    )
    assert all(words in shown for words in expected)
