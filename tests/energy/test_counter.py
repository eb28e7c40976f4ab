"""Summing what counters show: wraps, resets, silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from openm6.energy.meter import EnergyRegister


def register(wrap: float | None = None, bridges: bool = False) -> Callable[[float, float], float]:
    """What a register of at most 500 W, which shows 100 J at first, adds up to when it shows a value at a time."""
    shown = [100.0, 0.0]
    counter = EnergyRegister(
        "x", "rapl", lambda: shown[0], clock=lambda: shown[1], max_watts=500.0, wrap=wrap, bridges_silence=bridges
    )

    def observe(value: float, now: float) -> float:
        shown[:] = value, now
        return counter.joules()

    return observe


@pytest.mark.parametrize(
    ("wrap", "bridges", "seen"),
    [
        pytest.param(None, False, [(150, 1, 50), (150, 2, 50), (400, 3, 300)], id="rises are summed"),
        pytest.param(600.0, False, [(500, 1, 400), (50, 2, 550)], id="a wrap is bridged"),
        # A wrap would mean 65,610 J in a second.
        pytest.param(65_700.0, False, [(10, 1, 0), (60, 2, 50)], id="a reset is not taken for a wrap"),
        pytest.param(None, False, [(5, 10, 0), (15, 11, 10)], id="a restart without a wrap is dropped"),
        pytest.param(None, False, [(300, 3600, 0)], id="silence is dropped"),
        pytest.param(None, True, [(300, 3600, 200)], id="silence is bridged"),
    ],
)
def test_sums(wrap: float | None, bridges: bool, seen: list[tuple[float, float, float]]) -> None:
    observe = register(wrap, bridges)
    assert [observe(value, now) for value, now, _ in seen] == [joules for *_, joules in seen]
