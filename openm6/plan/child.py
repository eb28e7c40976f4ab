"""A process that ends with the one that started it, however that one ends; a killed process cannot see to it itself."""

from __future__ import annotations

import os
import subprocess
import threading

INPUT = 0  # the number of the standard input


def run_child(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Runs a command that calls `end_with_parent` when it starts; gives what it printed.

    Its standard input is a pipe of which this process alone holds the other end, so the system closes it when this
    process is gone, on any system and for any reason.

    Raises:
        subprocess.TimeoutExpired: it took longer, and was killed.
    """
    reader, writer = os.pipe()
    try:
        return subprocess.run(
            command, stdin=reader, capture_output=True, text=True, check=False, timeout=seconds
        )
    finally:
        os.close(reader)
        os.close(writer)


def end_with_parent() -> None:
    """From now on this process ends when the one that ran it by `run_child` does."""
    threading.Thread(target=_end_after_input, name="openm6-parent", daemon=True).start()


def _end_after_input() -> None:
    # Not through sys.stdin: its lock would be held for ever in processes that are forked meanwhile.
    while os.read(INPUT, 1):
        pass
    os._exit(1)
