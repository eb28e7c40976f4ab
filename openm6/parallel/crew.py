"""Processes forked from this one, each with a pipe: what was built is theirs at once, and nothing is pickled twice."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch

from openm6.base.errors import OpenM6Error, TrainingError

Work = Callable[[Connection], None]
STOPS = tuple(one for one in signal.Signals if one.name in ("SIGINT", "SIGTERM", "SIGHUP"))
RESUME = "go on with --resume, or with loop.workers=1"


def can_fork() -> bool:
    """Whether a process with threads may be forked here: macOS aborts the child, Windows has no fork."""
    return sys.platform == "linux"


def usable_cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def heeded_stops() -> list[signal.Signals]:
    """The signals to stop that are meant for this process: nohup has SIGHUP ignored."""
    return [one for one in STOPS if one == signal.SIGINT or signal.getsignal(one) != signal.SIG_IGN]


def children() -> list[int]:
    """Numbers of the processes that the main thread has started and that are there; none where Linux is not."""
    try:
        own = os.getpid()
        return [int(word) for word in Path(f"/proc/self/task/{own}/children").read_text().split()]
    except OSError:
        return []


class Crew:
    """One forked process for each function of `works`; they end when it is closed, or when this process dies.

    The last `service` of them only serve: nothing is sent to them or gathered from them. `mend` is what a person may
    do when one of them is lost.
    """

    def __init__(self, works: Sequence[Work], service: int = 0, mend: str = RESUME) -> None:
        self.mend = mend
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("processes are forked from the main thread only: others may hold locks")
        context = multiprocessing.get_context("fork")
        pairs = [context.Pipe() for _ in works]
        ends = [end for pair in pairs for end in pair]
        self.pipes = [mine for mine, _ in pairs]
        self.members = self.pipes[: len(works) - service]
        self.processes: list[ForkProcess] = [
            context.Process(target=_live, args=(work, theirs, ends), daemon=True, name=f"openm6-{number}")
            for number, (work, (_, theirs)) in enumerate(zip(works, pairs, strict=True), 1)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def send(self, message: Any) -> None:
        """The same message to all members."""
        for pipe in self.members:
            try:
                pipe.send(message)
            except OSError:
                raise self._lost(pipe) from None

    def gather(self) -> list[Any]:
        """One message from each member, in their order.

        Raises:
            OpenM6Error: the one that a process failed with.
            TrainingError: a process failed otherwise, or was killed.
        """
        return [self._receive(pipe) for pipe in self.members]

    def deal(self, messages: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Each message to whichever member is free next; gives its number and the reply to it, as they come.

        Raises:
            OpenM6Error, TrainingError: as `gather` does.
        """
        left = iter(enumerate(messages))
        busy: dict[Connection, int] = {}

        def hand_to(pipe: Connection) -> None:
            for number, message in islice(left, 1):
                pipe.send(message)
                busy[pipe] = number

        for pipe in self.members:
            hand_to(pipe)
        while busy:
            for ready in wait(list(busy)):
                pipe = next(member for member in busy if member is ready)
                reply, number = self._receive(pipe), busy.pop(pipe)
                hand_to(pipe)
                yield number, reply

    def close(self) -> None:
        """Ends all processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()
                process.join()

    def _receive(self, pipe: Connection) -> Any:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            raise self._lost(pipe) from None
        if isinstance(message, OpenM6Error):
            raise message
        if isinstance(message, Failure):
            raise TrainingError(f"a worker process failed: {message.words}")
        return message

    def _lost(self, pipe: Connection) -> TrainingError:
        process = self.processes[self.pipes.index(pipe)]
        process.join(timeout=2.0)
        return TrainingError(
            f"a worker process ended with code {process.exitcode} (-9: killed, perhaps for want of memory): {self.mend}"
        )


class Failure:
    """An error of a worker that is none of ours, in words."""

    def __init__(self, error: BaseException) -> None:
        self.words = f"{type(error).__name__}: {error}"


def _live(work: Work, pipe: Connection, ends: Sequence[Connection]) -> None:
    """A worker's life. It must hold no other end of a pipe, or no one would see that the first process has died."""
    for end in ends:
        if end is not pipe:
            end.close()
    for number in STOPS:  # they reach the whole group; the first process decides
        signal.signal(number, signal.SIG_IGN)
    # OpenMP's threads did not survive the fork: a second one would be waited for in vain.
    torch.set_num_threads(1)
    try:
        work(pipe)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the first process is gone or has closed the crew
    except OpenM6Error as error:
        pipe.send(error)
    except BaseException as error:  # raised again where it is gathered
        pipe.send(Failure(error))
