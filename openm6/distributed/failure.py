"""Failures of a rank: rank 0 reports the first one in one sentence, and no rank goes on waiting.

A rank that fails leaves its sentence in the launcher's key-value store. A thread of every rank polls it: if its main
thread is stuck in a collective with the rank that failed, it ends the process.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from itertools import count
from types import TracebackType

import torch
import torch.distributed as dist

from openm6.core.errors import Interrupted, OpenM6Error, TrainingError, first_line

FAILURE, REPORTED, DONE = "failure", "reported", "done"
LOOK_EVERY = 0.3  # seconds between the first looks at the store
LOOK_LATER = 2.0  # and between later ones: rank 0 answers the looks of all ranks
BACKOFF = 1.2  # from one look to the next
PATIENCE = 5.0  # seconds that a failed rank waits for rank 0 to report before the launcher ends them all


class FailureWatchdog:
    """While entered, a failure of any rank ends all of them; rank 0 raises or prints the first one's sentence."""

    def __init__(self, rank: int, size: int, timeout_seconds: float, name: str) -> None:
        """`name` is the same on all ranks and another one after each restart."""
        self.rank, self.size, self.timeout_seconds = rank, size, timeout_seconds
        self._store = open_store(name)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="openm6-guard", daemon=True)

    def __enter__(self) -> FailureWatchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if error is None or isinstance(error, SystemExit):
            return
        if isinstance(error, KeyboardInterrupt):
            if self.rank:
                raise SystemExit(error.exit_code if isinstance(error, Interrupted) else 130) from None
            return
        own = f"rank {self.rank} of {self.size}: {self._sentence(error)}"
        first = own
        with suppress(dist.DistError, RuntimeError):  # the store has gone, and with it rank 0 or the launcher
            first = self._store.compare_set(FAILURE, "", own).decode()  # for the others, unless there is one
            if self.rank == 0:
                self._store.set(REPORTED, "yes")
        foreign = first != own or _is_external(error)
        if self.rank == 0:
            if foreign:
                raise TrainingError(first) from None
            return
        if not (foreign or isinstance(error, OpenM6Error)):
            sys.excepthook(type(error), error, trace)  # a bug, which keeps its traceback
        with suppress(dist.DistError, RuntimeError):  # the store has gone, or rank 0 does not report
            self._store.wait([REPORTED], timedelta(seconds=PATIENCE))
        raise SystemExit(1) from None

    def _watch(self) -> None:
        failed = False
        for look in count():
            if self._done.wait(pause_before(look)):
                return
            with suppress(dist.DistError, RuntimeError):  # the store has gone, and with it the launcher
                failed = self._store.check([FAILURE])
            if failed:
                break
        # The main thread may be about to fail over the same; then it speaks for itself.
        if self._done.wait(2 * LOOK_EVERY):
            return
        if self.rank == 0:
            sys.stderr.write(f"error: {self._store.get(FAILURE).decode()}\n")
            sys.stderr.flush()
            self._store.set(REPORTED, "yes")
        os._exit(1)  # the main thread cannot be called back from an exchange

    def _sentence(self, error: BaseException) -> str:
        if isinstance(error, OpenM6Error):
            return str(error)
        if _out_of_memory(error):
            remedies = "lower packing.batch_size or packing.seq_len, or raise parallel.dp_shard or parallel.ep"
            return f"out of memory: {remedies}"
        if _is_external(error) and "timed out" in str(error).lower():
            waited = f"waited {self.timeout_seconds:g} s for another rank in vain"
            return f"{waited}: look for one that hangs, or raise parallel.timeout_seconds"
        if _is_external(error):
            return "another rank was lost: see its last message, and go on with --resume"
        return f"{type(error).__name__}: {first_line(error)}"


def pause_before(look: int) -> float:
    """Seconds before look number `look` at the store, from 0: most failures come early, a long run has many ranks."""
    return min(LOOK_LATER, LOOK_EVERY * BACKOFF ** min(look, 100))


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _is_external(error: BaseException) -> bool:
    """Return whether the machine or another rank is the cause, not the program."""
    text = str(error).lower()
    signs = ("timed out", "closed by peer", "reset by peer", "connection refused")
    lost = any(sign in text for sign in signs) or isinstance(error, dist.DistBackendError)
    return _out_of_memory(error) or lost


def open_store(name: str) -> dist.Store:
    """The key-value store that the ranks met at, with keys of its own for this name."""
    address, timeout = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timedelta(seconds=30)
    store = dist.TCPStore(*address, is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"openm6/{name}", store)


def wait_for(store: dist.Store, key: str) -> None:
    """Wait for a key, however long: a collective would fail after its timeout. TrainingError if the store has gone."""
    try:
        for look in count():
            if store.check([key]):
                return
            time.sleep(pause_before(look))
    except (dist.DistError, RuntimeError):
        raise TrainingError("rank 0 was lost: see its last message, and go on with --resume") from None
