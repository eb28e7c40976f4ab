"""What else a machine does while it is measured."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
IDLE = (3, 4)  # columns of /proc/stat: idle, and waiting for a disk
GUESTS = (8, 9)  # already counted among user and nice


@dataclass(frozen=True)
class MachineLoad:
    """Seconds of processors since the machine started: at work, or taken by other guests of its host; and all."""

    busy: float
    all: float


def machine_load() -> MachineLoad | None:
    """The counters now; None where the system has none (only Linux tells)."""
    try:
        ticks = [int(word) for word in STAT.read_text().splitlines()[0].split()[1:]]
    except (OSError, ValueError, IndexError):
        return None
    counted = sum(count for column, count in enumerate(ticks) if column not in GUESTS)
    idle = sum(ticks[column] for column in IDLE)
    second = os.sysconf("SC_CLK_TCK")
    return MachineLoad((counted - idle) / second, counted / second)
