"""A pool of forked processes, each with a pipe, and memory that they share; nothing that was built is pickled."""

from __future__ import annotations

import ctypes
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openm6.core.errors import OpenM6Error, TrainingError

Work = Callable[[Connection], None]
STOPS = tuple(one for one in signal.Signals if one.name in ("SIGINT", "SIGTERM", "SIGHUP"))
RESUME = "go on with --resume, or with loop.num_processes=1"
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
ALIGNMENT = 64  # bytes of a cache line, where wide loads begin


def can_fork() -> bool:
    """Whether processes may be forked here: macOS aborts those of a process with threads, Windows has no fork.

    Only the main thread forks, as others may hold locks, and daemonic processes may have no children.
    """
    in_main = threading.current_thread() is threading.main_thread()
    return sys.platform == "linux" and in_main and not multiprocessing.current_process().daemon


def handled_stops() -> list[signal.Signals]:
    """Return the signals to stop that this process handles: under nohup SIGHUP is ignored."""
    return [one for one in STOPS if one == signal.SIGINT or signal.getsignal(one) != signal.SIG_IGN]


def children() -> list[int]:
    """Return the ids of the running processes that the main thread started; on Linux only."""
    try:
        return [int(word) for word in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


class WorkerPool:
    """One forked process per function of `works`; they end when the pool is closed, or when this process dies.

    Nothing is sent to the last `service` of them or gathered from them. `remedy` is what a user may do when one of them
    is lost.
    """

    def __init__(self, works: Sequence[Work], service: int = 0, remedy: str = RESUME) -> None:
        self.remedy = remedy
        if not can_fork():
            raise ValueError("no processes can be forked here: ask can_fork first")
        context = multiprocessing.get_context("fork")
        pairs = [context.Pipe() for _ in works]
        ends = [end for pair in pairs for end in pair]
        self.pipes = [mine for mine, _ in pairs]
        self.workers = self.pipes[: len(works) - service]
        self.processes: list[ForkProcess] = [
            context.Process(target=_run, args=(work, theirs, ends), daemon=True, name=f"openm6-{number}")
            for number, (work, (_, theirs)) in enumerate(zip(works, pairs, strict=True), 1)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def send(self, message: Any) -> None:
        for pipe in self.workers:
            self._send(pipe, message)

    def gather(self) -> list[Any]:
        """Return one message from each worker, in order; raise the error of one that failed, or was killed."""
        return [self._receive(pipe) for pipe in self.workers]

    def imap_unordered(self, messages: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Send each message to the next free worker; yield its index and the reply, as they come; see `gather`."""
        left = iter(enumerate(messages))
        busy: dict[Connection, int] = {}
        free, replies = self.workers, list[tuple[int, Any]]()
        while free:
            for pipe, (number, message) in zip(free, left, strict=False):
                self._send(pipe, message)
                busy[pipe] = number
            yield from replies  # now that their workers have more to do
            ready = wait(list(busy)) if busy else []
            free = [pipe for pipe in busy if pipe in ready]
            replies = [(busy.pop(pipe), self._receive(pipe)) for pipe in free]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()
                process.join()

    def _send(self, pipe: Connection, message: Any) -> None:
        try:
            pipe.send(message)
        except OSError:
            raise self._lost(pipe) from None

    def _receive(self, pipe: Connection) -> Any:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            raise self._lost(pipe) from None
        if isinstance(message, OpenM6Error):
            raise message
        return message

    def _lost(self, pipe: Connection) -> TrainingError:
        process = self.processes[self.pipes.index(pipe)]
        process.join(timeout=2.0)
        return TrainingError(
            f"a worker process ended with code {process.exitcode} (-9: killed, perhaps for lack of memory): "
            f"{self.remedy}"
        )


def _run(work: Work, pipe: Connection, ends: Sequence[Connection]) -> None:
    """Run a worker. It must hold no other end of a pipe, or the others would not notice its end."""
    # The system kills it when the first process ends, which it might not notice while it computes.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for end in ends:
        if end is not pipe:
            end.close()
    for number in STOPS:  # they reach the whole group; the first process decides
        signal.signal(number, signal.SIG_IGN)
    # OpenMP's threads do not survive a fork: waiting for a second one would never end.
    torch.set_num_threads(1)
    gone = (EOFError, BrokenPipeError, ConnectionResetError)  # the first process, or the pool is closed
    with suppress(*gone):
        try:
            work(pipe)
        except gone:
            pass
        except OpenM6Error as error:  # raised again where it is gathered
            pipe.send(error)
        except BaseException as error:
            pipe.send(TrainingError(f"a worker process failed: {type(error).__name__}: {error}"))


def shared_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return zeros like `tensors` in anonymous memory that forks share; the size of /dev/shm does not matter."""
    sizes = [math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT for tensor in tensors]
    memory = torch.frombuffer(mmap.mmap(-1, max(sum(sizes), ALIGNMENT)), dtype=torch.uint8)
    parts = memory[: sum(sizes)].split(sizes)
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)
    ]


@torch.no_grad()
def share_model(model: nn.Module) -> None:
    """Move all parameters and buffers of a model on the CPU into shared memory; they stay the same objects."""
    # By identity, as a tied weight must move once; `data` keeps what optimizers and modules refer to.
    tensors = list({id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values())
    for tensor, shared in zip(tensors, shared_like([tensor.data for tensor in tensors]), strict=True):
        shared.copy_(tensor.data)
        tensor.data = shared
