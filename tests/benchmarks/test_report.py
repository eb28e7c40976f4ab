"""A benchmark's report: printed once, also when it is cut short or fails, with what was found by then."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import LIMIT, Deadline, Report
from benchmarks.multitask import check_files
from benchmarks.own_data.command import bench_own_data
from openm6.core.errors import ConfigError, OutputError


def printed(capsys: pytest.CaptureFixture) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_a_whole_benchmark_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with Report(tmp_path / "found.json", 60) as report:
        report.later("ratio", lambda: report.found["ours"] / 2)
        report["ours"] = 4
        report.update({"device": "CPU"})
    assert list(report.found) == ["ratio", "ours", "device", "cut_short"]
    assert report.found["ratio"] == 2 and report.found["cut_short"] is None
    assert printed(capsys) == json.loads((tmp_path / "found.json").read_text()) == report.found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_prints_what_was_found_by_then(number: signal.Signals, capsys: pytest.CaptureFixture) -> None:
    before, rows = signal.getsignal(number), []
    with pytest.raises(SystemExit) as ended, Report(None, 60) as report:
        report["rows"] = rows
        report.later("count", lambda: len(rows))
        rows.append("first")
        os.kill(os.getpid(), number)
        time.sleep(10)  # it is woken by the signal
        rows.append("second")
    assert ended.value.code == 128 + number
    assert printed(capsys) == report.found
    assert report.found["rows"] == ["first"] and report.found["count"] == 1
    assert number.name.removeprefix("SIG").lower()[:4] in report.found["cut_short"].lower().replace("ctrl-c", "int")
    assert signal.getsignal(number) is before


def test_past_the_limit_it_ends_well_with_what_there_is(capsys: pytest.CaptureFixture) -> None:
    with Report(None, 60, limit=0.05) as report:
        report["ours"] = 1
        try:
            while True:
                time.sleep(0.001)
        except Exception:
            pytest.fail("it was caught on the way")
    assert printed(capsys) == {"ours": 1, "cut_short": "the time was over"}
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_an_error_on_the_way_out_is_still_a_cut(capsys: pytest.CaptureFixture) -> None:
    """A library may turn what ends it into an error of its own."""
    with Report(None, 60, limit=0.02) as report:
        try:
            time.sleep(10)
        except BaseException:
            raise RuntimeError("a part was torn down") from None
    assert printed(capsys)["cut_short"] == report.found["cut_short"] == "the time was over"


def test_an_error_of_its_own_passes_after_what_was_found(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match="no such size"), Report(None, 60):
        raise ConfigError("no such size")
    assert capsys.readouterr().out == ""
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    with pytest.raises(RuntimeError, match="CUDA"), Report(None, 60) as report:
        report["ours"] = 1
        raise RuntimeError("CUDA is out of memory\nTried to allocate")
    assert printed(capsys) == {"ours": 1, "cut_short": "RuntimeError: CUDA is out of memory"}


@pytest.mark.parametrize("limit", [None, 0.02])
def test_an_entry_that_fails_loses_no_other(limit: float | None, capsys: pytest.CaptureFixture) -> None:
    def failing() -> dict[str, Any]:
        raise OutputError("tables.md could not be written")

    with pytest.raises(OutputError, match="tables.md"), Report(None, 60, limit) as report:
        report["ours"] = 1
        report.at_end(failing)
        report.at_end(lambda: {"ratio": 2})
        time.sleep(0.1 if limit else 0)
    reason = "the time was over" if limit else "OutputError: tables.md could not be written"
    assert printed(capsys) == {"ours": 1, "ratio": 2, "cut_short": reason}


def test_a_path_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--json .*there is no folder"):
        Report(tmp_path / "none" / "found.json", 60)
    with pytest.raises(ConfigError, match="--table .*there is no folder"):
        bench_own_data(table=tmp_path / "none" / "own.md")
    with pytest.raises(ConfigError, match="--image .* is a folder"):
        check_files(tmp_path, None)


def test_a_forked_process_ends_as_it_would_without(capsys: pytest.CaptureFixture) -> None:
    with Report(None, 60):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert printed(capsys)["cut_short"] is None


def test_the_deadline_follows_the_clock_it_is_given() -> None:
    now = [100.0]
    deadline = Deadline(5, lambda: now[0])
    assert deadline.left == 5 and not deadline.passed
    now[0] = 106.0
    assert deadline.left == 0 and deadline.passed
    report = Report(None, 5, clock=lambda: now[0])
    assert report.deadline.end == 111.0
    assert LIMIT < 8 * 60
