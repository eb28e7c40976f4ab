"""How benchmarks measure: runs taken in turn, warmed up, medians with their spread, cut short at a deadline."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from openm6.base.files import replace_text


@dataclass
class Timing:
    """Seconds of one contender's timed runs."""

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
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int,
    deadline: Deadline,
    device: torch.device | None = None,
    into: dict[str, Timing] | None = None,
) -> dict[str, Timing]:
    """Times the contenders in turn, so that a machine that warms or throttles treats all alike.

    Each is called `warmup` times untimed, then up to `repeats` times; past the deadline it ends as soon as every
    contender has one timing. Seconds are of wall time, the device's queue drained before and after. Timings go `into`
    the dict that is given, so that whoever is cut short still has those that were taken.
    """
    timings = into if into is not None else {}
    for name in contenders:
        timings.setdefault(name, Timing())
    for call in contenders.values():
        for _ in range(warmup):
            call()
    for number in range(repeats):
        if number and deadline.passed:
            break
        for name, call in contenders.items():
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
