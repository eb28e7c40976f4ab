"""The plan of a run on this machine: a few of its steps, measured in a child process and extrapolated to all of it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openm6.core.config import Config, build
from openm6.core.errors import ConfigError, TrainingError
from openm6.core.run_folder import RunFolder
from openm6.energy.carbon import GPT3_MWH
from openm6.energy.meter import EnergyConfig
from openm6.plan.plan import SECONDS_PER_DAY, energy_of

STEPS = 40  # that a trial run takes
WARMUP_STEPS = 8  # of them, slower because caches are cold, code is compiled and memory is allocated
TIMEOUT = 600.0  # seconds that a trial run may take
TIME_FOR_STEPS = 0.96  # of loop.minutes; the rest is for the last checkpoint, and for steps that take longer
MAX_BEFORE = 0.65  # of loop.minutes that what is done before the first step takes from the steps
STDIN = 0
TRIAL_FILE = "trial.json"  # of a trial run, in its folder


class TrialRun(Config):
    """What a trial run reports beside its metrics.

    steps, minutes: of the whole run; seconds_before: of its minutes, before the first step; save_every: its steps from
    checkpoint to checkpoint; held_out_seconds: 0 if the recipe does without; evaluations: fraction of the records and
    seconds of each, none if the recipe does without; report_seconds: what follows the last step beside checkpoint and
    evaluation. cache_uses: lookups, misses and seconds of each cache of codes while `cached_batches` batches were made;
    cores: among which this work is divided.
    """

    name: str
    machine: str
    step_tokens: int
    parameters: dict[str, int]
    steps: int | None
    minutes: float | None
    save_every: int
    start_seconds: float
    seconds_before: float = 0.0
    held_out_every: int | None
    held_out_seconds: float
    save_seconds: float
    evaluations: list[tuple[float, float]]
    report_seconds: float
    memory_peak: int | None
    cache_uses: list[tuple[int, int, float]] = []
    cached_batches: int = 1
    cores: int = 1


@dataclass(frozen=True)
class MeasuredSteps:
    """Means over the steps after the warm-up, and the peak of memory in bytes."""

    count: int
    seconds: float
    joules: float
    memory_peak: int | None
    energy_source: str


def plan_measured(
    command: Sequence[str], tokens: float | None, days: float | None, energy: dict[str, Any]
) -> dict[str, Any]:
    """Run `command`, which trains a few steps into the folder that is appended to it, and return the plan's JSON.

    tokens, days: length of the run, if not as its recipe has it; energy: country and PUE. ConfigError: an invalid
    number, or an unknown country; TrainingError: the child process failed, with its own sentence, or took too long.
    """
    for name, value in (("tokens", tokens), ("days", days)):
        if value is not None and value <= 0:
            raise ConfigError(f"{name}={value:g} must be above 0")
    config = build(EnergyConfig, energy, "the options of energy")
    with tempfile.TemporaryDirectory(prefix="openm6-plan-") as folder:
        run = RunFolder(Path(folder))
        try:
            done = run_child([*command, folder], TIMEOUT)
        except subprocess.TimeoutExpired:
            raise TrainingError(
                f"{STEPS} steps took more than {TIMEOUT:g} s on this machine: plan for a GPU with --gpu, or take a "
                "smaller model"
            ) from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            raise TrainingError(f"the trial run failed: {last.removeprefix('error: ')}")
        trial = TrialRun.model_validate_json((run.path / TRIAL_FILE).read_text(encoding="utf-8"))
        return extrapolate(trial, measured_steps(run), tokens, days, config)


def time_for_steps(minutes: float, before: float) -> float:
    """Seconds of steps, and of what comes beside them, in a run of some minutes, after `before` the first step."""
    return 60 * minutes * TIME_FOR_STEPS - min(before, 60 * minutes * MAX_BEFORE)


def measured_steps(run: RunFolder) -> MeasuredSteps:
    lines = [json.loads(text) for text in run.metrics.read_text(encoding="utf-8").splitlines()]
    first, *_, last = lines = [line for line in lines if "seconds" in line][WARMUP_STEPS:]
    count = len(lines) - 1
    seconds, beside, joules = ((last[name] - first[name]) / count for name in ("seconds", "seconds_beside", "joules"))
    joules *= seconds / (seconds + beside)  # without those of held-out losses and saves
    return MeasuredSteps(count, seconds, joules, last.get("memory_peak"), str(last["energy_source"]))


def whole_evaluation(parts: Sequence[tuple[float, float]]) -> float:
    """Seconds of evaluating all records, by the line through parts: (fraction, seconds); not all of it grows."""
    (small, first), (large, last) = parts[0], parts[-1]
    rate = max(0.0, last - first) / (large - small) if large > small else 0.0
    return last + (1.0 - large) * rate


def caching_seconds(trial: TrialRun, steps: int) -> float:
    """Mean seconds of a step in which images and recordings are coded for the first time.

    The measured steps find all codes in the caches. Of n lookups of K different entries, drawn at random,
    K (1 − exp(−n/K)) miss; K follows from the lookups and misses of the trial.
    """
    total = 0.0
    for lookups, misses, seconds in trial.cache_uses:
        if misses:
            expected = steps * lookups / trial.cached_batches
            total += seconds / misses * expected * _missed(expected / _distinct(lookups, misses))
    return total / steps / trial.cores


def _missed(x: float) -> float:
    """Fraction of lookups that miss, of x times as many lookups as there are entries: (1 − exp(−x)) / x."""
    return -math.expm1(-x) / x if x > 0 else 1.0


def _distinct(lookups: int, misses: int) -> float:
    """Number of entries, of which so many lookups missed so many; without a hit, infinitely many."""
    if misses >= lookups:
        return math.inf
    low, high = 0.0, lookups / misses  # of lookups per entry: _missed(x) < 1/x
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _missed(middle) > misses / lookups else (low, middle)
    return lookups / high


def extrapolate(
    trial: TrialRun, steps: MeasuredSteps, tokens: float | None, days: float | None, energy: EnergyConfig
) -> dict[str, Any]:
    """The plan of the whole run, as `openm6 plan --json` writes it."""
    # The recipe is checked: it has steps or minutes.
    limit = days * SECONDS_PER_DAY if days is not None else time_for_steps(trial.minutes or 0.0, trial.seconds_before)
    step_seconds = steps.seconds
    beside = trial.save_seconds / trial.save_every
    beside += trial.held_out_seconds / trial.held_out_every if trial.held_out_every else 0.0
    for _ in range(5):  # the longer a run, the shorter its mean step
        if tokens is not None:
            count = max(1, round(tokens / trial.step_tokens))
        elif days is None and trial.steps:
            count = trial.steps
        else:
            count = max(1, int(limit / (step_seconds + beside)))
        step_seconds = steps.seconds + caching_seconds(trial, count)
    saves = -(-count // trial.save_every)
    evaluations = count // trial.held_out_every if trial.held_out_every else 0
    evaluation = whole_evaluation(trial.evaluations) if trial.evaluations else 0.0
    seconds = {
        "start": trial.start_seconds,
        "steps": count * step_seconds,
        "held_out": evaluations * trial.held_out_seconds,
        "checkpoints": saves * trial.save_seconds,
        "evaluation": evaluation + trial.report_seconds,
    }
    total = sum(seconds.values())
    # Every second costs as much as a second of a step.
    joules = steps.joules / steps.seconds * (total - trial.start_seconds)
    trained = float(count * trial.step_tokens)
    spent = energy_of(energy, joules, joules, trained)
    peaks = [peak for peak in (steps.memory_peak, trial.memory_peak) if peak is not None]
    return {
        "model": trial.name,
        "machine": trial.machine,
        "parameters": trial.parameters,
        "measured_steps": steps.count,
        "step_seconds": step_seconds,
        "step_joules": steps.joules / steps.seconds * step_seconds,
        "step_tokens": trial.step_tokens,
        "steps": count,
        "tokens": trained,
        "tokens_per_day": trial.step_tokens / step_seconds * SECONDS_PER_DAY,
        "seconds": {**seconds, "total": total},
        "days": total / SECONDS_PER_DAY,
        "memory_peak_bytes": max(peaks, default=None),
        "energy": {
            "joules": joules,
            **{name: value for name, value in asdict(spent).items() if name != "mwh_rated"},
            "of_gpt3": spent.mwh / GPT3_MWH,
            "source": steps.energy_source,
        },
    }


def run_child(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command that calls `end_with_parent` at its start; return what it printed.

    Its standard input is a pipe whose other end this process alone holds: the system closes it when this process ends.
    If it takes longer, it is killed, and subprocess.TimeoutExpired is raised.
    """
    reader, writer = os.pipe()
    try:
        return subprocess.run(command, stdin=reader, capture_output=True, text=True, check=False, timeout=seconds)
    finally:
        os.close(reader)
        os.close(writer)


def end_with_parent(folder: Path | None = None) -> None:
    """End this process, and delete `folder`, as soon as the process that started it by `run_child` ends."""

    def end_after_input() -> None:
        # Not through sys.stdin: its lock would stay held in processes that are forked meanwhile.
        while os.read(STDIN, 1):
            pass
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=end_after_input, name="openm6-parent", daemon=True).start()
