"""Batches made in a process of their own, divided among those that train on them, a few steps ahead."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

from openm6.base.errors import OpenM6Error, TrainingError
from openm6.parallel.crew import Failure
from openm6.train.job import Batch, Job


class Feed:
    """Pipes from the process that makes batches to each of `parts` readers; create it before any of them is forked.

    A thread beside the training would take its interpreter lock and half of its core; a process takes neither.
    """

    def __init__(self, job: Job, parts: int, ahead: int) -> None:
        self.job, self.ahead = job, ahead
        pairs = [multiprocessing.Pipe(duplex=False) for _ in range(parts)]
        self.readers = [reader for reader, _ in pairs]
        self.writers = [writer for _, writer in pairs]

    def read(self, part: int) -> Batch:
        """The next part of a batch.

        Raises:
            OpenM6Error: what making it failed with.
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
        return item

    def serve(self, pipe: Connection) -> None:
        """Life of the process that makes batches, until nobody reads them."""
        self.keep(reader=None)
        lines: list[queue.Queue[Any]] = [queue.Queue(self.ahead) for _ in self.writers]
        for line, writer in zip(lines, self.writers, strict=True):
            threading.Thread(target=_send, args=(line, writer), daemon=True).start()
        try:
            for batch in self.job.batches():
                for line, part in zip(lines, self.job.split(batch, len(lines)), strict=True):
                    line.put(part)
            lines[0].put(TrainingError("the data ended before the run did: batches() must go on for ever"))
        except OpenM6Error as error:
            lines[0].put(error)
        except Exception as error:  # told by the first reader, who ends the run
            lines[0].put(Failure(error))
        pipe.recv()  # until the crew is closed

    def keep(self, reader: int | None) -> None:
        """Close what this process has no use for, or an end of a pipe would outlive its owner unseen."""
        _close(end for number, end in enumerate(self.readers) if number != reader)
        if reader is not None:
            _close(self.writers)


def _close(ends: Iterable[Connection]) -> None:
    for end in ends:
        end.close()


def _send(line: queue.Queue[Any], writer: Connection) -> None:
    try:
        while True:
            writer.send(line.get())
    except OSError:
        os._exit(0)  # nobody reads any more
