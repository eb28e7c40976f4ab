"""Seconds by phase of a step, on the device's own clock."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up the time that the compute lane spends in each named span; off unless `running`."""

    def __init__(self, device: torch.device) -> None:
        self.running = False
        self._cuda = device.type == "cuda"
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Times what is given to the device within; spans of different names must not overlap."""
        if not self.running:
            yield
            return
        began = self._now()
        yield
        self._spans.append((name, began, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        seconds: dict[str, float] = defaultdict(float)
        for name, began, ended in self._spans:
            seconds[name] += began.elapsed_time(ended) / 1000 if self._cuda else ended - began
        self._spans = []
        return dict(seconds)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
