"""One arena of pinned host memory for all offloaded layers; torch's allocator rounds blocks up to powers of two."""

from __future__ import annotations

import contextlib
import mmap
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from openm6.core.log import get_log

try:
    import resource
except ImportError:  # Windows has no limit
    resource = None  # type: ignore[assignment]

SEGMENT = 64 * 2**30  # of memory that is registered at once: drivers refuse larger ones with small pages


class PinnedArena:
    """Byte buffers of the given sizes, next to each other in one mapping."""

    def __init__(self, sizes: Sequence[int], pin: bool) -> None:
        """`sizes`: multiples of a page; none straddles registered segments. Without pinning it works, but slower."""
        # Private memory on Linux, because only then it may have huge pages, which are pinned far faster.
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform == "linux" else {}
        memory = mmap.mmap(-1, max(mmap.PAGESIZE, sum(sizes)), **flags)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # the system may have none
                memory.madvise(mmap.MADV_HUGEPAGE)
            # A fork would copy all pinned pages at once, or move the pages that the GPU writes to out of this process,
            # and keep a copy of what is written later.
            memory.madvise(mmap.MADV_DONTFORK)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.buffers = list(whole[: sum(sizes)].split(list(sizes)))
        runtime: Any = torch.cuda.cudart() if pin and sizes else None
        registered: list[int] = []
        # Unregisters the memory, also if the run fails; the buffers must not be used after it.
        self.close = weakref.finalize(self, lambda: [runtime.cudaHostUnregister(address) for address in registered])
        if runtime is None:
            return
        for start, size in segments(sizes, SEGMENT):
            # The first touch claims the pages; an untouched mapping is pinned far more slowly.
            whole[start : start + size : mmap.PAGESIZE].zero_()
            address = whole.data_ptr() + start
            code = int(runtime.cudaHostRegister(address, size, 0))
            if code != 0:
                forget_error()
                soft = -1 if resource is None else resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
                limit = f", limit {soft / 2**30:.3g} GiB" if soft >= 0 else ""  # it is negative if there is none
                get_log().warning(
                    f"the system let {start / 2**30:.0f} of {len(whole) / 2**30:.0f} GiB be pinned (error "
                    f"{code}{limit}): the rest is copied at about a third of the speed; raise `ulimit -l` to "
                    "fix that"
                )
                return
            registered.append(address)


def forget_error() -> None:
    """Launch a kernel that takes the runtime's last error, which the next kernel would report as its own."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def segments(sizes: Sequence[int], largest: int) -> list[tuple[int, int]]:
    """Return (start, size) of segments of whole buffers, each up to `largest` bytes unless one buffer is longer."""
    found: list[tuple[int, int]] = []
    start = 0
    for size in sizes:
        if found and found[-1][1] + size <= largest:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((start, size))
        start += size
    return [segment for segment in found if segment[1]]
