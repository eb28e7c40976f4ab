"""The plan of a run on this machine: a few of its steps, measured in a child process and extrapolated to all of it."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from openm6.core.config import Config, build
from openm6.core.errors import ConfigError, TrainingError
from openm6.core.run_folder import RunFolder
from openm6.energy.carbon import GPT3_MWH, JOULES_PER_KWH, grid
from openm6.energy.meter import EnergyConfig

STEPS = 40  # that a trial run takes
WARMUP_STEPS = 8  # of them, slower through caches, compilation and memory that is claimed for the first time
TIMEOUT = 600.0  # seconds that a trial run may take
TIME_FOR_STEPS = 0.96  # of loop.minutes, as training itself divides them
SECONDS_PER_DAY = 86_400.0
STDIN = 0


class TrialRun(Config):
    """What a trial run reports beside its metrics.

    steps, minutes: of the whole run; save_every: its steps from checkpoint to checkpoint; held_out_seconds,
    evaluation_seconds: 0 if the recipe does without; evaluated_fraction: part of the records that the trial evaluated.
    """

    name: str
    machine: str
    step_tokens: int
    parameters: dict[str, int]
    steps: int | None
    minutes: float | None
    save_every: int
    start_seconds: float
    held_out_every: int | None
    held_out_seconds: float
    save_seconds: float
    evaluation_seconds: float
    evaluated_fraction: float
    memory_peak: int | None


@dataclass(frozen=True)
class MeasuredSteps:
    """Means over the steps after the warm-up, and the most bytes of memory so far."""

    count: int
    seconds: float
    joules: float
    memory_peak: int | None
    energy_source: str


def plan_measured(
    command: Sequence[str], tokens: float | None, days: float | None, energy: dict[str, Any]
) -> dict[str, Any]:
    """Run `command`, which trains a few steps into the folder that is appended to it, and return the plan's JSON.

    tokens, days: length of the run, if not as its recipe has it; energy: country and PUE.

    Raises:
        ConfigError: a number that cannot be.
        TrainingError: the child process failed, with its own sentence, or took too long.
    """
    for name, value in (("tokens", tokens), ("days", days)):
        if value is not None and value <= 0:
            raise ConfigError(f"{name}={value:g} must be above 0")
    config = build(EnergyConfig, energy, "the options of energy")
    grid(config.country)  # refuses an unknown country before minutes are spent
    with tempfile.TemporaryDirectory(prefix="openm6-plan-") as folder:
        run = RunFolder(Path(folder))
        _run_trial([*command, folder])
        trial = TrialRun.model_validate_json(trial_file(run).read_text(encoding="utf-8"))
        return extrapolate(trial, measured_steps(run), tokens, days, config)


def _run_trial(command: list[str]) -> None:
    try:
        done = run_child(command, TIMEOUT)
    except subprocess.TimeoutExpired:
        raise TrainingError(
            f"{STEPS} steps took more than {TIMEOUT:g} s on this machine: plan for a GPU with --gpu, or take a smaller "
            "model"
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise TrainingError(f"the trial run failed: {last.removeprefix('error: ')}")


def trial_file(run: RunFolder) -> Path:
    """Where a trial run writes its `TrialRun`."""
    return run.path / "trial.json"


def measured_steps(run: RunFolder) -> MeasuredSteps:
    """Means of a run that wrote a line after every step."""
    lines = [json.loads(text) for text in run.metrics.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "seconds" in line][WARMUP_STEPS:]

    def mean(name: str) -> float:
        return statistics.mean(after[name] - before[name] for before, after in pairwise(lines))

    return MeasuredSteps(
        count=len(lines) - 1,
        seconds=mean("seconds"),
        joules=mean("joules"),  # the meter reads now and then: a single short step may show none
        memory_peak=lines[-1].get("memory_peak"),
        energy_source=str(lines[-1]["energy_source"]),
    )


def extrapolate(
    trial: TrialRun, steps: MeasuredSteps, tokens: float | None, days: float | None, energy: EnergyConfig
) -> dict[str, Any]:
    """The plan of the whole run, as `openm6 plan --json` writes it."""
    count = _number_of_steps(trial, steps.seconds, tokens, days)
    saves = -(-count // trial.save_every)
    evaluations = count // trial.held_out_every if trial.held_out_every else 0
    seconds = {
        "start": trial.start_seconds,
        "steps": count * steps.seconds,
        "held_out": evaluations * trial.held_out_seconds,
        "checkpoints": saves * trial.save_seconds,
        "evaluation": trial.evaluation_seconds / trial.evaluated_fraction,
    }
    total = sum(seconds.values())
    joules = (
        steps.joules / steps.seconds * (total - trial.start_seconds)
    )  # every second costs as a step's does
    current, trained = grid(energy.country), float(count * trial.step_tokens)
    mwh = joules * energy.pue / JOULES_PER_KWH / 1000
    peaks = [peak for peak in (steps.memory_peak, trial.memory_peak) if peak is not None]
    return {
        "model": trial.name,
        "machine": trial.machine,
        "parameters": trial.parameters,
        "measured_steps": steps.count,
        "step_seconds": steps.seconds,
        "step_joules": steps.joules,
        "step_tokens": trial.step_tokens,
        "steps": count,
        "tokens": trained,
        "tokens_per_day": trial.step_tokens / steps.seconds * SECONDS_PER_DAY,
        "seconds": {**seconds, "total": total},
        "days": total / SECONDS_PER_DAY,
        "memory_peak_bytes": max(peaks, default=None),
        "energy": {
            "joules": joules,
            "joules_per_token": joules * energy.pue / trained,
            "mwh": mwh,
            "kg_co2e": current.grams(joules, energy.pue) / 1000,
            "grid": f"{current.name}, {current.grams_per_kwh:g} g/kWh ({current.year})",
            "of_gpt3": mwh / GPT3_MWH,
            "source": steps.energy_source,
        },
    }


def _number_of_steps(trial: TrialRun, seconds: float, tokens: float | None, days: float | None) -> int:
    if tokens is not None:
        return max(1, round(tokens / trial.step_tokens))
    if days is not None:
        return max(1, int(days * SECONDS_PER_DAY / seconds))
    if trial.steps is not None:
        return trial.steps
    assert trial.minutes is not None  # the recipe is checked: steps are given or follow from the minutes
    return max(1, int(TIME_FOR_STEPS * trial.minutes * 60 / seconds))


def run_child(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command that calls `end_with_parent` at its start; return what it printed.

    Its standard input is a pipe whose other end this process alone holds. The system closes it when this process is
    gone, for whatever reason.

    Raises:
        subprocess.TimeoutExpired: it took longer, and was killed.
    """
    reader, writer = os.pipe()
    try:
        return subprocess.run(
            command, stdin=reader, capture_output=True, text=True, check=False, timeout=seconds
        )
    finally:
        os.close(reader)
        os.close(writer)


def end_with_parent(folder: Path | None = None) -> None:
    """From now on this process ends when the one that started it by `run_child` does, and deletes `folder` before."""
    threading.Thread(target=_end_after_input, args=(folder,), name="openm6-parent", daemon=True).start()


def _end_after_input(folder: Path | None) -> None:
    # Not through sys.stdin: its lock would be held for ever in processes that are forked meanwhile.
    while os.read(STDIN, 1):
        pass
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
