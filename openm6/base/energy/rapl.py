"""Processors and memory through RAPL, the energy counters that Linux shows under /sys/class/powercap."""

from __future__ import annotations

import time
from pathlib import Path

from openm6.base.energy.counter import Counter, CounterLostError, Rises
from openm6.base.energy.reading import Source

POWERCAP = Path("/sys/class/powercap")
MOST_WATTS = 2000.0  # of one package or its memory


class RaplCounter:
    """One zone, in microjoules; it wraps within minutes, so it must be read often."""

    source: Source = "rapl"

    def __init__(self, zone: Path, name: str) -> None:
        self.name = name
        self._path = zone / "energy_uj"
        wrap = int((zone / "max_energy_range_uj").read_text()) / 1e6
        self._rises = Rises(self._read(), time.monotonic(), MOST_WATTS, wrap, bridges_silence=False)

    def joules(self) -> float:
        try:
            return self._rises.observe(self._read(), time.monotonic())
        except (OSError, ValueError) as error:
            raise CounterLostError(str(error)) from None

    def close(self) -> None:
        pass

    def _read(self) -> float:
        return int(self._path.read_text()) / 1e6


def open_packages(root: Path = POWERCAP) -> tuple[list[Counter], bool, list[str]]:
    """Counters of every package and its memory, whether the memory is among them, and why one is missing.

    Zones are nested: core and uncore lie within the package, psys contains it, and intel-rapl-mmio shows it again, so
    only packages and DRAM are summed. AMD's processors appear under the same names, without DRAM.
    """
    counters: list[Counter] = []
    has_memory = False
    zones = sorted(path for path in root.glob("intel-rapl:*") if (path / "name").is_file())
    try:
        for zone in zones:
            kind = (zone / "name").read_text().strip()
            if kind.startswith("package") or kind == "dram":
                counters.append(RaplCounter(zone, f"{zone.name} {kind}"))
                has_memory = has_memory or kind == "dram"
    except PermissionError:
        return (
            [],
            False,
            [f"RAPL is there, but may not be read: let an administrator allow reading of {root}"],
        )
    except (OSError, ValueError) as error:
        return [], False, [f"RAPL cannot be read: {error}"]
    return counters, has_memory, []
