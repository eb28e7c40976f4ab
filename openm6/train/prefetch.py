"""Making batches ahead of their use, in one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

import torch

from openm6.base.errors import TrainingError

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """An iterator over `source` that stays up to `ahead` items in front; a failure in the thread is raised by `next`.

    The order is that of `source`, so nothing depends on timing.
    """

    def __init__(self, source: Iterator[Item], ahead: int) -> None:
        self._source = source
        self._ready: queue.Queue[Item | _End] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="openm6-batches", daemon=True)

    def __enter__(self) -> Prefetch[Item]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)  # a thread stuck in a slow read is left to end with the program

    def __iter__(self) -> Prefetch[Item]:
        return self

    def __next__(self) -> Item:
        item = self._ready.get()
        if isinstance(item, _End):
            self._put(item)  # a later call gets the same answer
            raise item.error
        return item

    def _fill(self) -> None:
        # Of this thread alone: two teams of threads on the same cores would wait for one another at every barrier.
        torch.set_num_threads(1)
        try:
            for item in self._source:
                if not self._put(item):
                    return
            error: BaseException = TrainingError(
                "the data ended before the run did: batches() must go on for ever"
            )
        except BaseException as failure:  # raised again where the batch is asked for
            error = failure
        self._put(_End(error))

    def _put(self, item: Item | _End) -> bool:
        """False if the reader has gone."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


class _End:
    def __init__(self, error: BaseException) -> None:
        self.error = error
