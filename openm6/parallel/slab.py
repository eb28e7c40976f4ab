"""One stretch of host memory for all streamed sets, registered with the GPU as it is: torch's own pinned memory rounds
each block up to a power of two."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openm6.base.log import get_log

try:
    import resource
except ImportError:  # Windows bounds nothing
    resource = None  # type: ignore[assignment]

PIECE = 64 * 2**30  # of memory that is registered at once: drivers refuse larger ones with small pages


class HostSlab:
    """Runs of bytes, one for each size asked for, next to each other in one mapping."""

    def __init__(self, sizes: Sequence[int], pin: bool) -> None:
        """`sizes` are multiples of the page; a copy never straddles two registered pieces.

        Where the system refuses to register, the slab works all the same, slower; the log says so.
        """
        self._registered: list[int] = []
        self._unpin: weakref.finalize | None = None
        self._memory = mmap.mmap(-1, max(mmap.PAGESIZE, sum(sizes)))
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.runs: list[Tensor] = []
        start = 0
        for size in sizes:
            self.runs.append(self._bytes[start : start + size])
            start += size
        if pin and sizes:
            self._register(pieces(sizes, PIECE))

    def _register(self, wanted: list[tuple[int, int]]) -> None:
        runtime = torch.cuda.cudart()
        self._unpin = weakref.finalize(self, _unregister, runtime, self._registered)  # also where a run fails
        for start, size in wanted:
            # The first touch claims the pages; a mapping that nobody touched is pinned far more slowly.
            self._bytes[start : start + size : mmap.PAGESIZE].zero_()
            address = self._bytes.data_ptr() + start
            code = int(runtime.cudaHostRegister(address, size, 0))
            if code != 0:
                _forget_error()
                get_log().warning(
                    f"the system let {start / 2**30:.0f} of {len(self._bytes) / 2**30:.0f} GiB be pinned (error "
                    f"{code}{_limit()}): the rest is copied at about a third of the speed; raise `ulimit -l` to mend "
                    "that"
                )
                return
            self._registered.append(address)

    def close(self) -> None:
        """Unregisters the memory; the runs must not be used any more."""
        if self._unpin is not None:
            self._unpin()


def _unregister(runtime: Any, addresses: list[int]) -> None:
    while addresses:
        runtime.cudaHostUnregister(addresses.pop())


def _forget_error() -> None:
    """The runtime keeps a refusal as its last error and lays it to the next kernel's charge: here is one to take it."""
    try:
        torch.ones(1, device="cuda")
    except RuntimeError:
        get_log().debug("the refusal to pin memory was taken off the runtime's hands")


def _limit() -> str:
    """What a process may pin, where the system bounds it."""
    if resource is None:
        return ""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "" if soft == resource.RLIM_INFINITY else f", limit {soft / 2**30:.3g} GiB"


def pieces(sizes: Sequence[int], largest: int) -> list[tuple[int, int]]:
    """(start, size) of pieces of whole runs, each up to `largest` bytes unless one run alone is longer."""
    found: list[tuple[int, int]] = []
    start = 0
    for size in sizes:
        if found and found[-1][1] + size <= largest:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((start, size))
        start += size
    return [piece for piece in found if piece[1]]
