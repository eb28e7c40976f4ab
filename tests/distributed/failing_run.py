"""A program of two ranks, of which rank 1 fails in the way that its argument names, or rank 0 at its end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from openm6.core.errors import OpenM6Error, TrainingError
from openm6.distributed.processes import DistributedContext

# Seconds that a collective waits. The ranks, forked, must also have started within that time, on a busy machine, too.
PATIENCE = 5.0


def main(way: str, folder: Path) -> None:
    ranks = DistributedContext(torch.device("cpu"), timeout_seconds=PATIENCE if way in ("hang", "end") else 60.0)
    with ranks.guard():
        ranks.all_reduce([1])
        if ranks.rank == 1:
            if way == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            if way == "hang":
                time.sleep(30)
        with ranks.main_process_first():
            if way == "end" and ranks.is_main_process:
                time.sleep(PATIENCE + 1)  # longer than a collective waits
                raise TrainingError("the report could not be written")
        ranks.all_reduce([1])
        (folder / f"rank-{ranks.rank}").touch()


def program(way: str, folder: str) -> int:
    """The exit code, after one sentence for what went wrong, as of the command line."""
    try:
        main(way, Path(folder))
    except OpenM6Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def as_rank(rank: int, port: int, way: str, folder: str) -> int:
    """What the launcher starts, in a process that has imported torch."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return program(way, folder)


if __name__ == "__main__":
    sys.exit(program(sys.argv[1], sys.argv[2]))
