"""A child ends when its parent does, killed or asked to end, and otherwise runs as any command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from openm6.plan.child import run_child

CHILD = (
    "import os, sys, time; from openm6.plan.child import end_with_parent; end_with_parent(); "
    "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
)
PARENT = "import sys; from openm6.plan.child import run_child; run_child([sys.executable, '-c', *sys.argv[1:]], 60)"


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
    told = tmp_path / "child"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(told)])
    wait_for("the child", lambda: told.exists() and told.read_text())
    child = int(told.read_text())
    assert not is_gone(child)
    os.kill(parent.pid, ending)
    parent.wait()
    wait_for("the child's end", lambda: is_gone(child))


def test_what_a_child_prints_and_its_status() -> None:
    words = (
        "from openm6.plan.child import end_with_parent; end_with_parent(); print('yes'); raise SystemExit(3)"
    )
    done = run_child([sys.executable, "-c", words], 60.0)
    assert (done.stdout, done.returncode) == ("yes\n", 3)
    with pytest.raises(subprocess.TimeoutExpired):
        run_child([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
