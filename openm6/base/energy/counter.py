"""What every source of joules offers, and how the rises of a counter are summed when it wraps or starts anew."""

from __future__ import annotations

from typing import Protocol

from openm6.base.energy.reading import Source

# The meter reads every few seconds (meter.POLL_SECONDS). A longer silence means that the machine slept or the process
# was stopped; a counter may have wrapped unseen in it.
SILENCE = 60.0


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


class Rises:
    """Sums the rises of a counter; an interval that cannot be told is dropped, never guessed.

    wrap: the value at which the counter starts from 0 again, None where it never does; most_watts: no device of its
    kind draws more, so a larger rise is a reset; bridges_silence: whether the counter goes on while nobody reads.
    """

    def __init__(
        self, value: float, now: float, most_watts: float, wrap: float | None = None, *, bridges_silence: bool
    ) -> None:
        self.joules = 0.0
        self.dropped_seconds = 0.0
        self._value, self._now = value, now
        self._most_watts, self._wrap, self._bridges = most_watts, wrap, bridges_silence

    def observe(self, value: float, now: float) -> float:
        """Take in the counter's value, in joules, at the moment `now`, in seconds; gives the sum."""
        rise, seconds = value - self._value, now - self._now
        self._value, self._now = value, now
        if rise < 0 and self._wrap is not None:
            rise += self._wrap
        told = 0 <= rise <= self._most_watts * (seconds + 1.0) and (self._bridges or seconds <= SILENCE)
        if told:
            self.joules += rise
        else:
            self.dropped_seconds += seconds
        return self.joules
