"""Counters of joules: readings by source, energy registers that wrap or are reset, and power over time."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Source = Literal["nvml", "rapl", "estimate"]
SOURCES: tuple[Source, ...] = ("nvml", "rapl", "estimate")  # from the best to the least
# The meter reads every few seconds (meter.POLL_SECONDS). A longer silence means that the machine slept or the process
# was stopped; a counter may have wrapped unseen in it.
SILENCE = 60.0

Clock = Callable[[], float]


@dataclass
class EnergyReading:
    """Joules by source, from the best to the least, and the seconds in which they were spent, if these are known."""

    by_source: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def joules(self) -> float:
        return sum(self.by_source.values())

    @property
    def source(self) -> str:
        """The sources joined by `+`."""
        return "+".join(self.by_source)


class Counter(ABC):
    """The energy of one device since the counter was opened.

    name: the device, in words; read: a value of the device, which fails with one of `errors` when it does not answer.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        read: Callable[[], float],
        errors: tuple[type[Exception], ...] = (),
        close: Callable[[], None] = lambda: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.name, self.source, self.errors, self.close = name, source, errors, close
        self._read, self._clock = read, clock
        self._joules = 0.0
        self._value, self._now = read(), clock()

    def joules(self) -> float:
        """All joules so far; the sum never falls. Raises one of `errors` if the device does not answer any more."""
        value, now = self._read(), self._clock()
        self._joules += self._added(value, now - self._now)
        self._value, self._now = value, now
        return self._joules

    @abstractmethod
    def _added(self, value: float, seconds: float) -> float:
        """Joules since the value before, so many seconds ago."""


class EnergyRegister(Counter):
    """A register of joules; an interval that is not known is dropped, never guessed.

    wrap: the value at which the register starts from 0 again, None if it never does; max_watts: no device of its
    kind draws more, so a larger rise is a reset; bridges_silence: whether it goes on while nobody reads.
    """

    max_watts: float
    wrap: float | None = None
    bridges_silence = False

    def _added(self, value: float, seconds: float) -> float:
        rise = value - self._value
        if rise < 0 and self.wrap is not None:
            rise += self.wrap
        known = 0 <= rise <= self.max_watts * (seconds + 1.0) and (self.bridges_silence or seconds <= SILENCE)
        return rise if known else 0.0


class PowerOverTime(Counter):
    """Watts read now and then, times the time between: an estimate, since the draw between two reads is unknown."""

    def _added(self, value: float, seconds: float) -> float:
        return (value + self._value) / 2 * seconds if seconds <= SILENCE else 0.0
