"""What the synthetic records share: a choice at random and a series with a season."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

STEPS, HORIZON = 48, 8  # of a series, and how many of them are to be forecast
Item = TypeVar("Item")


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """One of some items."""
    return items[int(rng.integers(len(items)))]


def seasonal_series(rng: np.random.Generator, level: float, period: float, noise: float) -> list[float | None]:
    """A series with a season, a trend and noise, all in shares of its level."""
    time = np.arange(STEPS)
    season = 0.3 * np.sin(2 * math.pi * (time / period + rng.random()))
    trend = rng.normal(0, 0.3) * time / STEPS
    values = level * np.exp(season + trend + rng.normal(0, noise, STEPS))
    return [float(f"{value:.4g}") for value in values]
