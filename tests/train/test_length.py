"""A run's length: given, written down before, or measured once from the time it may take."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm6.base.run_folder import RunFolder
from openm6.optim.config import ScheduleConfig
from openm6.optim.schedule import decay_start
from openm6.train.config import LoopConfig
from openm6.train.length import RunLength
from openm6.train.loop import train
from tests.train.toy_job import ToyJob, toy_config


def auto(minutes: float, decay_share: float = 0.2) -> LoopConfig:
    return LoopConfig(steps="auto", minutes=minutes, schedule=ScheduleConfig(decay_share=decay_share))


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
    known = run_clock(
        length, [4.0, 3.0] + [0.5] * 100
    )  # the first two are slow and must not count for the speed
    assert known == 84, "two fifths of the time must have passed"
    # 120 s, 96 % of it for steps, 48 s gone in 84 steps, 0.5 s each from here.
    assert length.steps == 84 + int((115.2 - 48) / 0.5)
    assert run.read_config() == {
        "kind": "toy",
        "loop": {"steps": length.steps, "minutes": 2.0, "seed": 7},
    }


def test_a_written_number_is_not_measured_again(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path)
    run.write_config({"loop": {"steps": 77}})
    assert RunLength(auto(2.0), run).steps == 77


@pytest.mark.parametrize("seconds", [40.0, 70.0])
def test_very_slow_steps_still_end(tmp_path: Path, seconds: float) -> None:
    length = RunLength(auto(2.0), RunFolder.open(tmp_path))
    known = run_clock(length, [seconds] * 50)
    assert known == 3 and length.steps is not None and known <= length.steps <= 5


@pytest.mark.parametrize("decay_share", [0.0, 0.2, 0.5, 0.9])
def test_no_decay_had_to_start_before_the_length_was_known(tmp_path: Path, decay_share: float) -> None:
    config = auto(0.5, decay_share)
    length = RunLength(config, RunFolder.open(tmp_path))
    known = run_clock(length, [5.0] * 50)
    assert length.steps is not None
    assert decay_start(length.steps, config.schedule) >= known


def test_a_measured_run_repeats_exactly_as_a_given_one(tmp_path: Path) -> None:
    values = {
        **toy_config().model_dump(),
        "steps": "auto",
        "minutes": 0.004,
        "evaluate_every": None,
        "save_every": 9999,
    }
    config = LoopConfig.model_validate(values)
    measured = train(ToyJob(), config, RunFolder.open(tmp_path / "measured"))
    steps = RunFolder(tmp_path / "measured").read_config()["loop"]["steps"]
    assert measured.steps == steps >= 5
    given = train(ToyJob(), config.model_copy(update={"steps": steps}), RunFolder.open(tmp_path / "given"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (measured.checkpoint / name).read_bytes() == (given.checkpoint / name).read_bytes()
