"""RAPL as Linux shows it, on a copy of its folder, and the declared estimate, by hand."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openm6.energy import meter as devices
from openm6.energy.meter import ProcessorEstimate, memory_estimate, own_cpu_seconds


def zone(root: Path, folder: str, name: str, microjoules: int) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text("65712999613\n")
    return path


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 900_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 500_000)
    zone(tmp_path, "intel-rapl:1", "psys", 9_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def test_packages_and_memory_are_summed_once(powercap: Path) -> None:
    counters, has_memory = devices.open_packages(powercap)
    assert [counter.name for counter in counters] == ["intel-rapl:0 package-0", "intel-rapl:0:1 dram"]
    assert has_memory


def test_microjoules_become_joules_and_wrap(powercap: Path) -> None:
    counter = devices.open_packages(powercap)[0][0]
    assert counter.joules() == 0.0
    (powercap / "intel-rapl:0" / "energy_uj").write_text("3500000")
    assert counter.joules() == pytest.approx(2.5)


def test_a_zone_that_goes_away_is_lost(powercap: Path) -> None:
    counter = devices.open_packages(powercap)[0][0]
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    with pytest.raises(counter.errors):
        counter.joules()


def test_no_rapl_is_no_counter(tmp_path: Path) -> None:
    assert devices.open_packages(tmp_path / "nothing") == ([], False)


def test_a_counter_only_root_may_read_is_named(
    powercap: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> float:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(devices, "_joules_in", refuse)  # root, who may run the tests, reads everything
    with caplog.at_level(logging.INFO):
        assert devices.open_packages(powercap) == ([], False)
    assert "may not be read" in caplog.messages[0]


class Hand:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rated_power_by_load() -> None:
    clock, cpu = Hand(), Hand()
    estimate = ProcessorEstimate(100.0, 4, clock, cpu)
    clock.now, cpu.now = 10.0, 20.0  # half of four cores for ten seconds
    assert estimate.joules() == pytest.approx(100 * 10 * (0.1 + 0.9 * 0.5))
    clock.now = 20.0  # idle
    assert estimate.joules() == pytest.approx(550 + 100 * 10 * 0.1)
    second = ProcessorEstimate(100.0, 4, clock, cpu, idle=False)
    clock.now, cpu.now = 30.0, 30.0
    assert second.joules() == pytest.approx(100 * 10 * 0.9 * 0.25)


def test_a_reading_without_what_was_counted_before_repeats_nothing() -> None:
    """While a child ends, the time of all of them is missing from one reading."""
    clock, cpu = Hand(), Hand()
    estimate = ProcessorEstimate(100.0, 4, clock, cpu, idle=False)
    for cpu.now in (3600.0, 5.0, 3602.0):
        spent = estimate.joules()
    assert spent == pytest.approx(100 * 0.9 * 3602 / 4)


def test_sleep_adds_nothing_but_what_was_computed() -> None:
    clock, cpu = Hand(), Hand()
    processor, memory = ProcessorEstimate(100.0, 4, clock, cpu), memory_estimate(16.0, clock)
    clock.now, cpu.now = 8 * 3600.0, 2.0
    assert processor.joules() == pytest.approx(100 * 0.9 * 2 / 4)
    assert memory.joules() == 0.0
    clock.now += 10.0
    assert memory.joules() == pytest.approx(16 * 0.375 * 10)


@pytest.mark.skipif(sys.platform != "linux", reason="living children are read from /proc")
def test_a_child_counts_while_it_lives_and_once_when_it_has_ended() -> None:
    before = own_cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        deadline = time.monotonic() + 30
        while own_cpu_seconds() < before + 0.05 and time.monotonic() < deadline:
            time.sleep(0.01)
        living = own_cpu_seconds() - before
        assert living > 0.045
    finally:
        child.kill()
        child.wait()
    assert living - 0.03 <= own_cpu_seconds() - before < 2 * living + 0.5
