"""What every counter of joules offers: readings by source, and sums of a counter that wraps or is reset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Source = Literal["nvml", "rapl", "estimate"]
SOURCES: tuple[Source, ...] = ("nvml", "rapl", "estimate")  # from the best to the least
# The meter reads every few seconds (meter.POLL_SECONDS). A longer silence means that the machine slept or the process
# was stopped; a counter may have wrapped unseen in it.
SILENCE = 60.0


@dataclass(frozen=True)
class EnergyReading:
    """Joules, their sources joined by `+` from the best to the least, and how many came from each."""

    joules: float
    source: str
    by_source: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, by_source: Mapping[str, float]) -> EnergyReading:
        """The reading of parts, of which a source without a counter has none."""
        known: dict[str, float] = {source: by_source[source] for source in SOURCES if source in by_source}
        return cls(sum(known.values()), "+".join(known), known)

    def since(self, earlier: EnergyReading) -> EnergyReading:
        """What was added after `earlier`."""
        parts = {
            source: joules - earlier.by_source.get(source, 0.0) for source, joules in self.by_source.items()
        }
        return EnergyReading.of(parts)


class CounterLostError(Exception):
    """A counter cannot be read any more; the meter stops counting its device and says so."""


class Counter(Protocol):
    """The energy of one device since the counter was opened."""

    name: str  # the device, in words
    source: Source

    def joules(self) -> float:
        """Never falls.

        Raises:
            CounterLostError: the device does not answer any more.
        """

    def close(self) -> None:
        """Let go of the device."""


class CounterDelta:
    """Sums the increases of a counter; an interval that is not known is dropped, never guessed.

    wrap: the value at which the counter starts from 0 again, None where it never does; max_watts: no device of its
    kind draws more, so a larger rise is a reset; bridges_silence: whether the counter goes on while nobody reads.
    """

    def __init__(
        self, value: float, now: float, max_watts: float, wrap: float | None = None, *, bridges_silence: bool
    ) -> None:
        self.joules = 0.0
        self.dropped_seconds = 0.0
        self._value, self._now = value, now
        self._max_watts, self._wrap, self._bridges = max_watts, wrap, bridges_silence

    def observe(self, value: float, now: float) -> float:
        """Add the counter's value, in joules, at the moment `now`, in seconds; return the sum."""
        rise, seconds = value - self._value, now - self._now
        self._value, self._now = value, now
        if rise < 0 and self._wrap is not None:
            rise += self._wrap
        known = 0 <= rise <= self._max_watts * (seconds + 1.0) and (self._bridges or seconds <= SILENCE)
        if known:
            self.joules += rise
        else:
            self.dropped_seconds += seconds
        return self.joules
