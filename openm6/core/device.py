"""The hardware of this process: its device, its cores, and the freed memory that it keeps."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of settings, from glibc's malloc.h
KEPT = 64 * 2**20  # bytes of free memory on top of the heap that are not given back to the system
ON_HEAP = 32 * 2**20  # blocks up to this size come from the heap, the most that glibc allows


def resolve_device() -> torch.device:
    """Return the GPU of this process with its index, or the CPU if there is no GPU.

    Each of several processes of one launch has its own GPU; a process alone takes torch's current one.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None:
        torch.cuda.set_device(int(rank))
    return torch.device("cuda", torch.cuda.current_device())


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Keep freed memory in this process and its forks; does nothing if the C library is not glibc.

    A training step on a processor frees and takes the same megabytes thousands of times, and each page that went
    back to the system in between is a fault and a page to be cleared: 5 ms of 130 in a step of the demo.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl
        return
    mallopt(TRIM_THRESHOLD, KEPT)
    mallopt(MMAP_THRESHOLD, ON_HEAP)
