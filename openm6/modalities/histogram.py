"""Predicted distributions of numbers: a histogram over t = asinh((x - loc) / scale), and its statistics."""

# Letters: N values, B bins, M predicted values

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 160
# In t: asinh(45), so 45 scales from the location before a value is clipped into the outer bin.
LIMIT = 4.5
# Of a bin: standard deviation of the soft target while training (HL-Gauss, arXiv 2403.03950).
SMOOTHING = 0.75
# The mean leaves out this much of either tail of a distribution in logarithms: exp of the outer bins has no bound.
TAIL = 1e-3


def one_hot_bins(values: Tensor) -> Tensor:
    """The bin of each value as a distribution.  # N -> N B"""
    index = ((values.float() + LIMIT) * (BINS / (2 * LIMIT))).long().clamp(0, BINS - 1)
    return F.one_hot(index, BINS).float()


def smooth_bins(values: Tensor) -> Tensor:
    """Mass of a narrow Gaussian around each value in every bin.  # N -> N B"""
    sigma = SMOOTHING * 2 * LIMIT / BINS
    borders = torch.linspace(-LIMIT, LIMIT, BINS + 1, device=values.device)
    below = torch.special.ndtr((borders - values.float()[..., None]) / sigma)  # N B+1
    mass = below.diff(dim=-1)
    return mass / mass.sum(-1, keepdim=True).clamp(min=1e-6)


class Histogram:
    """Predicted distributions of M values and their statistics, in the column's own units.

    `probability` is M B over bins in t; `scale` M 2 holds loc and scale, those of log(x) if `log`.
    """

    def __init__(self, probability: np.ndarray, scale: np.ndarray, log: bool = False) -> None:
        self.probability = probability.astype(np.float64)
        self.loc, self.scale = scale.astype(np.float64).T
        self.log = log
        self.borders = np.linspace(-LIMIT, LIMIT, BINS + 1)

    def mean(self) -> np.ndarray:
        """Expected value, bin by bin.  # M"""
        middles = self._values(np.broadcast_to((self.borders[:-1] + self.borders[1:]) / 2, self.probability.shape))
        if not self.log:
            return np.sum(self.probability * middles, 1)
        below = self.probability.cumsum(1)
        kept = self.probability * ((below >= TAIL) & (below - self.probability <= 1 - TAIL))
        return np.sum(kept * np.where(kept > 0, middles, 0), 1) / kept.sum(1)

    def quantile(self, fraction: float) -> np.ndarray:
        """Value below which `fraction` of the mass lies, linear in t within a bin.  # M"""
        below = np.pad(self.probability.cumsum(1), ((0, 0), (1, 0)))
        below /= below[:, -1:]
        return self._values(np.array([[np.interp(fraction, row, self.borders)] for row in below]))[:, 0]

    def median(self) -> np.ndarray:
        """Half lies below.  # M"""
        return self.quantile(0.5)

    def interval(self, coverage: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
        """Central interval that should hold `coverage` of the true values.  # M, M"""
        return self.quantile((1 - coverage) / 2), self.quantile((1 + coverage) / 2)

    def crps(self, truth: np.ndarray) -> np.ndarray:
        """Continuous ranked probability score in the column's units, by quantile losses at 1 … 99 %.  # M"""
        losses = []
        for fraction in np.arange(0.01, 1.0, 0.02):
            error = truth - self.quantile(fraction)
            losses.append(np.where(error >= 0, fraction * error, (fraction - 1) * error))
        return 2 * np.mean(losses, axis=0)

    def _values(self, t: np.ndarray) -> np.ndarray:
        """Values at places in t.  # M X -> M X"""
        values = self.loc[:, None] + self.scale[:, None] * np.sinh(t)
        return np.exp(np.minimum(values, 700.0)) if self.log else values
