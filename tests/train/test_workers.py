"""Processes that share a step: the same training as one, exact resuming, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from openm6.checkpoint.folder import latest
from openm6.core.errors import ConfigError, DataError, TrainingError
from openm6.core.run_folder import RunFolder
from openm6.train.loop import train
from openm6.train.step import TrainStep
from openm6.train.workers import Workers, number_of_workers, possible_workers
from tests.forked import Program
from tests.train.toy_training import ToyTraining, assert_same_run, toy_config, untimed
from tests.train.workers_training import WorkersTraining, main, workers_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")


@pytest.mark.parametrize(("optimizer", "workers"), [("adamw", 2), ("muon", 3)])
def test_workers_train_as_one_process_does(tmp_path: Path, optimizer: str, workers: int) -> None:
    alone, together = WorkersTraining(), WorkersTraining()
    train(alone, workers_config(1, optimizer), RunFolder.open(tmp_path / "alone"))
    train(together, workers_config(workers, optimizer), RunFolder.open(tmp_path / "together"))
    for (name, one), other in zip(alone.model.named_parameters(), together.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
    assert torch.equal(alone.loads, together.loads)
    for one, other in zip(untimed(tmp_path / "alone"), untimed(tmp_path / "together"), strict=True):
        assert one["tokens"] == other["tokens"] and one["expert_load_cv"] == pytest.approx(
            other["expert_load_cv"], rel=1e-5
        )
        for name in ("loss", "grad_norm", "loss/toy"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


@pytest.mark.parametrize("moments", ["as weights", "bf16"])
def test_a_run_resumed_equals_one_unbroken(tmp_path: Path, moments: str) -> None:
    config = workers_config(2)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"moments": moments})})
    train(WorkersTraining(), config, RunFolder.open(tmp_path / "whole"))
    with pytest.raises(TrainingError, match=r"a worker process ended with code 7 .*loop\.num_processes=1"):
        train(WorkersTraining(dies=15), config, RunFolder.open(tmp_path / "broken"))
    assert latest(tmp_path / "broken").name == "step-12"
    train(WorkersTraining(), config, RunFolder.open(tmp_path / "broken"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def children_of(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(word) for word in text.split()]


def wait_until_gone(processes: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        alive = [number for number in processes if Path(f"/proc/{number}").exists()]
        if not [n for n in alive if ") Z" not in Path(f"/proc/{n}/stat").read_text()]:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Unbroken runs by their number of workers."""
    folders = {workers: tmp_path_factory.mktemp(f"whole-{workers}") for workers in (1, 2)}
    for workers, folder in folders.items():
        train(WorkersTraining(), workers_config(workers), RunFolder.open(folder))
    return folders


@contextmanager
def started(folder: Path, workers: int) -> Iterator[Program]:
    """A run as the leader of a process group, a few steps old."""
    with Program(folder.with_name(f"{folder.name}-errors"), main, str(folder), workers) as program:
        deadline = time.monotonic() + 60
        while len(untimed(folder)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        yield program


def test_a_killed_run_leaves_no_process_behind_and_resumes_exactly(tmp_path: Path, whole: dict[int, Path]) -> None:
    with started(tmp_path, workers=2) as program:
        others = children_of(program.pid)
        assert len(others) == 2, "one worker and the process that makes batches"
        program.process.kill()
        assert program.ended()[0] == -signal.SIGKILL
        assert wait_until_gone(others)
    train(WorkersTraining(), workers_config(2), RunFolder(tmp_path), resume=True)
    assert_same_run(whole[2], tmp_path)


@pytest.mark.parametrize(
    ("word", "code", "workers"),
    [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 2), (signal.SIGHUP, 129, 1)],
)
def test_a_signal_to_the_whole_group_saves_and_resumes_exactly(
    tmp_path: Path, whole: dict[int, Path], word: signal.Signals, code: int, workers: int
) -> None:
    """A terminal sends it so, as do `timeout` (twice), Slurm and containers."""
    if word == signal.SIGHUP and signal.getsignal(word) == signal.SIG_IGN:
        pytest.skip("these tests run under nohup, which runs obey")
    with started(tmp_path, workers) as program:
        others = children_of(program.pid)
        os.killpg(program.pid, word)
        if word == signal.SIGTERM:
            os.killpg(program.pid, word)
        found, errors = program.ended()
        assert found == code, errors
        assert wait_until_gone(others)
    saved = latest(tmp_path)
    assert errors.splitlines()[-1] == (f"stopped at step {saved.name[5:]}, saved as {saved}: go on with --resume")
    assert "Traceback" not in errors and errors.count("stopping after this step") == 1
    train(WorkersTraining(), workers_config(workers), RunFolder(tmp_path), resume=True)
    assert_same_run(whole[workers], tmp_path)


def test_a_step_that_is_not_finite_in_one_part_is_skipped_by_all(tmp_path: Path) -> None:
    training = WorkersTraining(spoilt=4)
    result = train(training, workers_config(3, steps=6), RunFolder.open(tmp_path))
    assert result.non_finite == 1 and all(torch.isfinite(p).all() for p in training.model.parameters())
    assert training.loads.sum() == 5 * 11


def test_broken_data_is_reported_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the disk is gone: mount it again"):
        train(WorkersTraining(broken_at=4), workers_config(2), RunFolder.open(tmp_path))


def test_too_many_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loop\.num_processes=9 .* at most 4 parts: set loop\.num_processes to 4"):
        train(WorkersTraining(), workers_config(9), RunFolder.open(tmp_path))
    with pytest.raises(ConfigError, match=r"one process here: set loop\.num_processes to 1"):
        train(ToyTraining(), workers_config(2), RunFolder.open(tmp_path / "toy"))


def test_auto_is_settled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.open(tmp_path)
    monkeypatch.setattr("openm6.train.workers.usable_cores", lambda: 3)
    possible = possible_workers(WorkersTraining(), toy_config())
    assert number_of_workers(toy_config(), possible, run) == 3
    monkeypatch.setattr("openm6.train.workers.usable_cores", lambda: 16)
    assert number_of_workers(toy_config(), possible, run) == 3
    assert run.read_config()["loop"]["num_processes"] == 3
    possible = possible_workers(ToyTraining(), toy_config())
    assert number_of_workers(toy_config(), possible, RunFolder.open(tmp_path / "toy")) == 1


@pytest.mark.parametrize("way", ["thread", "daemon"])
def test_where_no_process_can_be_forked_one_trains_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr("openm6.train.workers.usable_cores", lambda: 2)
    config = workers_config("auto", steps=2)
    if way == "daemon":
        monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
        assert train(WorkersTraining(), config, RunFolder.open(tmp_path)).steps == 2
        return
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, WorkersTraining(), config, RunFolder.open(tmp_path)).result().steps == 2


def test_a_run_that_goes_on_on_a_gpu_does_so_in_one_process(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = WorkersTraining()
    monkeypatch.setattr(training.model, "parameters", lambda: [SimpleNamespace(is_cpu=False, is_meta=False)])
    with caplog.at_level("INFO", logger="openm6"):
        possible = possible_workers(training, workers_config(2))
    assert number_of_workers(workers_config(2), possible, RunFolder(Path("none"))) == 1
    assert "loop.num_processes=2 is for a CPU" in caplog.text


def test_a_number_that_is_refused_is_not_written(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path)
    train(WorkersTraining(), workers_config(1, steps=6), run, settings={"loop": {"num_processes": 1}})
    with pytest.raises(ConfigError, match=r"num_processes=9 is too many"):
        train(WorkersTraining(), workers_config(9), run, resume=True, settings={"loop": {"num_processes": 9}})
    assert run.read_config() == {"loop": {"num_processes": 1}}


def test_parameters_have_owners_evenly() -> None:
    training = ToyTraining()
    training.model = torch.nn.ParameterList(torch.zeros(size) for size in (5, 1, 4, 2, 3))
    with closing(Workers(training, TrainStep(training, toy_config()), toy_config(), 2)) as workers:
        assert workers.owner == [0, 0, 1, 0, 1]
