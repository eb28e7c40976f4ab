"""The energy meter: one counter for each device, read rarely enough to cost nothing, tagged by source.

Counters are registers of joules that wrap, or power over time: of GPUs (NVML), processors (RAPL), or estimates.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pynvml
from pydantic import Field, field_validator

from openm6.core.config import Config
from openm6.core.errors import ConfigError
from openm6.core.log import get_log
from openm6.energy.carbon import WORLD, grid

Source = Literal["nvml", "rapl", "estimate"]
SOURCES: tuple[Source, ...] = ("nvml", "rapl", "estimate")  # from the best to the least
# The meter reads every few seconds (meter.POLL_SECONDS). A longer silence means that the machine slept or the process
# was stopped; a counter may have wrapped unseen in it.
SILENCE = 60.0

Clock = Callable[[], float]


@dataclass
class EnergyReading:
    """Joules by source, from the best to the least."""

    by_source: dict[str, float] = field(default_factory=dict)

    @property
    def joules(self) -> float:
        return sum(self.by_source.values())

    @property
    def source(self) -> str:
        return "+".join(self.by_source)


@dataclass(eq=False)
class Counter(ABC):
    """The energy of one device since the counter was opened.

    name: the device, in words; read: a value of the device, which fails with one of `errors` when it does not answer.
    """

    name: str
    source: Source
    read: Callable[[], float]
    errors: tuple[type[Exception], ...] = ()
    clock: Clock = time.monotonic

    def __post_init__(self) -> None:
        self._joules = 0.0
        self._value, self._now = self.read(), self.clock()

    def joules(self) -> float:
        """All joules so far; the sum never falls. Raises one of `errors` if the device does not answer any more."""
        value, now = self.read(), self.clock()
        self._joules += self._added(value, now - self._now)
        self._value, self._now = value, now
        return self._joules

    @abstractmethod
    def _added(self, value: float, seconds: float) -> float:
        """Joules since the value before, so many seconds ago."""


@dataclass(eq=False)
class EnergyRegister(Counter):
    """A register of joules; an interval that is not known is dropped, never guessed.

    wrap: the value at which the register starts from 0 again, None if it never does; max_watts: no device of its
    kind draws more, so a larger rise is a reset; bridges_silence: whether it goes on while nobody reads.
    """

    max_watts: float = math.inf
    wrap: float | None = None
    bridges_silence: bool = False

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


def open_gpus(indices: tuple[int, ...] | None) -> list[Counter]:
    """Counters of the GPUs of these indices in CUDA, None: all visible; the log names each that lacks one."""
    counters: list[Counter] = []
    if indices == ():
        return counters
    try:
        pynvml.nvmlInit()  # for the rest of the process, as torch does
        handles = _visible_handles()
        for index in range(len(handles)) if indices is None else indices:
            if index < len(handles):
                counters += _open(handles[index], index)
            else:
                get_log().warning(f"GPU {index} is not counted: NVML does not show it")
    except (pynvml.NVMLError, ValueError) as error:
        if indices is not None or counters:  # else there may be none
            get_log().warning(f"GPUs are not counted in full: {error}")
    return counters


def _open(handle: Any, index: int) -> list[Counter]:
    """The counter of a board, or none."""
    name, errors = f"GPU {index} {pynvml.nvmlDeviceGetName(handle)}", (pynvml.NVMLError,)

    def joules() -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0

    def watts() -> float:
        return float(pynvml.nvmlDeviceGetPowerUsage(handle)) / 1000.0

    with suppress(pynvml.NVMLError):  # older boards have no such mode
        if pynvml.nvmlDeviceGetMigMode(handle)[0]:
            get_log().warning(f"{name}: MIG is on: the whole card is counted, not its slice")
    with suppress(pynvml.NVMLError):  # Volta and newer count since the driver was loaded
        return [EnergyRegister(name, "nvml", joules, errors, max_watts=4000.0, bridges_silence=True)]
    with suppress(pynvml.NVMLError):
        return [PowerOverTime(name, "estimate", watts, errors)]
    get_log().warning(f"{name} is not counted: it reports neither energy nor power")
    return []


def _visible_handles() -> list[Any]:
    """Boards in CUDA's order, by torch or CUDA_VISIBLE_DEVICES, which holds indices, UUIDs or their beginnings."""
    torch = sys.modules.get("torch")  # a plan does without it
    if torch is not None and torch.cuda.is_initialized():
        with suppress(pynvml.NVMLError):  # a slice of MIG
            uuids = [torch.cuda.get_device_properties(index).uuid for index in range(torch.cuda.device_count())]
            return [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
    every = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return every
    uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in every]
    chosen = []
    for word in (part.strip() for part in visible.split(",") if part.strip()):
        if word.startswith("MIG-"):
            slice_ = pynvml.nvmlDeviceGetHandleByUUID(word)
            chosen.append(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(slice_))
        elif word.isdigit() and int(word) < len(every):
            chosen.append(every[int(word)])
        else:
            found = [handle for handle, uuid in zip(every, uuids, strict=True) if uuid.startswith(word)]
            if not found:
                break  # as CUDA does: what follows an unknown device is not visible
            chosen.append(found[0])
    return chosen


POWERCAP = Path("/sys/class/powercap")
IDLE_FRACTION = 0.1  # of its rated power that a processor draws at no load, as codecarbon assumes
WATTS_PER_CORE = 5.0  # rated power by core: 64 cores of a server have some 350 W, 8 of a laptop some 45 W
WATTS_PER_GIB = 0.375  # of memory: 3 W for 8 GB, as codecarbon assumed


def _joules_in(path: Path) -> float:
    return int(path.read_text()) / 1e6


def open_packages(root: Path = POWERCAP) -> tuple[list[Counter], bool]:
    """Counters of every package and its memory, and whether the memory is among them; none if they may not be read.

    Zones are nested: core and uncore lie within the package, psys contains it, and intel-rapl-mmio shows it again, so
    only packages and DRAM are summed. AMD's processors appear under the same names, without DRAM. A register wraps
    within minutes, so it must be read often.
    """
    counters: list[Counter] = []
    has_memory = False
    zones = sorted(path for path in root.glob("intel-rapl:*") if (path / "name").is_file())
    try:
        for zone in zones:
            kind = (zone / "name").read_text().strip()
            if kind.startswith("package") or kind == "dram":
                read, wrap = partial(_joules_in, zone / "energy_uj"), _joules_in(zone / "max_energy_range_uj")
                errors, name = (OSError, ValueError), f"{zone.name} {kind}"
                counters.append(EnergyRegister(name, "rapl", read, errors, max_watts=2000.0, wrap=wrap))
                has_memory = has_memory or kind == "dram"
    except PermissionError:
        get_log().info(f"RAPL is there, but may not be read: let an administrator allow reading of {root}")
        return [], False
    except (OSError, ValueError) as error:
        get_log().info(f"RAPL cannot be read: {error}")
        return [], False
    return counters, has_memory


def own_cpu_seconds() -> float:
    """Processor time of this process and of its children, those that have ended and, on Linux, those that live."""
    spent, own, ticks = os.times(), os.getpid(), 0
    seconds = spent.user + spent.system + spent.children_user + spent.children_system
    try:
        for child in Path(f"/proc/{own}/task/{own}/children").read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))  # utime, stime and those of its children
        return seconds + ticks / os.sysconf("SC_CLK_TCK")
    except OSError:  # not Linux, or the child ended just now: it is counted among the ended ones next time
        return seconds


class ProcessorEstimate(Counter):
    """Rated watts × (0.1 of the time + 0.9 of the fraction of cores that this process kept busy).

    Without `idle` only the load counts: another process of the machine counts the rest.
    """

    def __init__(
        self,
        rated_watts: float,
        cores: int,
        clock: Clock = time.monotonic,
        cpu_clock: Clock = own_cpu_seconds,
        idle: bool = True,
    ) -> None:
        self._idle_watts = rated_watts * IDLE_FRACTION if idle else 0.0
        self._busy_watts = rated_watts * (1 - IDLE_FRACTION) / cores
        self._value = 0.0
        # While a child ends, a reading may lack what has been counted already.
        read = lambda: max(self._value, cpu_clock())  # noqa: E731
        super().__init__(f"processor, {rated_watts:g} W rated", "estimate", read, clock=clock)

    def _added(self, value: float, seconds: float) -> float:
        # A machine that slept counts only what was computed.
        awake = seconds if seconds <= SILENCE else 0.0
        return self._idle_watts * awake + self._busy_watts * (value - self._value)


def memory_estimate(gib: float, clock: Clock = time.monotonic) -> Counter:
    """Watts per GiB of installed memory, whatever is stored in it."""
    name, watts = f"memory, {gib:.0f} GiB at {WATTS_PER_GIB} W", gib * WATTS_PER_GIB
    return PowerOverTime(name, "estimate", lambda: watts, clock=clock)


def installed_gib() -> float:
    """Memory of the machine; 0 if the system does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError, AttributeError):  # AttributeError: Windows has no sysconf
        return 0.0


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
    """Sums its counters; cumulative since it was opened."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._joules = dict.fromkeys(counters, 0.0)
        self._open = list(counters)  # those that can be read
        self._lock = threading.Lock()
        self._rest_until = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="energy meter", daemon=True)
        self._thread.start()

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
                        get_log().warning(f"{counter.name} is counted only in part: {reason}")
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
        span, before = EnergyReading(), self.joules(fresh=True).by_source
        try:
            yield span
        finally:
            span.by_source = {s: n - before.get(s, 0.0) for s, n in self.joules(fresh=True).by_source.items()}

    def close(self) -> None:
        """Read once more; `joules` returns the last sum from then on."""
        self._stop.set()
        self._thread.join()
        self.joules(fresh=True)
        with self._lock:
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
    boards = open_gpus(None if gpus is None else tuple(gpus))
    packages, has_memory = open_packages()
    if not packages:
        # Of the machine, as `cpu_watts` is, even if this process may use only some of them.
        cores = os.cpu_count() or 1
        packages = [ProcessorEstimate(cpu_watts or WATTS_PER_CORE * cores, cores, idle=rank == 0)]
    elif rank:
        packages = []
    if rank == 0 and not has_memory and (gib := installed_gib()) > 0:
        packages.append(memory_estimate(gib))
    return Meter([*boards, *packages])
