"""Failures of a rank: all stop, and one sentence names the cause; `test_kills.py` has restarts."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import pytest

from openm6.core.errors import TrainingError
from openm6.distributed.launch import launch
from tests.distributed.failing_run import PATIENCE, as_rank
from tests.forked import Program


def errors_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


def test_the_launcher_ends_all_and_rank_0_tells_the_cause_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingError, match="rank . of 2 failed with exit code 1"):
        launch(["memory", str(tmp_path)], 2, module="tests.distributed.failing_run")
    lines = errors_of(capfd.readouterr().err)
    assert len(lines) == 1 and "error: rank 1 of 2: out of memory: lower packing.batch_size" in lines[0], lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        ("hang", f"waited {PATIENCE:g} s for another rank in vain"),
        ("end", "error: the report could not be written"),  # others wait for rank 0 as long as that takes
    ],
)
def test_rank_0_tells_the_cause_once(way: str, sentence: str, tmp_path: Path) -> None:
    with closing(socket.create_server(("localhost", 0))) as found:
        port = found.getsockname()[1]
    (tmp_path / "run").mkdir()
    first, second = (
        Program(tmp_path / f"errors-{rank}", as_rank, rank, port, way, str(tmp_path / "run")) for rank in range(2)
    )
    with first, second:  # what the launcher does to rank 1 when rank 0 has ended, the end of this block does
        code, text = first.ended()
        if way == "end":
            second_code, second_text = second.ended()
            assert second_code == 1 and errors_of(second_text) == []
    lines = errors_of(text)
    assert code == 1 and len(lines) == 1 and sentence in lines[0], lines
    assert list((tmp_path / "run").iterdir()) == []
