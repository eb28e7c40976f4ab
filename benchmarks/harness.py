"""How benchmarks measure and report: interleaved timing, medians, one JSON object, also if they are cut short."""

from __future__ import annotations

import json
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

from openm6.core.files import replace_text

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results there as well.")]
Seconds = Annotated[float, typer.Option("--seconds", help="No new part begins after so long.")]
TimeLimit = Annotated[
    float | None,
    typer.Option("--seconds", min=1.0, help="No new part begins after so long; by default by device."),
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Timed steps.")]
Baseline = Annotated[str, typer.Option("--baseline", metavar="transformers|none", help="The baseline.")]
SizesName = Annotated[
    str | None,
    typer.Option("--config", metavar="a|fine|cpu", help="Sizes: by default those that fit the device."),
]
LIMIT = 450.0  # seconds: with the start of Python and torch before it, a benchmark ends within eight minutes
SPARE = 30.0  # seconds beyond the deadline for the part that is under way
ENDINGS = {"SIGINT": "stopped by Ctrl-C", "SIGTERM": "stopped by SIGTERM", "SIGALRM": "the time was up"}


@dataclass
class Timing:
    """Seconds of one candidate's timed runs."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float | int]:
        """Median, fastest, slowest and number of runs, for the JSON."""
        return {
            "median": self.median,
            "min": min(self.seconds),
            "max": max(self.seconds),
            "runs": len(self.seconds),
        }


class Deadline:
    """The moment by which a benchmark must have printed what it has."""

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
    """Times the candidates in turn, so that a machine that warms or throttles treats all alike.

    Each is called `warmup` times untimed, then up to `repeats` times; past the deadline it ends as soon as every
    candidate has one timing. Seconds are of wall time, the device's queue drained before and after. Timings go `into`
    the dict that is given, so that whoever is cut short still has those that were taken.
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
    """Prints the result as one JSON object on standard output, and writes it to `path` where one is given."""
    text = json.dumps(result, indent=2, ensure_ascii=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    if path is not None:
        replace_text(path, text + "\n")


def speed_ratio(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> float | None:
    """Our tokens a second over theirs; None where either was not measured."""
    if ours is None or theirs is None:
        return None
    return round(float(ours["tokens_per_second"] / theirs["tokens_per_second"]), 3)


def device_name(device: torch.device) -> str:
    """What the figures were taken on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _drain(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


class CutShort(BaseException):
    """Raised wherever the benchmark is when it has to end; no `except Exception` holds it up."""


class Report:
    """The JSON object of one benchmark; as a context it sees to it that what there is gets printed.

    Used as `with Report(path, seconds) as report:`; no part begins past its `deadline`. Past the limit, on Ctrl-C and
    on SIGTERM, `CutShort` leaves the block, `cut_short` holds the reason, and the results so far are printed. Any other
    error passes through and prints nothing. Threads other than the main one get no signals: only the deadline holds.
    """

    def __init__(
        self,
        path: Path | None,
        seconds: float,
        limit: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """seconds: after these no new part begins; limit: after these what is there is printed."""
        self.deadline = Deadline(seconds, clock)
        self.found: dict[str, Any] = {}
        self._limit = limit if limit is not None else max(LIMIT, seconds + SPARE)
        self._path = path
        self._late: dict[str, Callable[[], Any]] = {}
        self._at_end: list[Callable[[], Mapping[str, Any]]] = []
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()
        self._ending: signal.Signals | None = None

    def __setitem__(self, name: str, value: Any) -> None:
        self.found[name] = value

    def update(self, found: Mapping[str, Any]) -> None:
        """Several entries at once. Lists and dicts may go on growing afterwards: they are printed as they are then."""
        self.found.update(found)

    def later(self, name: str, make: Callable[[], Any]) -> None:
        """An entry that is worked out when the report is printed, from what was measured by then; its place is here."""
        self.found[name] = None
        self._late[name] = make

    def at_end(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Several entries that are worked out when the report is printed."""
        self._at_end.append(make)

    def __enter__(self) -> Report:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in signal.Signals:
                if number.name in ENDINGS:
                    self._previous[number] = signal.signal(number, self._end)
            if sys.platform != "win32":  # which has no alarm: there the deadline alone holds
                signal.setitimer(signal.ITIMER_REAL, self._limit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._restore_signals()
        ending = self._ending
        if error is not None and ending is None:
            return False
        for name, make in self._late.items():
            self.found[name] = make()
        for several in self._at_end:
            self.found.update(several())
        self.found["cut_short"] = ENDINGS[ending.name] if ending else None
        emit(self.found, self._path)
        if ending is not None and ending.name != "SIGALRM":
            sys.exit(128 + ending)
        return True

    def _end(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked process inherits the handler: it ends as it would without
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
