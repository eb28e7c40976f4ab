"""The hook that notes how much memory training took at most, to be held against the plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from openm6.parallel.worker_pool import children
from openm6.train.hooks import Hook, Running

PROCESSES = Path("/proc")
RESET_PEAK = "5"  # what Linux reads there as: forget the peak, keep the rest (proc(5))


class MemoryHook(Hook):
    """Lines get `memory_start` (before the first step) and `memory_peak` (since then), in bytes.

    On a GPU both are of torch's allocator. On a processor they are of the run's processes as Linux tells them, Python
    and libraries included: of those that share the steps, what they do not share; elsewhere nothing is told.
    """

    name = "memory"

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._start: int | None = None
        self._inherited = (
            0  # bytes of its own that a forked process shares with this one until it writes there
        )

    def start(self, run: Running) -> None:
        self._device = run.updater.device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        else:
            forget_peak()
            self._start, self._inherited = process_memory("VmRSS"), process_memory("RssAnon") or 0

    def totals(self) -> dict[str, Any]:
        if self._device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = process_memory("VmHWM")
            if peak is not None:
                peak += sum(self._private(str(process)) for process in children())
        return {} if peak is None else {"memory_start": self._start, "memory_peak": peak}

    def _private(self, process: str) -> int:
        """The most that a forked process held of its own."""
        try:
            peak, shared, mapped = (
                process_memory(key, process) or 0 for key in ("VmHWM", "RssShmem", "RssFile")
            )
        except OSError:  # it has just ended
            return 0
        return max(0, peak - shared - mapped - self._inherited)


def process_memory(key: str, process: str = "self") -> int | None:
    """`VmRSS` (now) or `VmHWM` (the most so far) of a process in bytes; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    for line in (PROCESSES / process / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


def forget_peak() -> None:
    """What loading the data took is not training's peak. Where it may not be forgotten, it counts."""
    try:
        (PROCESSES / "self/clear_refs").write_text(RESET_PEAK)
    except OSError:
        return
