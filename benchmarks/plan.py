"""Benchmark `plan`: predictions of `openm6 plan` on this machine, compared with the run itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Json, Report, Seconds
from openm6.core.errors import TrainingError
from openm6.core.run_folder import RunFolder
from openm6.plan.measured import plan_measured

GOAL = 0.15  # relative error
TEXT = "mixture=[{source: questions, task: question_answering}]"
CASES: dict[str, list[str]] = {
    "all modalities": ["loop.steps=400", "loop.minutes=null"],
    "text": [TEXT, "packing.batch_size=8", "loop.steps=200", "loop.minutes=null"],
    "wide, one process": [
        "model.overrides={hidden_size: 384}", "loop.num_processes=1", "loop.steps=150", "loop.minutes=null"
    ],
    "offloaded, 2 bytes per parameter": [
        "loop.optimizer.precision=bf16-adafactor", "loop.offload={}", "loop.steps=150", "loop.minutes=null"
    ],
}  # fmt: skip


def bench_plan(seconds: Seconds = 420.0, json_path: Json = None) -> None:
    """Compare predicted and measured time, energy and memory of short demo runs.

    \b
    Example: python -m benchmarks plan --json plan.json
    """
    rows: list[dict[str, Any]] = []
    with Report(json_path, seconds) as report:
        report.update({"goal": GOAL, "runs": rows})
        report.later("within_goal", lambda: _within_goal(rows))
        for name, overrides in CASES.items():
            if rows and report.deadline.passed:
                break
            rows.append({"name": name, **compare("demo", overrides)})


def compare(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Return prediction, measurement and relative error of one run.

    Raises:
        TrainingError: the run failed.
    """
    plan = plan_measured([sys.executable, "-m", "openm6.cli.trial_run", "auto", recipe, *overrides], None, None, {})
    with tempfile.TemporaryDirectory() as folder:
        measured = _train(recipe, overrides, RunFolder(Path(folder)))
    planned = {
        "step_seconds": plan["step_seconds"],
        "seconds": plan["seconds"]["total"],
        "step_joules": plan["step_joules"],
        "memory_bytes": plan["memory_peak_bytes"],
    }
    return {
        name: {"planned": planned[name], "measured": found, "error": planned[name] / found - 1}
        for name, found in measured.items()
    }


def _train(recipe: str, overrides: list[str], run: RunFolder) -> dict[str, float]:
    """Return the means of a whole run from its metrics, and its wall time."""
    command = [sys.executable, "-m", "openm6", "train", recipe, *overrides, "--out", str(run.path)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise TrainingError(f"the run to compare with failed: {done.stderr.strip().splitlines()[-1:]}")
    lines = [json.loads(text) for text in run.metrics.read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if "seconds" in line][-1]
    return {
        "step_seconds": last["seconds"] / last["step"],
        "seconds": seconds,
        "step_joules": last["joules"] / last["step"],
        "memory_bytes": last["memory_peak"],
    }


def _within_goal(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return the number of runs within the goal, by quantity."""
    names = [name for name in rows[0] if name != "name"] if rows else []
    return {name: f"{sum(abs(row[name]['error']) <= GOAL for row in rows)} of {len(rows)}" for name in names}
