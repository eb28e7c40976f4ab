"""Predicted distributions as the API shows them."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel

from openm6.modalities.numbers import Histogram


class Distribution(BaseModel):
    """In the column's own units, lists for several steps; `low` to `high` should hold `coverage` of the truths."""

    mean: float | list[float]
    median: float | list[float]
    low: float | list[float]
    high: float | list[float]
    coverage: float


def described(histogram: Histogram, coverage: float) -> Distribution:
    """Mean, median and central interval of one value, or of several."""
    low, high = histogram.interval(coverage)
    return Distribution(
        mean=_plain(histogram.mean()),
        median=_plain(histogram.median()),
        low=_plain(low),
        high=_plain(high),
        coverage=coverage,
    )


def _plain(values: np.ndarray) -> float | list[float]:
    rounded = [float(f"{value:.6g}") for value in values]
    return rounded[0] if len(rounded) == 1 else rounded
