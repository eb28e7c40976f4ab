"""GPUs of NVIDIA through NVML: the board's own energy counter, or its power over time if it has none."""

from __future__ import annotations

import os
from typing import Any

import pynvml

from openm6.energy.counter import Counter, EnergyRegister, PowerOverTime


class BoardEnergy(EnergyRegister):
    """The counter of one board since the driver was loaded; Volta and newer have it."""

    max_watts = 4000.0
    bridges_silence = True


def open_gpus(indices: tuple[int, ...] | None) -> tuple[list[Counter], list[str]]:
    """Counters of the GPUs of these indices in CUDA (None: all visible), and a sentence for each without."""
    if indices == ():
        return [], []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], [f"no GPU is counted: {error}"]
    counters: list[Counter] = []
    notes: list[str] = []
    try:
        handles = _visible_handles()
        for index in range(len(handles)) if indices is None else indices:
            if index >= len(handles):
                notes.append(f"GPU {index} is not counted: NVML does not show it")
                continue
            counter, note = _open(handles[index], index)
            counters += [counter] if counter else []
            notes += [note] if note else []
    except (pynvml.NVMLError, ValueError) as error:
        notes.append(f"GPUs are not counted in full: {error}")
    finally:
        pynvml.nvmlShutdown()
    return counters, notes


def _open(handle: Any, index: int) -> tuple[Counter | None, str]:
    """A counter that holds NVML open for itself, and a note about it, or none."""
    name = f"GPU {index} {pynvml.nvmlDeviceGetName(handle)}"

    def joules() -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0

    def watts() -> float:
        return float(pynvml.nvmlDeviceGetPowerUsage(handle)) / 1000.0

    errors = (pynvml.NVMLError,)
    for open_one in (
        lambda: BoardEnergy(name, "nvml", joules, errors, pynvml.nvmlShutdown),
        lambda: PowerOverTime(name, "estimate", watts, errors, pynvml.nvmlShutdown),
    ):
        # NVML counts how often it was started.
        pynvml.nvmlInit()
        try:
            shared = f"{name}: MIG is on: the whole card is counted, not its slice" if _has_mig(handle) else ""
            return open_one(), shared
        except pynvml.NVMLError:
            pynvml.nvmlShutdown()
    return None, f"{name} is not counted: it reports neither energy nor power"


def _visible_handles() -> list[Any]:
    """Boards in CUDA's order; CUDA_VISIBLE_DEVICES holds indices, UUIDs or their beginnings."""
    every = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return every
    uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in every]
    chosen = []
    for word in (part.strip() for part in visible.split(",") if part.strip()):
        if word.startswith("MIG-"):
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


def _has_mig(handle: Any) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError:
        return False
