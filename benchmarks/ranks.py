"""Several ranks on one machine, joined by gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from openm6.core.errors import ConfigError, OpenM6Error, TrainingError

Of = Annotated[str, typer.Option("--of", metavar="PRESET", help="Preset of the whole model.")]
NumRanks = Annotated[int, typer.Option("--ranks", min=1, help="Ranks of the whole run.")]
LOOK_EVERY = 0.5  # seconds between checks for failed processes


def parse_counts(words: str) -> tuple[int, ...]:
    """Return `1,2,4` as integers.

    Raises:
        ConfigError: something else.
    """
    parts = [word.strip() for word in words.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"{words!r} must be numbers of processes, such as 1,2,4")
    return tuple(int(part) for part in parts)


def on_ranks(size: int, work: Callable[..., Any], *values: Any, seconds: float = 300.0) -> list[Any]:
    """Return the results of `work(*values)` on `size` processes of one thread each; `work` must be importable.

    Raises:
        TrainingError: a process failed, or did not answer in time.
    """
    # Forked from a process with all imports, which would otherwise take seconds in each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, work.__module__])
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        processes = [
            context.Process(target=_serve, args=(rank, size, meeting, answers, work, values, seconds), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(size, processes, answers, seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(size: int, processes: list[Any], answers: Any, seconds: float) -> list[Any]:
    found: dict[int, Any] = {}
    waited = 0.0
    while len(found) < size:
        try:
            rank, failure, answer = answers.get(timeout=LOOK_EVERY)
        except Empty:
            waited += LOOK_EVERY
            dead = [n for n, process in enumerate(processes) if process.exitcode and n not in found]
            if dead or waited > seconds:
                who = f"rank {dead[0]}" if dead else "a rank"
                raise TrainingError(f"{who} of {size} ended or hung: run fewer ranks") from None
            continue
        if failure:
            raise TrainingError(f"rank {rank} of {size} failed: {failure}")
        found[rank] = answer
    return [found[rank] for rank in range(size)]


def _serve(
    rank: int, size: int, meeting: str, answers: Any, work: Callable[..., Any], values: Any, seconds: float
) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=patience)
    try:
        answer = work(*values)
        dist.barrier()  # nobody may leave while another still listens to it
        answers.put((rank, "", answer))
    except (OpenM6Error, RuntimeError, ValueError) as error:
        answers.put((rank, f"{type(error).__name__}: {error}", None))
