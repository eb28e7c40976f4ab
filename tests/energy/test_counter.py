"""Summing what counters show: wraps, resets, silence."""

from __future__ import annotations

from openm6.energy.counter import CounterDelta


def rises(wrap: float | None = None, bridges: bool = False) -> CounterDelta:
    return CounterDelta(100.0, 0.0, max_watts=500.0, wrap=wrap, bridges_silence=bridges)


def test_rises_are_summed() -> None:
    sums = rises()
    assert [sums.observe(150.0, 1.0), sums.observe(150.0, 2.0), sums.observe(400.0, 3.0)] == [
        50.0,
        50.0,
        300.0,
    ]
    assert sums.dropped_seconds == 0.0


def test_a_wrap_is_bridged() -> None:
    sums = rises(wrap=65_700.0)
    sums.observe(500.0, 1.0)
    assert CounterDelta(65_600.0, 0.0, 500.0, 65_700.0, bridges_silence=False).observe(50.0, 1.0) == 150.0
    assert sums.joules == 400.0


def test_a_reset_is_dropped_not_taken_for_a_wrap() -> None:
    sums = rises(wrap=65_700.0)
    assert sums.observe(10.0, 1.0) == 0.0  # a wrap would mean 65,610 J in a second
    assert sums.dropped_seconds == 1.0
    assert sums.observe(60.0, 2.0) == 50.0


def test_a_counter_that_starts_anew_without_a_wrap_drops_the_interval() -> None:
    sums = rises()
    assert sums.observe(5.0, 10.0) == 0.0 and sums.observe(15.0, 11.0) == 10.0


def test_silence_is_dropped_unless_the_counter_bridges_it() -> None:
    assert rises().observe(300.0, 3600.0) == 0.0
    assert rises(bridges=True).observe(300.0, 3600.0) == 200.0
