"""Steps timed on every core at once: one process of one thread per core, which alternates the candidates.

Threads that share a step wait for each other whenever one core is busy elsewhere, so on a shared machine a step of
0.25 s may take many times as long. A process of one thread loses only its own core's time.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from queue import Empty
from typing import Any

import torch

from benchmarks.harness import Deadline, Timing, alternate
from openm6.core.device import keep_freed_memory, usable_cores
from openm6.core.errors import TrainingError

Steps = Mapping[str, Callable[[], object]]
MAX_VARIATION = 1.15  # median over fastest; above, a ratio says more about the machine than about the candidates
LOOK_EVERY = 0.5  # seconds between checks for failed processes
WARMUP = 3


def time_per_core(
    open_steps: Callable[..., Steps],
    settings: tuple[Any, ...],
    repeats: int,
    deadline: Deadline,
    into: dict[str, Timing],
) -> int:
    """Time `repeats` rounds of `open_steps(*settings)` on each core, into `into`; return the number of cores.

    `open_steps` must be importable. After the deadline the processes end with the round in progress.

    Raises:
        TrainingError: a process failed.
    """
    # Forked from a process with all imports, which would otherwise take seconds in each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, open_steps.__module__])
    answers, cores = context.Queue(), usable_cores()
    processes = [
        context.Process(target=_work, args=(core, open_steps, settings, repeats, deadline.left, answers), daemon=True)
        for core in range(cores)
    ]
    for process in processes:
        process.start()
    working = cores
    try:
        while working:
            try:
                found = answers.get(timeout=LOOK_EVERY)
            except Empty:
                if any(process.exitcode for process in processes):
                    raise TrainingError("a process of the benchmark failed: see above") from None
                continue
            working -= found is None
            for name, seconds in (found or {}).items():
                into.setdefault(name, Timing()).seconds.append(seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return cores


def _work(
    core: int, open_steps: Callable[..., Steps], settings: tuple[Any, ...], repeats: int, seconds: float, answers: Any
) -> None:
    if sys.platform == "linux":
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    torch.set_num_threads(1)
    # As a training run does; it helps all candidates.
    keep_freed_memory()
    steps, deadline = open_steps(*settings), Deadline(seconds)
    alternate(steps, 0, WARMUP, deadline)
    for number in range(repeats):
        if number and deadline.passed:
            break
        found = alternate(steps, 1, 0, deadline)
        answers.put({name: timing.seconds[0] for name, timing in found.items()})
    answers.put(None)


def variation(timing: Timing) -> float:
    """Return how many times as long as the fastest step the median took."""
    return statistics.median(timing.seconds) / min(timing.seconds)


def ratio(ours: Timing, theirs: Timing) -> tuple[float | None, str | None]:
    """Return their median time over ours; None with the reason if either side varies too much."""
    worst = max(variation(ours), variation(theirs))
    if worst > MAX_VARIATION:
        return None, f"the median step took {worst:.2f} times the fastest: run it on a quiet machine"
    return round(theirs.median / ours.median, 3), None
