"""How this process was started, alone or as one of several, and what follows: its ranks."""

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


def open_ranks(device: torch.device, timeout_seconds: float) -> Ranks:
    """The ranks of this run: this process alone, or those that the launcher started."""
    if not launched():
        return Ranks()
    # torch's distributed tensors take seconds to import: a process alone is spared them.
    return importlib.import_module("openm6.parallel.processes").ProcessRanks(device, timeout_seconds)
