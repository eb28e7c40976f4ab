"""The energy meter: one counter for each device, read rarely enough to cost nothing, tagged by source."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from pydantic import Field, field_validator

from openm6.core.config import Config
from openm6.core.errors import ConfigError
from openm6.core.log import get_log
from openm6.energy.carbon import WORLD, grid
from openm6.energy.devices import (
    SOURCES,
    WATTS_PER_CORE,
    Counter,
    EnergyReading,
    ProcessorEstimate,
    installed_gib,
    memory_estimate,
    open_gpus,
    open_packages,
)

POLL_SECONDS = 10.0  # a counter of RAPL wraps in minutes, so it must be read in a long step, too
MAX_REST = 1.0  # seconds
# Fraction of the time that reading may take: what is asked for more often is answered from the last reading.
MAX_TIME_FRACTION = 0.002


class EnergyConfig(Config):
    """`country` by three-letter code or name; `pue`: joules of the building for each joule of the devices.

    cpu_watts: rated power of all processors, for the estimate if nothing can be read; default 5 W per core.
    """

    country: str = WORLD
    pue: float = Field(default=1.0, ge=1.0, le=3.0)
    cpu_watts: float | None = Field(default=None, gt=0)

    @field_validator("country")
    @classmethod
    def _known(cls, country: str) -> str:
        try:
            return grid(country).code
        except ConfigError as error:
            raise ValueError(str(error)) from None


class Meter(AbstractContextManager["Meter"]):
    """Sums its counters; cumulative since it was opened. `notes` lists what is not counted, or only in part."""

    def __init__(self, counters: Sequence[Counter], notes: Sequence[str] = ()) -> None:
        self.notes = list(notes)
        self._joules = dict.fromkeys(counters, 0.0)
        self._open = list(counters)  # those that can be read
        self._lock = threading.Lock()
        self._rest_until = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="energy meter", daemon=True)
        self._thread.start()

    @property
    def devices(self) -> list[str]:
        """What is counted and how, in words."""
        return [f"{counter.name} ({counter.source})" for counter in self._joules]

    def joules(self, fresh: bool = False) -> EnergyReading:
        """All joules since the meter was opened; with `fresh`, read now whatever it costs."""
        with self._lock:
            began = time.perf_counter()
            if fresh or began >= self._rest_until:
                for counter in list(self._open):
                    try:
                        self._joules[counter] = counter.joules()
                    except counter.errors as reason:
                        self._open.remove(counter)
                        self.notes.append(f"{counter.name} is counted only in part: {reason}")
                        get_log().warning(self.notes[-1])
                ended = time.perf_counter()
                # On a busy machine a reading may take long by the clock; the meter must not pause for that long.
                self._rest_until = ended + min((ended - began) / MAX_TIME_FRACTION, MAX_REST)
            by_source: dict[str, float] = {}
            for source in SOURCES:
                found = [joules for counter, joules in self._joules.items() if counter.source == source]
                if found:
                    by_source[source] = sum(found)
        return EnergyReading(by_source)

    @contextmanager
    def span(self) -> Iterator[EnergyReading]:
        """Measure what happens inside: `with meter.span() as span: ...`, then `span.joules`."""
        span, before, began = EnergyReading(), self.joules(fresh=True).by_source, time.perf_counter()
        try:
            yield span
        finally:
            span.by_source = {s: n - before.get(s, 0.0) for s, n in self.joules(fresh=True).by_source.items()}
            span.seconds = time.perf_counter() - began

    def close(self) -> None:
        """Read once more and let go of the devices; `joules` returns the last sum from then on."""
        self._stop.set()
        self._thread.join()
        self.joules(fresh=True)
        with self._lock:
            for counter in self._open:
                counter.close()
            self._open.clear()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.joules()


def open_meter(gpus: Sequence[int] | None = None, cpu_watts: float | None = None) -> Meter:
    """A meter of this machine's devices.

    gpus: indices in CUDA, empty for none; by default all visible, or that of the process if several use the machine.
    cpu_watts: rated power of all processors, for the estimate if RAPL cannot be read; by default 5 W per core.
    Only the first process of a machine counts processor and memory, so that nothing is counted twice; the others add
    an estimate of their own load if there is no counter of all.
    """
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if gpus is None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        gpus = (rank,)
    boards, notes = open_gpus(None if gpus is None else tuple(gpus))
    packages, has_memory, why = open_packages()
    if not packages:
        # Of the machine, as `cpu_watts` is, even if this process may use only some of them.
        cores = os.cpu_count() or 1
        packages = [ProcessorEstimate(cpu_watts or WATTS_PER_CORE * cores, cores, idle=rank == 0)]
    elif rank:
        packages = []
    if rank == 0:
        notes += why
        if not has_memory and (gib := installed_gib()) > 0:
            packages.append(memory_estimate(gib))
    return Meter([*boards, *packages], notes)
