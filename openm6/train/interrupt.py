"""Signals to stop as a wish: the step ends and the run saves itself; Ctrl-C after that stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from openm6.base.log import get_log
from openm6.parallel.worker_pool import handled_stops


class Interrupt:
    """While entered, a signal to stop is kept in `requested`; a further SIGINT raises KeyboardInterrupt.

    A further SIGTERM or SIGHUP changes nothing: `timeout` and others send theirs both to a process and to its group.
    """

    def __init__(self) -> None:
        self.requested = 0  # number of the first signal
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._previous = {number: signal.signal(number, self._handle) for number in handled_stops()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = number
            get_log().info("stopping after this step; press Ctrl-C again to stop at once without saving")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
