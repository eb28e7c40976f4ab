"""A plan held against what a run measured."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from openm6.base.errors import DataError
from openm6.base.run_folder import RunFolder
from openm6.plan.ceilings import read_ceilings
from openm6.plan.machine import machine_cluster
from openm6.plan.plan import make_plan
from openm6.plan.question import Question, read_model

WARMING = 3  # steps that fill caches, and are slower
GOALS = {"memory": 0.05, "step time": 0.15, "energy": 0.15}


def check_run(path: Path) -> list[dict[str, Any]]:
    """Memory, step time and joules of a run on this machine: planned, measured, and how far off.

    Raises:
        ConfigError: no such run, or the machine was not measured.
        DataError: the run told too little to be compared.
    """
    ceilings = read_ceilings()
    model = read_model(str(path))
    measured = read_measured(RunFolder(path))
    plan = make_plan(Question(model, steps=steps_told(RunFolder(path))), machine_cluster(ceilings))
    real, cluster = plan.real, plan.cluster
    seconds = real.time.seconds
    # On a GPU a run tells what torch's allocator holds, without driver and libraries.
    bytes_ = real.budget.device - (real.budget.context if cluster.measured is None else 0.0)
    planned = {
        "memory": (bytes_ / 2**20, "MiB"),
        "step time": (seconds * 1000, "ms"),
        "energy": (seconds * (real.watts or cluster.draw(*real.time.shares)), "J a step"),
    }
    rows = []
    for name, (value, unit) in planned.items():
        found = measured[name]
        error = None if found is None else value / found - 1
        notes = [_judged(name, error), str(real.budget.growth) if name == "memory" else ""]
        note = "; ".join(note for note in notes if note)
        rows.append(
            {"name": name, "planned": value, "measured": found, "unit": unit, "error": error, "note": note}
        )
    return rows


def read_measured(run: RunFolder) -> dict[str, float | None]:
    """MiB at most, milliseconds and joules of a step (medians), from the run's metrics; None for what is not there.

    Raises:
        DataError: fewer than three lines.
    """
    lines = _lines(run)
    if len(lines) < 3:
        raise DataError(
            f"{run.metrics} has fewer than three lines: let the run go on, or lower loop.log_every"
        )
    late = [line for line in lines if line["step"] > WARMING] or lines
    pairs = list(pairwise(late))
    steps = [after["step"] - before["step"] for before, after in pairs]
    peak = lines[-1].get("memory_peak")

    def each(name: str) -> float | None:
        if any(not isinstance(line.get(name), float) for line in late):
            return None
        return statistics.median(
            (after[name] - before[name]) / count for (before, after), count in zip(pairs, steps, strict=True)
        )

    seconds = each("seconds")
    return {
        "memory": None if peak is None else peak / 2**20,
        "step time": None if seconds is None else 1000 * seconds,
        "energy": each("joules"),
    }


def steps_told(run: RunFolder) -> int:
    """The last step that a run told of."""
    lines = _lines(run)
    return int(lines[-1]["step"]) if lines else 0


def _judged(name: str, error: float | None) -> str:
    if error is None:
        return "not measured"
    return "" if abs(error) <= GOALS[name] else "off by more than wanted"


def _lines(run: RunFolder) -> list[dict[str, Any]]:
    try:
        found = [json.loads(text) for text in run.metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        raise DataError(f"{run.metrics} cannot be read: name the folder of a run") from None
    return [line for line in found if "seconds" in line]
