"""Averages over steps, and the file that they go to."""

from __future__ import annotations

import json
import math
from pathlib import Path

from openm6.base.plain_json import to_json
from openm6.base.run_folder import RunFolder
from openm6.train.recorder import MetricsFile, Recorder, read_metrics
from openm6.train.step import StepReport


def report(step: int, loss: float, applied: bool = True, **metrics: float) -> StepReport:
    return StepReport(step, 10, loss, 1.0, 0.1, applied, metrics, c_v=[loss, 2.0], dropped=[0.0, 0.0])


def test_means_are_over_the_steps_that_had_the_metric() -> None:
    recorder = Recorder()
    recorder.add(report(1, 4.0, text=1.0), 0.5)
    recorder.add(report(2, 2.0, text=3.0, sound=7.0), 0.5)
    recorder.add(report(3, float("nan"), applied=False, sound=float("nan")), 1.0)
    line = recorder.take()
    assert (line["loss"], line["text"], line["sound"]) == (3.0, 2.0, 7.0)
    assert line["c_v"] == [3.0, 2.0]
    assert "dropped" not in line  # nothing was
    assert line["tokens_per_second"] == 15.0


def test_taking_starts_anew() -> None:
    recorder = Recorder()
    recorder.add(report(1, 4.0), 1.0)
    recorder.take()
    recorder.add(report(2, 2.0), 1.0)
    assert recorder.take()["loss"] == 2.0


def test_the_state_survives_json_in_the_middle() -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    for recorder in (whole, first):
        recorder.add(report(1, 0.1), 0.1)
    second.load_state(json.loads(json.dumps(first.state())))
    for recorder in (whole, second):
        recorder.add(report(2, 0.7), 0.3)
    assert second.take() == whole.take()


def test_opening_the_file_drops_steps_that_will_be_taken_again(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path)
    lines = [{"step": step, "loss": 1.0} for step in (5, 10, 15)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "lo'  # cut short by a crash
    run.metrics.write_text(text)
    file = MetricsFile(run, 10)
    file.line({"step": 15, "loss": float("nan")})
    assert read_metrics(run) == [*lines[:2], {"step": 15, "loss": None}]


def test_a_mean_over_a_number_that_is_not_finite_survives_a_restart() -> None:
    recorder = Recorder()
    recorder.add_numbers({"held_out/loss": float("inf")})
    text = to_json(recorder.state())
    again = Recorder()
    again.load_state(json.loads(text))
    for one in (recorder, again):
        one.add_numbers({"held_out/loss": 1.0})
    assert not math.isfinite(recorder.take()["held_out/loss"])
    assert not math.isfinite(again.take()["held_out/loss"])
