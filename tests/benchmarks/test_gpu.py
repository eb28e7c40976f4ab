"""The open measurements on a GPU, with other programs in place of the benchmarks: limits, gaps, and the tables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks.gpu import LIMIT, MEASUREMENTS, OPEN, Measurement, bench_gpu, choose, measure, number, run_part
from openm6.core.errors import ConfigError

ROOT = Path(__file__).parents[2]

# A benchmark that writes what its second word holds, fails, never ends, or ends with what it has when it is asked to.
PROGRAM = """
import json, pathlib, signal, subprocess, sys, time
kind, found, *options = sys.argv[1:]
target = pathlib.Path(options[options.index("--json") + 1])
if kind == "fails":
    sys.exit("ConfigError: it does not fit")
if kind == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if kind == "partial":
    def end(*_):
        target.write_text(found)
        sys.exit(143)
    signal.signal(signal.SIGTERM, end)
if kind != "whole":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    target.with_suffix(".child").write_text(str(child.pid))
    time.sleep(60)
target.write_text(found)
"""
TRAINED = {
    "device": "NVIDIA H100",
    "config": {"name": "a"},
    "ours": {"tokens_per_second": 223456.7, "mfu": 0.387, "breakdown_ms": {"attention": 7.26}},
    "baseline": {"tokens_per_second": 142000.0, "mfu": None},
    "ratio": 1.574,
    "baseline_note": "transformers' Qwen3-MoE, compiled",
    "cut_short": None,
}


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    return [sys.executable, str(program)]


def measurement(kind: str, name: str = "train-a", found: object = TRAINED, fraction: float = 1.0) -> Measurement:
    tables = next(one for one in MEASUREMENTS if one.name == name).tables
    return Measurement(name, 1, (kind, json.dumps(found)), fraction, tables)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended but that nobody waits for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_tables_hold_what_was_measured(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_part([measurement("whole")], tmp_path, "part-1", 60, command) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "part-1.md").read_text()
    assert printed.startswith(f"Measured on one NVIDIA H100 with torch {torch.__version__}.")
    assert "| `a` | NVIDIA H100 | 223,457 | 142,000 | 1.57 |  |\n" in printed
    assert f"| MFU, % | 38.7 | {OPEN} |" in printed and f"| ms per step: attention | 7.3 | {OPEN} |" in printed
    assert "Baseline: transformers' Qwen3-MoE, compiled" in printed and "Not complete" not in printed
    assert json.loads((tmp_path / "train-a.json").read_text()) == TRAINED


def test_a_measurement_that_fails_leaves_a_gap_with_its_reason(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    measurements = [measurement("fails", "packing"), measurement("whole")]
    assert run_part(measurements, tmp_path, "part-1", 60, command) == 1
    printed = capsys.readouterr().out
    assert f"| tokens/s: median (quartiles) | {OPEN} ({OPEN}, {OPEN}) |" in printed
    assert "Not complete: exit status 1: ConfigError: it does not fit\n" in printed and "223,457" in printed


@pytest.mark.parametrize("kind", ["partial", "deaf"])
def test_what_takes_too_long_is_asked_for_what_it_has_then_killed(
    kind: str, tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.GRACE", 2.0)
    outcome = measure(measurement(kind), tmp_path, 4.0, command)
    assert outcome.failure is not None and outcome.failure.startswith("stopped after 4 s")
    assert outcome.found == (TRAINED if kind == "partial" else {})
    child = int((tmp_path / "train-a.child").read_text())
    for _ in range(100):  # a signal takes a moment; by itself the child would end after a minute
        if not alive(child):
            return
        time.sleep(0.1)
    pytest.fail("what a measurement started must end with it")


def test_time_that_is_left_over_is_divided_among_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits, now = [], [0.0]

    def took_ten_seconds(one: Measurement, out: Path, limit: float, command: object) -> object:
        limits.append(limit)
        now[0] += 10
        return measure_outcome

    measure_outcome = type("Outcome", (), {"found": {}, "failure": None})()
    monkeypatch.setattr("benchmarks.gpu.measure", took_ten_seconds)
    monkeypatch.setattr("benchmarks.gpu.time.monotonic", lambda: now[0])
    fractions = {"train-a": 0.5, "packing": 0.25, "generate": 0.25}
    run_part([measurement("whole", name, fraction=f) for name, f in fractions.items()], tmp_path, "part-1", 100)
    assert limits == [50, 45, 80]


def test_a_stopped_part_prints_what_there_is(tmp_path: Path, command: list[str]) -> None:
    """As by a job's own limit: the measurement in progress gives what it has, later ones are open."""
    program = f"""
import sys
from pathlib import Path
from tests.benchmarks.test_gpu import measurement, run_part
measurements = [measurement("partial"), measurement("whole", "generate")]
sys.exit(run_part(measurements, Path({str(tmp_path)!r}), "part-1", 60, {command!r}))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    while not (tmp_path / "train-a.child").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "223,457" in printed and printed.count("Not complete: stopped") == 2
    assert f"| autoregressive decoding | {OPEN} |" in printed


def test_numbers_are_written_as_in_the_docs() -> None:
    found = {"a": {"b": 1234.5, "none": None, "flag": True, "nan": float("nan")}}
    assert number(found, "a", "b") == "1,234" and number(found, "a", "b", form=".2f", scale=0.01) == "12.35"
    assert {number(found, *path) for path in (("a", "none"), ("a", "flag"), ("a", "nan"), ("c", "d"))} == {OPEN}


@pytest.mark.parametrize("one", MEASUREMENTS, ids=lambda one: one.name)
def test_every_measurement_is_a_command_that_exists(one: Measurement) -> None:
    name, *words = one.words
    limited = [] if one.limited_by is None else [one.limited_by, "5"]
    benchmarks.command(name).make_context(name, [*words, "--json", "x.json", *limited])
    for table in one.tables:
        rows = table({}, "NVIDIA H100")
        assert len({len(row) for row in rows}) == 1 and any(OPEN in cell for row in rows for cell in row)


def test_each_part_fits_its_time() -> None:
    assert LIMIT <= 9.5 * 60
    for part in (1, 2):
        assert sum(one.fraction for one in choose(part, None)) == pytest.approx(1.0)
    assert [one.name for one in choose(2, "fp8")] == ["fp8"]
    with pytest.raises(ConfigError, match="no measurement 'fp9'"):
        choose(1, "fp9")


def test_without_a_gpu_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no GPU"):
        bench_gpu(tmp_path / "gpu")
    assert not (tmp_path / "gpu").exists()
