"""Plans by measured steps: the child process, what its metrics say, and the whole run by hand."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openm6.cli.trial_run import part_of, run_trial
from openm6.core.errors import ConfigError, TrainingError
from openm6.core.run_folder import RunFolder
from openm6.energy.meter import EnergyConfig
from openm6.evaluate.evaluator import EvalConfig
from openm6.evaluate.results import EvalReport
from openm6.evaluate.run import evaluate
from openm6.inference.load import LoadedModel
from openm6.plan.measured import (
    STEPS,
    TRIAL_FILE,
    WARMUP_STEPS,
    MeasuredSteps,
    TrialRun,
    caching_seconds,
    extrapolate,
    measured_steps,
    plan_measured,
    run_child,
    whole_evaluation,
)

CHILD = (
    "import os, sys, time; from pathlib import Path; from openm6.plan.measured import end_with_parent; "
    "Path(sys.argv[2]).mkdir(); end_with_parent(Path(sys.argv[2])); "
    "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
)
PARENT = "import sys; from openm6.plan.measured import run_child; run_child([sys.executable, '-c', *sys.argv[1:]], 60)"


def wait_for(what: str, found: Callable[[], object]) -> None:
    for _ in range(500):
        if found():
            return
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come within 10 s")


def is_gone(process: int) -> bool:
    """Whether a process has ended; one that nobody has reaped yet has."""
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return True
    return state.rpartition(")")[2].split()[0] == "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_its_parent(tmp_path: Path, ending: signal.Signals) -> None:
    reported, folder = tmp_path / "child", tmp_path / "folder"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(reported), str(folder)])
    wait_for("the child", lambda: reported.exists() and reported.read_text())
    child = int(reported.read_text())
    assert not is_gone(child) and folder.is_dir()
    os.kill(parent.pid, ending)
    parent.wait()
    wait_for("the child's end", lambda: is_gone(child))
    assert not folder.exists()


def test_what_a_child_prints_and_its_status() -> None:
    words = "from openm6.plan.measured import end_with_parent; end_with_parent(); print('yes'); raise SystemExit(3)"
    done = run_child([sys.executable, "-c", words], 60.0)
    assert (done.stdout, done.returncode) == ("yes\n", 3)
    with pytest.raises(subprocess.TimeoutExpired):
        run_child([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)


TRIAL = TrialRun(
    name="mine", machine="here", step_tokens=1000, parameters={"total": 2, "active": 1}, steps=1000, minutes=None,
    save_every=400, start_seconds=5.0, held_out_every=100, held_out_seconds=2.0, save_seconds=3.0,
    evaluations=[(0.05, 5.0), (0.25, 7.0)], report_seconds=1.0, memory_peak=700,
)  # fmt: skip
MEASURED = MeasuredSteps(count=31, seconds=0.5, joules=10.0, memory_peak=600, energy_source="estimate")


def test_a_whole_run_by_hand() -> None:
    plan = extrapolate(TRIAL, MEASURED, None, None, EnergyConfig(country="FRA", pue=1.0))
    assert plan["seconds"] == {
        "start": 5.0, "steps": 500.0, "held_out": 20.0, "checkpoints": 9.0, "evaluation": 15.5, "total": 549.5
    }  # fmt: skip
    assert plan["energy"]["joules"] == pytest.approx(20.0 * 544.5)
    assert plan["energy"]["joules_per_token"] == pytest.approx(20.0 * 544.5 / 1e6)
    assert plan["memory_peak_bytes"] == 700 and plan["tokens"] == 1e6


def test_an_evaluation_has_a_fixed_and_a_proportional_part() -> None:
    def seconds(fraction: float) -> tuple[float, float]:
        return fraction, 30.0 + 80.0 * fraction

    assert whole_evaluation([seconds(0.05), seconds(0.25)]) == pytest.approx(110.0)
    assert whole_evaluation([seconds(1.0)]) == 110.0
    # Noise makes no evaluation of more records faster.
    assert whole_evaluation([(0.05, 31.0), (0.25, 30.0)]) == 30.0
    without = TRIAL.model_copy(update={"evaluations": []})
    assert extrapolate(without, MEASURED, None, None, EnergyConfig())["seconds"]["evaluation"] == 1.0


def test_parts_of_an_evaluation() -> None:
    part = part_of(EvalConfig(records=160, answers=120, drawn=19), 4)
    assert (part.records, part.answers, part.drawn) == (40, 30, 5)
    assert part_of(EvalConfig(records=10, answers=20), 20).records == 2


def test_the_length_of_a_run() -> None:
    def steps(trial: TrialRun, tokens: float | None = None, days: float | None = None) -> int:
        return extrapolate(trial, MEASURED, tokens, days, EnergyConfig())["steps"]

    by_minutes = TRIAL.model_copy(update={"steps": None, "minutes": 10.0})
    assert steps(TRIAL, tokens=5e4) == 50 and steps(TRIAL, days=0.5 / 86_400 * 7.5) == 7
    beside = 2 / 100 + 3 / 400  # held-out losses and saves
    assert steps(by_minutes) == int(0.96 * 600 / (0.5 + beside))
    slower = replace(MEASURED, seconds=1.0)
    assert extrapolate(by_minutes, slower, None, None, EnergyConfig())["steps"] == int(576 / (1.0 + beside))


def test_steps_of_the_warm_up_do_not_count(tmp_path: Path) -> None:
    run, seconds = RunFolder.open(tmp_path), 0.0
    lines = []
    for step in range(1, WARMUP_STEPS + 6):
        seconds += 9.0 if step <= WARMUP_STEPS else 0.5
        line = {
            "step": step,
            "seconds": seconds,
            "seconds_beside": 3 * seconds,  # of held-out losses and saves, whose joules are not those of steps
            "joules": 8 * seconds,
            "energy_source": "nvml",
            "memory_peak": step,
        }
        lines.append(json.dumps(line) + "\n")
    run.metrics.write_text("".join(lines))
    assert measured_steps(run) == MeasuredSteps(4, 0.5, 1.0, WARMUP_STEPS + 5, "nvml")


def test_a_trial_that_fails_reports_its_sentence() -> None:
    failing = [sys.executable, "-c", "import sys; sys.exit('error: no data at /nowhere')"]
    with pytest.raises(TrainingError, match="the trial run failed: no data at /nowhere"):
        plan_measured(failing, None, None, {})
    with pytest.raises(ConfigError, match="tokens=-1 must be above 0"):
        plan_measured(failing, -1.0, None, {})


@pytest.mark.parametrize("changes", [[], ["loop.offload={num_gpu_layers: 0}", "eval.at_end=true"]])
def test_a_trial_trains_saves_and_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str]
) -> None:
    answers: list[int] = []

    def evaluate_part(*words: Any, loaded: LoadedModel, **named: Any) -> EvalReport:
        answers.append(loaded.description.eval["answers"])
        return evaluate(*words, loaded=loaded, **named)

    monkeypatch.setattr("openm6.train.multimodal.evaluate", evaluate_part)
    small = [
        "model.overrides={hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 16}",
        "mixture=[{source: penguins, task: tabular_classification}]",
        "modalities.text.vocab_size=320", "loop.num_processes=1",
        "packing={batch_size: 2, seq_len: 128}", "eval={records: 20, answers: 20, samples: 1, num_processes: 1}",
        "loop.held_out={every: 100, batches: 1}",
    ]  # fmt: skip
    run_trial(tmp_path, "demo", [*small, *changes])
    run = RunFolder(tmp_path)
    trial, steps = TrialRun.model_validate_json((run.path / TRIAL_FILE).read_text()), measured_steps(run)
    assert steps.count == STEPS - WARMUP_STEPS - 1 and steps.seconds > 0
    assert trial.minutes == 5.9 and trial.steps is None and trial.step_tokens == 256
    assert trial.cached_batches == STEPS + 3 and trial.cores >= 1 and trial.cache_uses
    assert trial.save_seconds and trial.held_out_seconds and trial.report_seconds > 0
    assert [fraction for fraction, _ in trial.evaluations] == [0.05, 0.25]
    assert answers == [1, 5]
    assert all(seconds > 0 for _, seconds in trial.evaluations)
    assert (tmp_path / "report.json").is_file()


def test_seconds_of_first_codes_follow_from_the_hits_of_the_trial() -> None:
    """Lookups drawn at random from 300 entries: those of 60 batches foretell the misses of 400."""
    rng = random.Random(0)
    per_batch, trial_batches, steps, cost = 10, 60, 400, 0.004
    seen: set[int] = set()
    misses = []
    for _ in range(steps):
        drawn = [rng.randrange(300) for _ in range(per_batch)]
        misses.append(len(set(drawn) - seen))
        seen |= set(drawn)
    uses = [(per_batch * trial_batches, sum(misses[:trial_batches]), cost * sum(misses[:trial_batches])), (50, 0, 0.0)]
    trial = TRIAL.model_copy(update={"cache_uses": uses, "cached_batches": trial_batches, "cores": 2})
    assert caching_seconds(trial, steps) == pytest.approx(cost * sum(misses) / steps / 2, rel=0.1)
    assert caching_seconds(trial, 10 * steps) == pytest.approx(cost * 300 / (10 * steps) / 2, rel=0.1)


def test_lookups_that_never_hit_cost_as_much_in_every_step() -> None:
    trial = TRIAL.model_copy(update={"cache_uses": [(100, 100, 2.0)], "cached_batches": 10})
    assert caching_seconds(trial, 5) == caching_seconds(trial, 5000) == pytest.approx(0.2)


def test_a_run_of_minutes_has_fewer_steps_while_caches_fill() -> None:
    steps = MeasuredSteps(30, 0.1, 1.0, None, "estimate")
    trial = TRIAL.model_copy(
        update={"steps": None, "minutes": 1.0, "cache_uses": [(100, 100, 1.0)], "cached_batches": 10,
                "held_out_seconds": 0.0, "save_seconds": 0.0}
    )  # fmt: skip
    plan = extrapolate(trial, steps, None, None, EnergyConfig())
    assert plan["step_seconds"] == pytest.approx(0.2) and plan["step_joules"] == pytest.approx(2.0)
    assert plan["steps"] == int(0.96 * 60 / 0.2) and plan["seconds"]["steps"] == pytest.approx(0.96 * 60, rel=0.01)
