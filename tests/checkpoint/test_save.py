"""A checkpoint is whole or not there: full disks, crashes and broken folders."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from openm6.checkpoint.folder import latest, list_checkpoints, prune, read_state
from openm6.checkpoint.load import load_model
from openm6.checkpoint.save import Snapshot, save
from openm6.core.errors import CheckpointError
from openm6.core.log import get_log


def network(width: int = 64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(width, width)


def snapshot(step: int, width: int = 64) -> Snapshot:
    model = network(width, seed=step)
    return Snapshot(step, model, {"weight::momentum": torch.ones(3)}, {"note": "étape"}, files={"model.json": "{}"})


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """The system refuses to let any file of this process grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_saved(tmp_path: Path) -> None:
    folder = save(snapshot(3), tmp_path / "checkpoints", keep=2)
    assert folder == tmp_path / "checkpoints/step-3"
    names = {"model.safetensors", "optimizer.safetensors", "model.json", "state.json"}
    assert {path.name for path in folder.iterdir()} == names
    state = read_state(folder)
    assert (state["step"], state["note"], state["format"]) == (3, "étape", 1)
    assert state["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size


def test_the_last_k_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 11, 100):
        save(snapshot(step), tmp_path, keep=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-11", "step-100"]
    assert latest(tmp_path).name == "step-100"


def test_a_save_that_the_system_refuses_leaves_no_trace(tmp_path: Path) -> None:
    save(snapshot(1), tmp_path, keep=2)
    before = everything_in(tmp_path)
    with (
        files_at_most(1000),
        pytest.raises(CheckpointError, match="step-2 could not be written .*File too large"),
    ):
        save(snapshot(2), tmp_path, keep=2)
    assert everything_in(tmp_path) == before
    load_model(latest(tmp_path), network())


def test_a_state_that_does_not_fit_leaves_no_trace(tmp_path: Path) -> None:
    """The weights fit, the last and smallest file does not: the checkpoint still must not appear."""
    small = Snapshot(2, nn.Linear(1, 1), {}, {"long": "x" * 5000})
    with files_at_most(2000), pytest.raises(CheckpointError, match="earlier checkpoints are intact"):
        save(small, tmp_path, keep=2)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs rights that this user lacks")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_earlier_checkpoints_stay(tiny_disk: Path) -> None:
    save(snapshot(1), tiny_disk, keep=3)
    save(snapshot(2), tiny_disk, keep=3)
    before = everything_in(tiny_disk)
    with pytest.raises(CheckpointError, match=r"step-3 could not be written .*No space left.*free some space"):
        save(snapshot(3, width=100), tiny_disk, keep=3)
    assert everything_in(tiny_disk) == before
    assert latest(tiny_disk).name == "step-2"


def test_leftovers_of_a_killed_save_are_cleared_away(tmp_path: Path) -> None:
    for name in (".step-7.partial", "step-2", "step-9"):  # the second was being removed, the last may be of use
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    save(snapshot(8), tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-8", "step-9"]


def test_an_old_checkpoint_that_stays_is_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    save(snapshot(1), tmp_path, keep=1)
    monkeypatch.setattr("openm6.checkpoint.folder.shutil.rmtree", refuse)
    with caplog.at_level("WARNING", logger=get_log().name):
        assert save(snapshot(2), tmp_path, keep=1) == latest(tmp_path) == tmp_path / "step-2"
    assert caplog.messages == [f"{tmp_path / 'step-1'} could not be removed (Permission denied): remove it by hand"]


def test_a_broken_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    folder = save(snapshot(5), tmp_path, keep=2)
    (folder / "state.json").write_text("{")
    save(snapshot(5), tmp_path, keep=2)
    assert read_state(latest(tmp_path))["step"] == 5


@pytest.mark.parametrize(
    "damage", ["no state", "state is half", "weights cut short", "file missing", "state is a list"]
)
def test_incomplete_checkpoints_are_passed_over(tmp_path: Path, damage: str) -> None:
    save(snapshot(1), tmp_path, keep=5)
    folder = save(snapshot(2), tmp_path, keep=5)
    state, weights = folder / "state.json", folder / "model.safetensors"
    match damage:
        case "no state":
            state.unlink()
        case "state is half":
            state.write_text(state.read_text()[:20])
        case "state is a list":
            state.write_text("[]")
        case "weights cut short":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "file missing":
            (folder / "model.json").unlink()
    assert latest(tmp_path).name == "step-1"
    with pytest.raises(CheckpointError, match="use an earlier step-N"):
        latest(folder)
    prune(tmp_path, keep=1)  # a broken one does not count among those to keep
    assert (tmp_path / "step-1").exists()


def test_a_run_a_folder_of_checkpoints_and_a_checkpoint_all_lead_there(tmp_path: Path) -> None:
    folder = save(snapshot(4), tmp_path / "run/checkpoints", keep=1)
    for path in (tmp_path / "run", tmp_path / "run/checkpoints", folder, str(folder)):
        assert latest(path) == folder


def test_nothing_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run or checkpoint at .*nowhere: check the path"):
        latest(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint yet: train it first"):
        latest(tmp_path)
