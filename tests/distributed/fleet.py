"""A few processes joined by gloo that run functions of the tests: started once, used by all tests of a file."""

from __future__ import annotations

import gc
import itertools
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from tests.forked import CONTEXT

PATIENCE = 120  # seconds that a function may take


class Fleet:
    """`run` calls a function on all ranks at once and gives back what each returned."""

    running: ClassVar[list[Fleet]] = []

    def __init__(self, size: int, meeting: Path) -> None:
        self.size, self.meeting, self.starts = size, meeting, 0
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def _start(self) -> None:
        pairs = [CONTEXT.Pipe() for _ in range(self.size)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            CONTEXT.Process(target=_serve, args=(rank, self.size, f"{self.meeting}-{self.starts}", theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        self.starts += 1
        self.running.append(self)

    def run(self, function: Callable[..., Any], *values: Any) -> list[Any]:
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, values))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE):
                self.close()
                raise TimeoutError(f"rank {rank} did not end {function.__name__}")
            answers.append(pipe.recv())
        for rank, (good, answer) in enumerate(answers):
            if not good:
                raise AssertionError(f"on rank {rank}:\n{answer}")
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End the processes; `run` starts others."""
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.processes = []
            self.running.remove(self)


def _serve(rank: int, size: int, meeting: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not looked through each time
    for count in itertools.count():
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}-{count}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        function, values = pipe.recv()
        try:
            pipe.send((True, function(*values)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        # Threads of a group wake a hundred times a second until it is destroyed and nothing refers to it.
        dist.destroy_process_group()
        gc.collect()
