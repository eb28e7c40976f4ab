"""What every maker of example data offers, and what makers share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from openm6.data.records import Record

STEPS, AHEAD = 48, 8  # of a series that is made, and how many of them are to be forecast
Item = TypeVar("Item")


class Maker(ABC):
    """Makes records of one kind."""

    @abstractmethod
    def record(self, rng: np.random.Generator) -> Record:
        """A record, without id, source and licence; it follows from the generator."""


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """One of some items."""
    return items[int(rng.integers(len(items)))]


def wave(rng: np.random.Generator, level: float, period: float, noise: float) -> list[float | None]:
    """A series with a season, a trend and noise, all in shares of its level."""
    time = np.arange(STEPS)
    season = 0.3 * np.sin(2 * math.pi * (time / period + rng.random()))
    trend = rng.normal(0, 0.3) * time / STEPS
    values = level * np.exp(season + trend + rng.normal(0, noise, STEPS))
    return [float(f"{value:.4g}") for value in values]
