"""The declared estimate, by hand."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from openm6.energy.processor import MemoryEstimate, ProcessorEstimate, own_cpu_seconds


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


def test_sleep_adds_nothing_but_what_was_computed() -> None:
    clock, cpu = Hand(), Hand()
    processor, memory = ProcessorEstimate(100.0, 4, clock, cpu), MemoryEstimate(16.0, clock)
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
