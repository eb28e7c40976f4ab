"""How this process was started, alone or as one of several, and what follows: its device and its ranks."""

from __future__ import annotations

import importlib
import os

import torch

from openm6.parallel.ranks import Ranks


def launched() -> bool:
    """Whether torchrun, or a launcher like it, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether the launcher started this process again after a failure of any rank."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def own_device() -> torch.device:
    """The device of this process: a GPU for each process of a machine, where there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def open_ranks(device: torch.device, timeout_seconds: float) -> Ranks:
    """The ranks of this run: this process alone, or those that the launcher started."""
    if not launched():
        return Ranks()
    # torch's distributed tensors take seconds to import: a process alone is spared them.
    return importlib.import_module("openm6.parallel.processes").ProcessRanks(device, timeout_seconds)
