"""Lessons judged side by side on a CPU: a process for each core, forked from this one, takes the next that is left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from openm6.evaluate.config import JudgeConfig
from openm6.parallel.worker_pool import WorkerPool, can_fork, usable_cores

Result = TypeVar("Result")

MEND = "judge again with openm6 evaluate, one process alone by judge.workers=1 in the recipe"


def number_of_judges(lessons: int, config: JudgeConfig, device: torch.device) -> int:
    """How many processes judge so many lessons; one on a GPU, off Linux and in a thread, where none can be forked."""
    if device.type != "cpu" or not can_fork() or threading.current_thread() is not threading.main_thread():
        return 1
    wanted = usable_cores() if config.workers == "auto" else config.workers
    return max(1, min(wanted, lessons))


def side_by_side(
    judge: Callable[[int], Result], numbers: Sequence[int], workers: int
) -> Iterator[tuple[int, Result]]:
    """`judge(number)` for each number, as they come: in this order by one process, in any by several.

    Raises:
        OpenM6Error: what judging failed with.
        TrainingError: a process was killed.
    """
    if workers == 1:
        yield from ((number, judge(number)) for number in numbers)
        return

    def serve(pipe: Connection) -> None:
        while True:
            pipe.send(judge(pipe.recv()))

    pool = WorkerPool([serve] * workers, remedy=MEND)
    try:
        for place, result in pool.imap_unordered(numbers):
            yield numbers[place], result
    finally:
        pool.close()
