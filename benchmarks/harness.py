"""Measurement and report of benchmarks: interleaved timing, medians, one JSON object, also if interrupted."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, Any

import torch
import typer

from openm6.core.files import check_writable, replace_text, to_json

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the results to this file.")]
Seconds = Annotated[float, typer.Option("--seconds", help="Time after which no new part starts.")]
TimeLimit = Annotated[
    float | None,
    typer.Option("--seconds", min=1.0, help="Time after which no new part starts; default by device."),
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Timed steps.")]
Baseline = Annotated[str, typer.Option("--baseline", metavar="transformers|none", help="Baseline.")]
SizesName = Annotated[
    str | None,
    typer.Option("--config", metavar="a|fine|cpu", help="Sizes; default by device."),
]
LIMIT = 450.0  # seconds; with the start of Python and torch, a benchmark ends within eight minutes
SPARE = 30.0  # seconds after the deadline for the part in progress
ENDINGS = {"SIGINT": "stopped by Ctrl-C", "SIGTERM": "stopped by SIGTERM", "SIGALRM": "the time was over"}


@dataclass
class Timing:
    """Seconds of one candidate's timed runs."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float | int]:
        """Return median, minimum, maximum and number of runs, for the JSON."""
        return {
            "median": self.median,
            "min": min(self.seconds),
            "max": max(self.seconds),
            "runs": len(self.seconds),
        }


class Deadline:
    """The time after which a benchmark starts no new part."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds left; never below zero."""
        return max(0.0, self.end - self._clock())

    @property
    def passed(self) -> bool:
        return self.left == 0.0


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int,
    deadline: Deadline,
    device: torch.device | None = None,
    into: dict[str, Timing] | None = None,
) -> dict[str, Timing]:
    """Time the candidates in turn, so that a machine that warms up or throttles affects all alike.

    Each is called `warmup` times untimed, then up to `repeats` times; after the deadline the loop ends as soon as every
    candidate has one timing. Seconds are wall time, with the device synchronized before and after. Timings are stored
    in `into`, so that they remain after an interruption.
    """
    timings = into if into is not None else {}
    for name in candidates:
        timings.setdefault(name, Timing())
    for call in candidates.values():
        for _ in range(warmup):
            call()
    for number in range(repeats):
        if number and deadline.passed:
            break
        for name, call in candidates.items():
            _drain(device)
            began = time.perf_counter()
            call()
            _drain(device)
            timings[name].seconds.append(time.perf_counter() - began)
    return timings


def emit(result: Mapping[str, Any], path: Path | None) -> None:
    """Print the result as one JSON object, and write it to `path` if there is one."""
    text = to_json(result, indent=2)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    if path is not None:
        replace_text(path, text + "\n")


def speed_ratio(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> float | None:
    """Return our tokens per second over theirs; None if either was not measured."""
    if ours is None or theirs is None:
        return None
    return round(float(ours["tokens_per_second"] / theirs["tokens_per_second"]), 3)


def device_name(device: torch.device) -> str:
    """Return the name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _drain(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


class CutShort(BaseException):
    """Raised in the benchmark when it must end; no `except Exception` catches it."""


class Report:
    """The JSON object of one benchmark; as a context manager it prints the results at the end of the block.

    Use `with Report(path, seconds) as report:`; no part starts after its `deadline`. After the limit, on Ctrl-C and on
    SIGTERM, `CutShort` leaves the block, `cut_short` holds the reason, and the results so far are printed. Any other
    error propagates, after the same. Other threads than the main one get no signals: only the deadline applies.
    """

    def __init__(
        self,
        path: Path | None,
        seconds: float,
        limit: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """seconds: no new part starts later; limit: seconds after which the results so far are printed.

        Raises:
            ConfigError: `path` cannot be written.
        """
        if path is not None:
            check_writable(path, "--json")
        self.deadline = Deadline(seconds, clock)
        self.found: dict[str, Any] = {}
        self._limit = limit if limit is not None else max(LIMIT, seconds + SPARE)
        self._path = path
        self._late: list[Callable[[], Mapping[str, Any]]] = []
        self._at_end: list[Callable[[], Mapping[str, Any]]] = []
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()
        self._ending: signal.Signals | None = None

    def __setitem__(self, name: str, value: Any) -> None:
        self.found[name] = value

    def update(self, found: Mapping[str, Any]) -> None:
        """Add several entries. Lists and dicts may grow afterwards: they are printed in their final state."""
        self.found.update(found)

    def later(self, name: str, make: Callable[[], Any]) -> None:
        """Add an entry that is computed when the report is printed; it keeps its position."""
        self.found[name] = None
        self._late.append(lambda: {name: make()})

    def at_end(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Add several entries that are computed when the report is printed."""
        self._at_end.append(make)

    def __enter__(self) -> Report:
        if threading.current_thread() is threading.main_thread():  # handlers can be set there only
            for number in signal.Signals:
                if number.name in ENDINGS:
                    self._previous[number] = signal.signal(number, self._end)
            if sys.platform != "win32":  # Windows has no alarm: only the deadline applies
                signal.setitimer(signal.ITIMER_REAL, self._limit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._restore_signals()
        ending = self._ending
        failure = error if ending is None else None
        if failure is not None and not self.found:
            return False
        for make in [*self._late, *self._at_end]:
            try:
                self.found.update(make())
            except Exception as other:  # one that fails must not lose the rest
                failure = failure or other
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0] if failure else None
        self.found["cut_short"] = ENDINGS[ending.name] if ending else reason
        emit(self.found, self._path)
        if failure is not None and failure is not error:
            raise failure
        if ending is not None and ending.name != "SIGALRM":
            sys.exit(128 + ending)
        return failure is None

    def _end(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked process inherits the handler; it ends as without one
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self._ending is None:
            self._ending = signal.Signals(number)
            raise CutShort

    def _restore_signals(self) -> None:
        if sys.platform != "win32" and self._previous:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
