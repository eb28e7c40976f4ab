"""Batches prepared ahead of their use: in a thread, or in a process that serves several workers."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import torch

from openm6.core.errors import OpenM6Error, TrainingError
from openm6.parallel.worker_pool import Failure
from openm6.train.training_task import Batch, TrainingTask

Item = TypeVar("Item")
ENDED = "the data ended before the run did: batches() must go on for ever"


class Prefetch(Generic[Item]):
    """An iterator over `source` that stays up to `ahead` items in front; a failure in the thread is raised by `next`.

    The order is that of `source`, so nothing depends on timing.
    """

    def __init__(self, source: Iterator[Item], ahead: int) -> None:
        self._source = source
        self._ready: queue.Queue[Item | BaseException] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="openm6-batches", daemon=True)

    def __enter__(self) -> Prefetch[Item]:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)  # a thread stuck in a slow read is left to end with the program

    def __iter__(self) -> Prefetch[Item]:
        return self

    def __next__(self) -> Item:
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._put(item)  # a later call raises it again
            raise item
        return item

    def _fill(self) -> None:
        # For this thread alone: two pools of OpenMP threads on the same cores would wait for each other.
        torch.set_num_threads(1)
        try:
            for item in self._source:
                if not self._put(item):
                    return
            error: BaseException = TrainingError(ENDED)
        except BaseException as failure:  # raised again where the batch is asked for
            error = failure
        self._put(error)

    def _put(self, item: Item | BaseException) -> bool:
        """Return False if the reader has gone."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


class DataWorker:
    """A process that makes batches ahead and sends a part of each to `parts` readers; create it before they are forked.

    A thread would compete with the training for its interpreter lock and its core.
    """

    def __init__(self, training: TrainingTask, parts: int, ahead: int) -> None:
        self.training, self.ahead = training, ahead
        pairs = [multiprocessing.Pipe(duplex=False) for _ in range(parts)]
        self.readers = [reader for reader, _ in pairs]
        self.writers = [writer for _, writer in pairs]

    def read(self, part: int) -> Batch:
        """Return the next part of a batch.

        Raises:
            OpenM6Error: the error that making it failed with.
            TrainingError: the process that makes batches failed otherwise, or was killed.
        """
        try:
            item = self.readers[part].recv()
        except EOFError:
            raise TrainingError("the process that makes batches has ended: go on with --resume") from None
        if isinstance(item, OpenM6Error):
            raise item
        if isinstance(item, Failure):
            raise TrainingError(f"making a batch failed: {item.words}")
        batch: Batch = item
        return batch

    def serve(self, pipe: Connection) -> None:
        """Make batches until nobody reads them."""
        self.keep(reader=None)
        queues: list[queue.Queue[Any]] = [queue.Queue(self.ahead) for _ in self.writers]
        for waiting, writer in zip(queues, self.writers, strict=True):
            threading.Thread(target=_send, args=(waiting, writer), daemon=True).start()
        try:
            for batch in self.training.batches():
                for waiting, part in zip(queues, self.training.split(batch, len(queues)), strict=True):
                    waiting.put(part)
            queues[0].put(TrainingError(ENDED))
        except OpenM6Error as error:
            queues[0].put(error)
        except Exception as error:  # reported by the first reader, who ends the run
            queues[0].put(Failure(error))
        pipe.recv()  # until the pool is closed

    def keep(self, reader: int | None) -> None:
        """Close the ends of pipes that this process does not use: an open one hides that its owner has ended."""
        unused = [end for index, end in enumerate(self.readers) if index != reader]
        for end in [*unused, *(self.writers if reader is not None else ())]:
            end.close()


def _send(waiting: queue.Queue[Any], writer: Connection) -> None:
    try:
        while True:
            writer.send(waiting.get())
    except OSError:
        os._exit(0)  # no reader is left
