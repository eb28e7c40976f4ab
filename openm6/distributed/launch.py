"""Starting the processes of a run on this machine with torch's elastic launcher, the engine of `torchrun`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from types import FrameType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from openm6.core.device import usable_cores
from openm6.core.errors import Interrupted, TrainingError
from openm6.distributed.worker_pool import STOPS, children, handled_stops

SAVING_SECONDS = "600"  # that stopped ranks have to save before they are killed


def launch(words: list[str], processes: int, max_restarts: int = 0, module: str = "openm6") -> None:
    """Run `python -m MODULE WORDS` in `processes` processes of this machine until all have ended.

    After a failure of any process all are started again, up to `max_restarts` times; they go on from the newest
    checkpoint. TrainingError: a process failed for good, its own sentence stands above; Interrupted: by a signal.
    """
    # One thread each by default: threads of several processes would compete for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    # Else a restart meets at the store of the attempt before, where the addresses of the dead still stand.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVING_SECONDS)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=max_restarts, monitor_interval=0.2, signals_to_handle="SIGQUIT",
    )  # fmt: skip
    before = {number: signal.signal(number, _stop) for number in handled_stops()}
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a failure is reported below, once
    try:
        elastic_launch(config, sys.executable)("-m", module, *words)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        rank, code = next(iter(codes.items()))
        if stopped := [number for number in STOPS if 128 + number in codes.values()]:
            raise Interrupted("stopped and saved: go on with --resume", stopped[0]) from None
        how = f"failed with exit code {code}, for the reason given above"
        if code < 0:
            how = f"was killed ({signal.Signals(-code).name}): go on with --resume"
        raise TrainingError(f"rank {rank} of {processes} {how}") from None
    except SignalException as error:
        raise Interrupted("stopped: go on with --resume", error.sigval) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    """Let torch's launcher pass a first signal on to the ranks and wait for them; of later ones pass on Ctrl-C alone.

    Each rank is in a session of its own, which neither the terminal nor a signal to the launcher's group reaches.
    """
    for later in handled_stops():
        signal.signal(later, _interrupt_ranks)
    raise SignalException("stopped", signal.Signals(number))


def _interrupt_ranks(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        for rank in children():
            os.kill(rank, number)
