"""Forked processes that take messages in turn: every one is answered, and a lost process is reported."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest

from openm6.core.errors import DataError, TrainingError
from openm6.distributed.worker_pool import WorkerPool, can_fork

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux only")


def square(pipe: Connection) -> None:
    """Answers numbers with their squares, and fails at some."""
    while True:
        number = pipe.recv()
        if number == -13:
            raise DataError("thirteen is broken: leave it out")
        if number == 666:
            os.kill(os.getpid(), signal.SIGKILL)
        pipe.send((number * number, os.getpid()))


@contextmanager
def pool(workers: int) -> Iterator[WorkerPool]:
    found = WorkerPool([square] * workers, remedy="do it alone")
    try:
        yield found
    finally:
        found.close()


def test_each_message_is_answered_once_and_all_workers_work() -> None:
    with pool(2) as found:
        replies = list(found.imap_unordered(range(40)))
        assert sorted((place, number) for place, (number, _) in replies) == [(n, n * n) for n in range(40)]
        assert {process for _, (_, process) in replies} == {process.pid for process in found.processes}
        assert list(found.imap_unordered([])) == []
        assert [(place, number) for place, (number, _) in found.imap_unordered([5])] == [(0, 25)]


def test_what_a_worker_failed_with_is_raised() -> None:
    with pool(3) as found, pytest.raises(DataError, match="thirteen is broken"):
        list(found.imap_unordered([1, -13, 2]))


def test_a_killed_worker_is_reported_with_the_remedy() -> None:
    with pool(2) as found, pytest.raises(TrainingError, match=r"ended with code -9 .*: do it alone$"):
        list(found.imap_unordered([1, 666, 2, 3]))


def test_a_worker_that_is_lost_before_it_gets_work_is_reported() -> None:
    with pool(2) as found:
        found.processes[1].kill()
        found.processes[1].join()
        with pytest.raises(TrainingError, match=r"ended with code -9 .*: do it alone$"):
            list(found.imap_unordered([1, 2, 3]))
