"""The loop: exact resuming, signals, skipped steps, and a length that is measured once."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from openm6.checkpoint.folder import latest, list_checkpoints, read_state
from openm6.core.errors import CheckpointError, Interrupted, TrainingError
from openm6.core.run_folder import RunFolder
from openm6.distributed.process_group import ProcessGroupContext
from openm6.optim.config import ScheduleConfig, decay_start
from openm6.train.config import LoopConfig
from openm6.train.loop import RunLength, TrainResult, train
from openm6.train.step import TrainStep
from openm6.train.training_task import StepResult
from tests.forked import Program
from tests.train.toy_training import ToyBatch, ToyTraining, assert_same_run, main, toy_config
from tests.train.workers_training import Part, WorkersTraining, workers_config


class CrashingTraining(ToyTraining):
    """Dies in the middle of a step, as a machine might."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.crash_step = step

    def loss(self, batch: ToyBatch) -> StepResult:
        if batch.index + 1 == self.crash_step:
            raise OSError("the lights went out")
        return super().loss(batch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs of 40 steps that nothing disturbed, by optimizer."""

    @cache
    def run(optimizer: str) -> Path:
        folder = tmp_path_factory.mktemp(optimizer)
        train(ToyTraining(), toy_config(optimizer), RunFolder.open(folder))
        return folder

    return run


@pytest.fixture(scope="module")
def unbroken(whole: Callable[[str], Path]) -> Path:
    return whole("adamw")


def test_training_learns_and_logs(unbroken: Path) -> None:
    lines = RunFolder(unbroken).read_metrics()
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert steps[-1]["tokens"] == 40 * 16 and steps[0]["seen"] == 1.0
    assert len(steps[0]["expert_load_cv"]) == 1 and steps[0]["dropped"] == [0.25]
    assert [line["step"] for line in lines if "evaluation" in line] == [9, 18, 27, 36, 40]
    assert 0 < steps[-1]["learning_rate"] < 0.1 * steps[1]["learning_rate"]


def test_the_last_checkpoints_are_kept(unbroken: Path) -> None:
    checkpoints = list_checkpoints(unbroken / "checkpoints")
    assert [folder.name for folder in checkpoints] == ["step-35", "step-40"]
    assert (checkpoints[-1] / "model.json").read_text() == '{"kind": "toy"}\n'


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("crash", [3, 22, 40])
def test_resumed_equals_unbroken(tmp_path: Path, whole: Callable[[str], Path], optimizer: str, crash: int) -> None:
    config, broken = toy_config(optimizer), RunFolder.open(tmp_path)
    with pytest.raises(OSError, match="lights"):
        train(CrashingTraining(crash), config, broken)
    train(ToyTraining(), config, broken, resume=True)
    assert_same_run(whole(optimizer), tmp_path)


def test_killed_at_a_random_step_and_resumed_equals_unbroken(tmp_path: Path, unbroken: Path) -> None:
    """The kill falls at another moment in each run of the test; whichever it is, the end is the same."""
    rng = random.SystemRandom()  # the usual generator was seeded by the runs of other tests
    step, deadline = rng.choice([5, 10, 15, 20]), time.monotonic() + 60
    # Slow enough to be hit in the middle.
    with Program(tmp_path.with_name("errors"), main, str(tmp_path), 0.05) as program:
        while not any(line["step"] >= step for line in RunFolder(tmp_path).read_metrics()):
            assert program.process.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        program.process.kill()
        assert program.ended()[0] == -signal.SIGKILL
    # The kill may fall before the first checkpoint: then there is nothing to go on from, and the run begins again.
    assert not (tmp_path / "checkpoints" / "step-40").exists()
    train(ToyTraining(), toy_config(), RunFolder(tmp_path), resume=True)
    assert_same_run(unbroken, tmp_path)


class StoppedTraining(ToyTraining):
    """Gets signals within one step, as from a cluster that wants its machine back or an impatient person."""

    def __init__(self, step: int, *words: signal.Signals) -> None:
        super().__init__()
        self.stop_step, self.words = step, words

    def loss(self, batch: ToyBatch) -> StepResult:
        if batch.index + 1 == self.stop_step:
            for word in self.words:
                os.kill(os.getpid(), word)
        return super().loss(batch)


def test_sigterm_saves_too(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"stopped at step 12, saved as .*step-12: go on with --resume"):
        train(StoppedTraining(12, signal.SIGTERM), toy_config(), RunFolder.open(tmp_path))
    assert latest(tmp_path).name == "step-12"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("word", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_sigterm_or_sighup_changes_nothing(tmp_path: Path, word: signal.Signals) -> None:
    """`timeout` sends its signal twice, once to the process and once to its group."""
    with pytest.raises(Interrupted, match="stopped at step 12") as stop:
        train(StoppedTraining(12, signal.SIGTERM, word), toy_config(), RunFolder.open(tmp_path))
    assert stop.value.exit_code == 128 + signal.SIGTERM


@pytest.mark.parametrize("word", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_after_another_stop_ends_at_once(tmp_path: Path, word: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt) as stop:
        train(StoppedTraining(12, word, signal.SIGINT), toy_config(), RunFolder.open(tmp_path))
    assert not isinstance(stop.value, Interrupted)
    assert latest(tmp_path).name == "step-7"


def test_a_run_that_was_started_to_outlive_its_terminal_does(tmp_path: Path) -> None:
    """`nohup` has SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = train(StoppedTraining(5, signal.SIGHUP), toy_config(steps=6), RunFolder.open(tmp_path))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.steps == 6


def test_a_stop_in_the_last_step_lets_the_run_finish(tmp_path: Path) -> None:
    training = StoppedTraining(40, signal.SIGTERM)
    train(training, toy_config(), RunFolder.open(tmp_path))
    assert training.finished == [tmp_path]


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    training = ToyTraining(spoilt=(4, 5, 9))
    result = train(training, toy_config(steps=12), RunFolder.open(tmp_path))
    assert result.non_finite == 3 and training.applied == 9
    assert all(torch.isfinite(parameter).all() for parameter in training.model.parameters())
    lines = [line for line in RunFolder(tmp_path).read_metrics() if "loss" in line]
    assert [line["non_finite"] for line in lines] == [2, 3, 3]
    assert all(line["loss"] is not None for line in lines)


def test_a_skipped_step_leaves_weights_and_moments_alone(tmp_path: Path) -> None:
    """A run whose step 6 is spoilt ends like one that never took it: only the data went on."""
    spoilt, plain = ToyTraining(spoilt=(6,)), ToyTraining()
    train(spoilt, toy_config(steps=6, save_every=5), RunFolder.open(tmp_path / "spoilt"))
    folders = [tmp_path / "spoilt/checkpoints" / name for name in ("step-5", "step-6")]
    for name in ("optimizer.safetensors", "training.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    train(plain, toy_config(steps=6), RunFolder.open(tmp_path / "plain"))
    assert not torch.equal(plain.model[0].weight, spoilt.model[0].weight)


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    config = toy_config().model_copy(update={"max_non_finite": 3})
    with pytest.raises(TrainingError, match=r"4 steps up to step 13: lower loop\.optimizer\.learning_rate"):
        train(ToyTraining(spoilt=tuple(range(10, 40))), config, RunFolder.open(tmp_path))


def test_an_existing_run_is_not_overwritten(tmp_path: Path, unbroken: Path) -> None:
    with pytest.raises(TrainingError, match="already holds a run: add --resume"):
        train(ToyTraining(), toy_config(), RunFolder(unbroken))


def test_resuming_nothing_starts_from_the_beginning(tmp_path: Path, unbroken: Path) -> None:
    train(ToyTraining(), toy_config(), RunFolder.open(tmp_path), resume=True)
    assert_same_run(unbroken, tmp_path)


def test_resuming_a_finished_run_finishes_again(tmp_path: Path) -> None:
    config = toy_config(steps=6)
    first = train(ToyTraining(), config, RunFolder.open(tmp_path))
    training = ToyTraining()
    second = train(training, config, RunFolder(tmp_path), resume=True)
    assert training.finished == [tmp_path] and training.applied == 6
    assert isinstance(second, TrainResult) and second.checkpoint == first.checkpoint
    assert second.scores == first.scores != {}


def test_ranks_that_see_different_checkpoints_are_refused(
    tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ToyTraining()
    monkeypatch.setattr(ProcessGroupContext, "gather", lambda _, name: [name, "step-35"])
    with pytest.raises(CheckpointError, match=r"rank 1 sees step-35 in .*, rank 0 step-40: the run's folder must be"):
        train(training, toy_config(), RunFolder(unbroken), resume=True)
    with pytest.raises(CheckpointError, match="rank 1 sees step-35 in .*, rank 0 no checkpoint: "):
        train(training, toy_config(), RunFolder.open(tmp_path))


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    train(ToyTraining(), toy_config(steps=6), RunFolder.open(tmp_path))
    with pytest.raises(CheckpointError, match=r"trained with adamw, not muon: set loop\.optimizer\.name back"):
        train(ToyTraining(), toy_config("muon"), RunFolder(tmp_path), resume=True)


def test_a_broken_checkpoint_is_passed_over(tmp_path: Path, unbroken: Path) -> None:
    run = RunFolder.open(tmp_path)
    with pytest.raises(OSError, match="lights"):
        train(CrashingTraining(30), toy_config(), run)
    weights = tmp_path / "checkpoints/step-28/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert latest(tmp_path).name == "step-21"
    train(ToyTraining(), toy_config(), run, resume=True)
    assert_same_run(unbroken, tmp_path)


def test_a_failure_while_making_batches_is_raised_in_the_main_thread(tmp_path: Path) -> None:
    training = ToyTraining()
    stream = training.batches()
    training.batches = lambda: (next(stream) for _ in range(3))  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the data ended"):
        train(training, toy_config(), RunFolder.open(tmp_path))


def test_metrics_are_valid_json(unbroken: Path) -> None:
    for text in (unbroken / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def auto(minutes: float, decay_fraction: float = 0.2) -> LoopConfig:
    return LoopConfig(steps="auto", minutes=minutes, schedule=ScheduleConfig(decay_fraction=decay_fraction))


def run_clock(length: RunLength, seconds: list[float]) -> int:
    """The step at which the length became known, given each step's duration."""
    for step, spent in enumerate(seconds, start=1):
        length.observe(step, spent)
        if length.steps is not None:
            return step
    raise AssertionError("the length never became known")


def test_a_given_number_stands(tmp_path: Path) -> None:
    length = RunLength(LoopConfig(steps=12), RunFolder.open(tmp_path))
    length.observe(1, 100.0)
    assert length.steps == 12
    assert not length.reached(11) and length.reached(12)


def test_the_number_that_fits_is_measured_and_written_down(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path)
    run.write_config({"kind": "toy", "loop": {"steps": "auto", "minutes": 2.0, "seed": 7}})
    length = RunLength(auto(2.0), run)
    assert length.steps is None and not length.reached(1_000_000)
    known = run_clock(length, [4.0, 3.0] + [0.5] * 100)  # the first two are slow and must not count for the speed
    assert known == 84, "two fifths of the time must have passed"
    # 120 s, 96 % of it for steps, 48 s gone in 84 steps, 0.5 s each from here.
    assert length.steps == 84 + int((115.2 - 48) / 0.5)
    assert run.read_config() == {
        "kind": "toy",
        "loop": {"steps": length.steps, "minutes": 2.0, "seed": 7},
    }


@pytest.mark.parametrize(("before", "counted"), [(20.0, 20.0), (90.0, 78.0)])
def test_time_before_the_first_step_is_part_of_the_minutes_up_to_a_fraction(
    before: float, counted: float, tmp_path: Path
) -> None:
    length = RunLength(auto(2.0), RunFolder.open(tmp_path), before=before)
    known = run_clock(length, [0.5] * 100)
    assert length.steps == known + int((115.2 - counted - 0.5 * known) / 0.5)


class ClockedTraining(StoppedTraining):
    """On a clock of its own, steps take a second, evaluations three."""

    def __init__(self, patch: pytest.MonkeyPatch, *stop: Any) -> None:
        super().__init__(*stop)
        self.now = 0.0
        patch.setattr("openm6.train.loop.time", SimpleNamespace(perf_counter=lambda: self.now))

    def loss(self, batch: ToyBatch) -> StepResult:
        self.now += 1.0
        return super().loss(batch)

    def evaluate(self, step: int) -> dict[str, float]:
        self.now += 3.0
        return super().evaluate(step)


@pytest.mark.parametrize("stop", [0, 9])
def test_what_comes_beside_steps_is_part_of_the_minutes_also_of_a_resumed_run(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = auto(2.0).model_copy(update={"evaluate_every": 2, "tensorboard": False})
    first, run = ClockedTraining(monkeypatch, stop, signal.SIGTERM), RunFolder.open(tmp_path)
    first.seconds_before = 20.0
    if stop:
        with pytest.raises(Interrupted):
            train(first, config, run)
        assert run.read_config() == {}, "the length is not known yet"
    last = ClockedTraining(monkeypatch, 0) if stop else first
    result = train(last, config, run, resume=True)
    beside = read_state(latest(tmp_path))["progress"]["seconds_beside"]
    assert result.seconds == result.steps == pytest.approx((115.2 - 20) / 2.5, abs=2)
    assert 115 < result.seconds + beside < 120


def test_a_number_left_in_the_folder_is_not_taken_for_the_own_one(tmp_path: Path) -> None:
    """It may be of an older run, and rank 0 writes there while others read; a run that goes on has it in its recipe."""
    run = RunFolder.open(tmp_path)
    run.write_config({"loop": {"steps": 77}})
    assert RunLength(auto(2.0), run).steps is None


@pytest.mark.parametrize("seconds", [40.0, 70.0])
def test_very_slow_steps_still_end(tmp_path: Path, seconds: float) -> None:
    length = RunLength(auto(2.0), RunFolder.open(tmp_path))
    known = run_clock(length, [seconds] * 50)
    assert known == 3 and length.steps is not None and known <= length.steps <= 5


@pytest.mark.parametrize("decay_fraction", [0.0, 0.2, 0.5, 0.9])
def test_no_decay_had_to_start_before_the_length_was_known(tmp_path: Path, decay_fraction: float) -> None:
    config = auto(0.5, decay_fraction)
    length = RunLength(config, RunFolder.open(tmp_path))
    known = run_clock(length, [5.0] * 50)
    assert length.steps is not None
    assert decay_start(length.steps, config.schedule) >= known


@pytest.mark.parametrize("decay_fraction", [0.0, 0.5, 0.8, 0.9])
def test_a_long_decay_makes_a_run_no_longer(tmp_path: Path, decay_fraction: float) -> None:
    length = RunLength(auto(2.0, decay_fraction), RunFolder.open(tmp_path))
    run_clock(length, [0.5] * 300)
    assert length.steps == pytest.approx(115.2 / 0.5, abs=2)


def test_a_measured_run_repeats_exactly_as_a_given_one(tmp_path: Path) -> None:
    values = {
        **toy_config().model_dump(),
        "steps": "auto",
        "minutes": 0.02,
        "evaluate_every": None,
        "save_every": 9999,
    }
    config = LoopConfig.model_validate(values)
    measured = train(ToyTraining(), config, RunFolder.open(tmp_path / "measured"))
    steps = RunFolder(tmp_path / "measured").read_config()["loop"]["steps"]
    assert measured.steps == steps >= 5
    given = train(ToyTraining(), config.model_copy(update={"steps": steps}), RunFolder.open(tmp_path / "given"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (measured.checkpoint / name).read_bytes() == (given.checkpoint / name).read_bytes()


class AheadTraining(WorkersTraining):
    after_step_needs_loads_alone = True


@pytest.mark.parametrize("spoilt", [-1, 1, 4, 12])
def test_steps_whose_reports_come_late_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: int
) -> None:
    """As on a GPU: the device leaves out a step that is not finite; lines and checkpoints hold the same."""
    config = workers_config(1).model_copy(update={"evaluate_every": 9})
    train(AheadTraining(spoilt=spoilt), config, RunFolder.open(tmp_path / "waited"))
    monkeypatch.setattr("openm6.train.step.AHEAD", ("cpu",))
    late = []
    monkeypatch.setattr(TrainStep, "update", None)
    launched = TrainStep.update_ahead
    monkeypatch.setattr(TrainStep, "update_ahead", lambda *given: late.append(launched(*given)) or late[-1])
    with pytest.raises(Interrupted):
        train(Stopping(step=15, spoilt=spoilt), config, RunFolder.open(tmp_path / "late"))
    assert latest(tmp_path / "late").name == "step-15"
    train(AheadTraining(spoilt=spoilt), config, RunFolder.open(tmp_path / "late"), resume=True)
    # Steps 6, 9, 12, 15, 18 and 20 are waited for, as something acts on the run after them.
    assert sum(report is not None for report in late) == 20 - 6
    assert_same_run(tmp_path / "waited", tmp_path / "late")


def test_a_failure_names_its_step_although_the_report_before_is_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(AheadTraining):
        def loss(self, batch: Part) -> StepResult:
            if batch.cursor["next"] == 4:
                raise torch.OutOfMemoryError("full")
            return super().loss(batch)

    monkeypatch.setattr("openm6.train.step.AHEAD", ("cpu",))
    with pytest.raises(TrainingError, match="memory ran out in step 4: "):
        train(Full(), workers_config(1), RunFolder.open(tmp_path))


class Stopping(AheadTraining):
    """Gets a signal in the middle of a step."""

    def __init__(self, step: int, spoilt: int) -> None:
        super().__init__(spoilt=spoilt)
        self.step = step

    def loss(self, batch: Part) -> StepResult:
        if batch.cursor["next"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(batch)
