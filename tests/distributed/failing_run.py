"""A program for the launcher, of which rank 1 fails in the way that its argument names, or rank 0 at its end."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from openm6.core.errors import OpenM6Error, TrainingError
from openm6.distributed.processes import DistributedContext

# Seconds that a collective waits. The ranks must also have started within that time, on a busy machine, too.
PATIENCE = 10.0


def main(way: str, folder: Path) -> None:
    ranks = DistributedContext(torch.device("cpu"), timeout_seconds=PATIENCE if way in ("hang", "end") else 60.0)
    with ranks.guard():
        ranks.all_reduce([1])
        if ranks.rank == 1:
            if way == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            if way == "hang":
                time.sleep(30)
            if way == "killed" and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        with ranks.main_process_first():
            if way == "end" and ranks.is_main_process:
                time.sleep(PATIENCE + 1)  # longer than a collective waits
                raise TrainingError("the report could not be written")
        ranks.all_reduce([1])
        (folder / f"rank-{ranks.rank}").write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except OpenM6Error as error:  # as the command line does
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
