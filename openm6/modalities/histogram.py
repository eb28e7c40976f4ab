"""Predicted distributions of numbers: a histogram over t = asinh((x - loc) / scale), and its statistics."""

# Letters: N values, B bins, M predicted values

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 160
LIMIT = 4.5  # in t: asinh(45), so 45 scales from the location before a value is clipped into the outer bin
SMOOTHING = 0.75  # of a bin: standard deviation of the soft target while training (HL-Gauss, arXiv 2403.03950)
# How much a width may be corrected, and the number of independent blocks of values for half of the correction.
MIN_WIDTH, MAX_WIDTH, PRIOR_BLOCKS = 0.5, 4.0, 3.0
MIN_BLOCKS = 10  # fewer blocks only widen: the weights may have been chosen by their loss
MIXED_BINS = 2.0  # of a bin: standard deviation of the neighbours with which its first weights are mixed
MOST = 700.0  # logarithm of a value
TAIL = 1e-3  # of either end that the mean of a distribution in logarithms leaves out: exp has no bound there


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


def expected_nll(
    log_probability: Tensor, location: Tensor, values: Tensor, change: Tensor, smooth: bool = False
) -> tuple[Tensor, Tensor]:
    """-log p(x) up to the width of a bin, and |t|, if t = asinh((x - location) / change).  # N … B, N … -> N …, N …"""
    off = (values - location) / change
    t = off.asinh()
    log_slope = change.log() + 0.5 * torch.log1p(off.square())  # of dx/dt
    bins = (smooth_bins if smooth else one_hot_bins)(t.clamp(-LIMIT, LIMIT))
    return -(log_probability * bins).sum(-1) + log_slope, t.abs()


@torch.no_grad()
def mix_neighbours(weight: Tensor) -> None:
    """Mix first weights of near bins, in place and at the same size, so that what is learned of a value holds for its
    neighbours before each bin has seen examples of its own.  # B D
    """
    bins = torch.arange(BINS, device=weight.device)
    kernel = torch.exp(-0.5 * ((bins[:, None] - bins) / MIXED_BINS) ** 2)
    weight.copy_(kernel / kernel.norm(dim=1, keepdim=True) @ weight)


class Histogram:
    """Predicted distributions of M values and their statistics, in the column's own units.

    `probability` is M B over bins in t; `scale` M 2 holds loc and scale, those of log(x) where `log` (one or M). Around
    its median each distribution is made `width` times as wide in t. `most` bounds the logarithms.
    """

    def __init__(
        self,
        probability: np.ndarray,
        scale: np.ndarray,
        log: bool | np.ndarray = False,
        width: np.ndarray | None = None,
        most: np.ndarray | float = MOST,
    ) -> None:
        self.probability = probability.astype(np.float64)
        self.loc, self.scale = scale.astype(np.float64).T
        self.log = np.broadcast_to(np.asarray(log, bool), self.loc.shape)
        self.most = np.broadcast_to(most, self.loc.shape)
        self.borders = np.linspace(-LIMIT, LIMIT, BINS + 1)
        if width is not None and (width != 1).any():
            middle, below = self._quantile_t(0.5)[:, None], self._below()
            origin = middle + (self.borders - middle) / width.astype(np.float64)[:, None]  # M B+1
            moved = [np.interp(t, self.borders, row) for t, row in zip(origin, below, strict=True)]
            self.probability = np.diff([np.r_[0.0, row[1:-1], 1.0] for row in moved])

    def mean(self) -> np.ndarray:
        """Expected value, bin by bin.  # M"""
        middles = self._values(np.broadcast_to((self.borders[:-1] + self.borders[1:]) / 2, self.probability.shape))
        below = self.probability.cumsum(1)
        kept = self.probability * ((below >= TAIL) & (below - self.probability <= 1 - TAIL))
        bounded = np.sum(kept * np.where(kept > 0, middles, 0), 1) / kept.sum(1)
        return np.where(self.log, bounded, np.sum(self.probability * np.where(self.log[:, None], 0, middles), 1))

    def quantile(self, fraction: float) -> np.ndarray:
        """Value below which `fraction` of the mass lies, linear in t within a bin.  # M"""
        return self._values(self._quantile_t(fraction)[:, None])[:, 0]

    def _below(self) -> np.ndarray:
        """The mass below each border.  # -> M B+1"""
        below = np.pad(self.probability.cumsum(1), ((0, 0), (1, 0)))
        return below / below[:, -1:]

    def _quantile_t(self, fraction: float) -> np.ndarray:
        """Quantiles in t.  # -> M"""
        return np.array([np.interp(fraction, row, self.borders) for row in self._below()])

    def median(self) -> np.ndarray:
        return self.quantile(0.5)

    def interval(self, coverage: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
        """Central interval that should hold `coverage` of the true values.  # M, M"""
        return self.quantile((1 - coverage) / 2), self.quantile((1 + coverage) / 2)

    def width_needed(self, truth: np.ndarray, coverage: float = 0.8) -> np.ndarray:
        """How many times as wide the central interval must be to hold each true value.  # M -> M"""
        x = np.where(self.log, np.log(np.maximum(truth, 1e-300)), truth)
        low, middle, high = (self._quantile_t(fraction) for fraction in ((1 - coverage) / 2, 0.5, (1 + coverage) / 2))
        away = np.clip(np.arcsinh((x - self.loc) / self.scale), -LIMIT, LIMIT) - middle
        return np.abs(away) / np.maximum(np.where(away > 0, high - middle, middle - low), 1e-9)

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
        return np.where(self.log[:, None], np.exp(np.minimum(values, self.most[:, None])), values)


def fit_width(needed: np.ndarray, blocks: int, prior: float = 1.0, coverage: float = 0.8) -> float:
    """The conformal width with which intervals hold a fraction of held-out values, shrunk to `prior` if these are few.

    needed: `width_needed` of each value; blocks: how many of the values are independent of each other
    """
    narrowest = MIN_WIDTH if blocks >= MIN_BLOCKS else 1.0
    level = min(1.0, math.ceil(coverage * (len(needed) + 1)) / len(needed)) if len(needed) else coverage
    found = float(np.quantile(needed, level)) if len(needed) else 1.0
    weight = blocks / (blocks + PRIOR_BLOCKS)
    return float(np.clip(found, narrowest, MAX_WIDTH) ** weight * prior ** (1 - weight))
