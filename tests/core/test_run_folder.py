"""One process at a time trains in a folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openm6.core.errors import TrainingError
from openm6.core.run_folder import RunFolder

fcntl = pytest.importorskip("fcntl")
HOLDER = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(1, flush=True); input()"
PARENT = """
import os, sys, time
from pathlib import Path
from openm6.core.run_folder import RunFolder
with RunFolder.open(Path(sys.argv[1])).lock():
    if not os.fork():
        print(os.getpid(), flush=True)  # here, so that the parent is not killed before the child has begun
        os.close(1)
    time.sleep(600)
"""


def test_a_folder_is_locked_until_the_end_of_a_training_and_files_are_free(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path)
    with run.lock():
        with pytest.raises(TrainingError, match="is being trained by another process: wait"), run.lock():
            pass
        run.write_config({"kind": "multimodal"})
        assert run.read_config() and [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    with pytest.raises(OSError, match="full"), run.lock():
        raise OSError("full")
    with run.lock():
        pass


def test_a_process_that_is_killed_leaves_no_lock(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path)
    with subprocess.Popen([sys.executable, "-S", "-c", HOLDER, tmp_path], stdin=-1, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(TrainingError), run.lock():
            pass
        holder.kill()
    with run.lock():
        pass


def test_a_process_that_is_killed_leaves_no_lock_to_its_workers(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, tmp_path], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        with pytest.raises(TrainingError), RunFolder.open(tmp_path).lock():
            pass
        parent.kill()
    try:
        with RunFolder.open(tmp_path).lock():
            os.kill(worker, 0)  # it still runs
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = RunFolder.open(tmp_path)
    with run.lock(), run.lock():
        pass
