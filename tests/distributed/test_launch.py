"""Failures of a rank: all stop, one sentence names the cause, and a restart goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm6.core.errors import TrainingError
from openm6.distributed.launch import launch


def fail(way: str, folder: Path, capfd: pytest.CaptureFixture[str], restarts: int = 0) -> list[str]:
    """The lines on standard error of a run that fails."""
    with pytest.raises(TrainingError):
        launch([way, str(folder)], 2, restarts, module="tests.distributed.failing_run")
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        ("memory", "error: rank 1 of 2: out of memory: lower packing.batch_size"),
        ("hang", "waited 10 s for another rank in vain"),
        ("end", "error: the report could not be written"),  # others wait for rank 0 as long as that takes
    ],
)
def test_rank_0_tells_the_cause_once(
    way: str, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = fail(way, tmp_path, capfd)
    assert len(lines) == 1 and sentence in lines[0], lines
    assert list(tmp_path.iterdir()) == []


def test_a_killed_rank_restarts_all(tmp_path: Path) -> None:
    launch(["killed", str(tmp_path)], 2, max_restarts=1, module="tests.distributed.failing_run")
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["1", "1"]
