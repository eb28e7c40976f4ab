"""Counters of joules: readings by source, energy registers that wrap or are reset, and power over time."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Source = Literal["nvml", "rapl", "estimate"]
SOURCES: tuple[Source, ...] = ("nvml", "rapl", "estimate")  # from the best to the least
# The meter reads every few seconds (meter.POLL_SECONDS). A longer silence means that the machine slept or the process
# was stopped; a counter may have wrapped unseen in it.
SILENCE = 60.0

Clock = Callable[[], float]


@dataclass(frozen=True)
class EnergyReading:
    """Joules, their sources joined by `+` from the best to the least, and how many came from each."""

    joules: float
    source: str
    by_source: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, by_source: Mapping[str, float]) -> EnergyReading:
        """The reading of parts, of which a source without a counter has none."""
        parts: dict[str, float] = {source: by_source[source] for source in SOURCES if source in by_source}
        return cls(sum(parts.values()), "+".join(parts), parts)

    def since(self, earlier: EnergyReading) -> EnergyReading:
        """What was added after `earlier`."""
        before = earlier.by_source
        return EnergyReading.of({s: joules - before.get(s, 0.0) for s, joules in self.by_source.items()})


class CounterLostError(Exception):
    """A counter cannot be read any more; the meter stops counting its device and reports it."""


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
        self.name, self.source = name, source
        self._read, self._errors, self._clock = read, errors, clock
        self.close = close
        self._joules = 0.0
        self._value, self._now = read(), clock()

    def joules(self) -> float:
        """All joules so far; the sum never falls.

        Raises:
            CounterLostError: the device does not answer any more.
        """
        try:
            value, now = self._read(), self._clock()
        except self._errors as error:
            raise CounterLostError(str(error)) from None
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
