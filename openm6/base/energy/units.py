"""Joules in words."""

from __future__ import annotations

JOULES_PER_KWH = 3.6e6
_SIZES = ((1e12, "TJ"), (1e9, "GJ"), (1e6, "MJ"), (1e3, "kJ"))


def in_joules(joules: float) -> str:
    """Three figures with their unit, such as `12.3 kJ`."""
    for size, unit in _SIZES:
        if joules >= size:
            return f"{joules / size:.3g} {unit}"
    return f"{joules:.3g} J"
