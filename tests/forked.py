"""Programs in processes of their own, forked from one that has imported torch, as to import it again takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from openm6.cli.main import app

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed.fsdp", "openm6.train.run"])


class Program:
    """A function as the leader of a process group, as a terminal starts one; it is killed when the test is over."""

    def __init__(self, errors: Path, function: Callable[..., Any], *values: Any) -> None:
        """What it writes to standard error is in `errors`; what it returns is its exit code."""
        self.errors = errors
        words = (str(errors), torch.get_num_threads(), function, values)
        self.process = CONTEXT.Process(target=_lead, args=words)

    def __enter__(self) -> Program:
        self.process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.join()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def ended(self, seconds: float = 60.0) -> tuple[int, str]:
        """Its exit code, or the negative signal, and what it wrote to standard error."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it still runs after {seconds} s"
        return self.process.exitcode, self.errors.read_text(encoding="utf-8")


def _lead(errors: str, threads: int, function: Callable[..., Any], values: tuple[Any, ...]) -> None:
    os.setsid()
    with open(errors, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    sys.exit(function(*values))


def command_line(*words: str) -> None:
    """`openm6 WORDS`, which ends the process with its exit code."""
    app(args=list(words), prog_name="openm6")
