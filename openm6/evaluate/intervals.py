"""Bootstrap intervals of means over test records."""

# Shapes: N records, B blocks, R resamples

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000

Interval = tuple[float, float]
UNKNOWN: Interval = (float("nan"), float("nan"))


def bootstrap_interval(
    values: np.ndarray, seed: int, blocks: Sequence[str] = (), coverage: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of the mean.  # N -> low, high

    Records of one block are drawn together, since they depend on each other; "" marks an independent record.
    Without records, both ends are NaN.
    """
    if not len(values):
        return UNKNOWN
    index = _block_index(blocks or [""] * len(values))
    sums = np.bincount(index, weights=values)  # B
    counts = np.bincount(index).astype(float)  # B
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(sums), (RESAMPLES, len(sums)))  # R B
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, ((1 - coverage) / 2, (1 + coverage) / 2))
    return float(low), float(high)


def _block_index(blocks: Sequence[str]) -> np.ndarray:
    """The number of each record's block; an independent record is a block of its own.  # N"""
    numbers: dict[str | int, int] = {}
    return np.asarray([numbers.setdefault(name or row, len(numbers)) for row, name in enumerate(blocks)])
