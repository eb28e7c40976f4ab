"""The device of this process: the one place that asks whether there is a GPU."""

from __future__ import annotations

import os

import torch


def own_device() -> torch.device:
    """The GPU of this process with its number, or the CPU if there is none.

    Of several processes that a launcher started each has its own GPU; a process alone takes torch's current one.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None:
        torch.cuda.set_device(int(rank))
    return torch.device("cuda", torch.cuda.current_device())
