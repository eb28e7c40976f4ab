"""How the C library keeps the memory that a process has given back."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of settings, from glibc's malloc.h
KEPT = 64 * 2**20  # bytes of free memory on top of the heap that are not given back to the system
ON_HEAP = 32 * 2**20  # pieces up to this size come from the heap, the most that glibc allows


def keep_freed_memory() -> None:
    """Has freed memory stay with this process and its forks; does nothing where the C library is not glibc.

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
