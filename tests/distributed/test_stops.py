"""A run of two ranks that a signal stops: it saves once, says so, and goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from openm6.checkpoint.folder import latest, step_of
from openm6.core.run_folder import RunFolder
from tests.distributed.recording_training import run_steps
from tests.forked import Program, command_line
from tests.train.tiny_recipe import tiny_recipe, write_recipe

STEPS = 20


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in RunFolder(folder).read_metrics() if "loss" in line}


def recipe_file(folder: Path) -> str:
    recipe = tiny_recipe(steps=STEPS, save_every=STEPS, num_processes=1)
    recipe["packing"] = {"batch_size": 2, "seq_len": 160, "num_shards": 2}
    return write_recipe(folder, recipe)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    run_steps(recipe_file(folder), str(folder / "run"), (1, 1, 1), 1, None)
    return losses(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("word", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_group_saves_and_resumes(
    tmp_path: Path, word: signal.Signals, code: int, unbroken: dict[int, float]
) -> None:
    path, folder = recipe_file(tmp_path), tmp_path / "run"
    words = ("train", path, "--nproc", "2", "--out", str(folder))
    with Program(tmp_path / "errors", command_line, *words) as program:
        deadline = time.monotonic() + 240
        while len(losses(folder)) < 3 and time.monotonic() < deadline and program.process.is_alive():
            time.sleep(0.01)
        os.killpg(program.pid, word)
        found, errors = program.ended(120)
    assert found == code, errors
    step = step_of(latest(folder))
    assert 3 <= step < STEPS
    assert errors.count(f"stopped at step {step}, saved as") == 1 and "Traceback" not in errors
    run_steps(path, str(folder), (1, 1, 1), step + 1, None)
    assert losses(folder) == pytest.approx(unbroken, rel=1e-4)
