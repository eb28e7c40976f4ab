"""The hook that notes how much memory training took at most, to be held against the plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from openm6.train.hooks import Hook, Running

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what Linux reads there as: forget the peak, keep the rest (proc(5))


class MemoryHook(Hook):
    """Lines get `memory_start` (before the first step) and `memory_peak` (since then), in bytes.

    On a GPU both are of torch's allocator. On a processor they are of the whole process as Linux tells it, Python and
    libraries included; elsewhere nothing is told.
    """

    name = "memory"

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._start: int | None = None

    def start(self, run: Running) -> None:
        self._device = run.updater.device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        else:
            _forget_peak()
            self._start = process_memory("VmRSS")

    def totals(self) -> dict[str, Any]:
        if self._device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = process_memory("VmHWM")
        return {} if peak is None else {"memory_start": self._start, "memory_peak": peak}


def process_memory(key: str) -> int | None:
    """`VmRSS` (now) or `VmHWM` (the most so far) of this process in bytes; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


def _forget_peak() -> None:
    """What loading the data took is not training's peak. Where it may not be forgotten, it counts."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return
