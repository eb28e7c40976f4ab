"""GPUs of NVIDIA through NVML: the board's own energy counter, or its power over time where it has none."""

from __future__ import annotations

import os
import time
from typing import Any

import pynvml

from openm6.energy.counter import SILENCE, Counter, CounterDelta, CounterLostError, Source

MAX_WATTS = 4000.0  # of one board
MIG_PREFIX = "MIG-"


class NvmlCounter:
    """The counter of one board, in millijoules since the driver was loaded; Volta and newer have it."""

    source: Source = "nvml"

    def __init__(self, handle: Any, name: str) -> None:
        self.name = name
        self._handle = handle
        self._delta = CounterDelta(self._read(), time.monotonic(), MAX_WATTS, bridges_silence=True)

    def joules(self) -> float:
        try:
            return self._delta.observe(self._read(), time.monotonic())
        except pynvml.NVMLError as error:
            raise CounterLostError(str(error)) from None

    def close(self) -> None:
        pynvml.nvmlShutdown()  # NVML counts how often it was started

    def _read(self) -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000.0


class NvmlPower:
    """Power read now and then, times the time between: an estimate, since the draw between two reads is unknown."""

    source: Source = "estimate"

    def __init__(self, handle: Any, name: str) -> None:
        self.name = name
        self._handle = handle
        self._joules = 0.0
        self._watts, self._now = self._read(), time.monotonic()

    def joules(self) -> float:
        try:
            watts, now = self._read(), time.monotonic()
        except pynvml.NVMLError as error:
            raise CounterLostError(str(error)) from None
        if now - self._now <= SILENCE:
            self._joules += (watts + self._watts) / 2 * (now - self._now)
        self._watts, self._now = watts, now
        return self._joules

    def close(self) -> None:
        pynvml.nvmlShutdown()

    def _read(self) -> float:
        return float(pynvml.nvmlDeviceGetPowerUsage(self._handle)) / 1000.0


def open_gpus(numbers: tuple[int, ...] | None) -> tuple[list[Counter], list[str]]:
    """Counters of the GPUs that CUDA calls by these numbers (None: all visible), and a sentence for each without."""
    if numbers == ():
        return [], []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], [f"no GPU is counted: {error}"]
    counters: list[Counter] = []
    notes: list[str] = []
    try:
        handles = _visible_handles()
        for number in range(len(handles)) if numbers is None else numbers:
            if number >= len(handles):
                notes.append(f"GPU {number} is not counted: NVML does not show it")
                continue
            counter, note = _open(handles[number], number)
            counters += [counter] if counter else []
            notes += [note] if note else []
    except (pynvml.NVMLError, ValueError) as error:
        notes.append(f"GPUs are not counted in full: {error}")
    finally:
        pynvml.nvmlShutdown()
    return counters, notes


def _open(handle: Any, number: int) -> tuple[Counter | None, str]:
    """A counter that holds NVML open for itself, and a note about it, or none."""
    name = f"GPU {number} {_text(pynvml.nvmlDeviceGetName(handle))}"
    shared = "MIG is on: the whole card is counted, not its slice" if _is_sliced(handle) else ""
    for kind in (NvmlCounter, NvmlPower):
        pynvml.nvmlInit()
        try:
            return kind(handle, name), f"{name}: {shared}" if shared else ""
        except pynvml.NVMLError:
            pynvml.nvmlShutdown()
    return None, f"{name} is not counted: it reports neither energy nor power"


def _visible_handles() -> list[Any]:
    """Boards in CUDA's numbering; CUDA_VISIBLE_DEVICES holds numbers, UUIDs or their beginnings."""
    every = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return every
    uuids = [_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in every]
    chosen = []
    for word in (part.strip() for part in wanted.split(",") if part.strip()):
        if word.startswith(MIG_PREFIX):
            slice_ = pynvml.nvmlDeviceGetHandleByUUID(word)
            chosen.append(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(slice_))
        elif word.isdigit() and int(word) < len(every):
            chosen.append(every[int(word)])
        else:
            found = [handle for handle, uuid in zip(every, uuids, strict=True) if uuid.startswith(word)]
            if not found:
                break  # as CUDA does: what follows an unknown device is not visible
            chosen.append(found[0])
    return chosen


def _is_sliced(handle: Any) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError:
        return False


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
