"""Numbers: values with column names in, distributions out; a column or a patch of a series is one token.

A value is scaled by its column's statistics and squashed, t = asinh((x - loc) / scale), so that tails stay
finite. Out comes a histogram over t: mean, median, intervals and samples follow from it.
"""

# Letters: N tokens, P values in a token, K word ids of a name, D hidden size, B bins, Q frequencies

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.core.errors import DataError, nearest
from openm6.modalities.interface import NO_OPTIONS, Adapter, Arrays, Modality, Options, Rng, Segment, line
from openm6.modalities.text import Text

PATCH = 8
BINS = 160
# In t: asinh(45), so 45 scales from the location before a value is clipped into the outer bin.
LIMIT = 4.5
FREQUENCIES = 16
# Small on purpose: large ones memorize (arXiv 2203.05556 and its authors' later advice).
FREQUENCY_STD = 0.3
# Of a bin: standard deviation of the soft target while training (HL-Gauss, arXiv 2403.03950).
SMOOTHING = 0.75

Scales = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class NumberSeries:
    """Values of one column over time; None or NaN where nothing was observed."""

    name: str
    values: list[float | None]


def fit_scale(values: np.ndarray) -> tuple[float, float]:
    """Location (median) and scale (interquartile range / 1.349, the normal's sigma) of a column's observed values."""
    seen = values[np.isfinite(values)]
    if not len(seen):
        return 0.0, 1.0
    low, middle, high = np.quantile(seen, (0.25, 0.5, 0.75))
    scale = (high - low) / 1.349 or float(seen.std()) or abs(float(middle)) or 1.0
    return float(middle), float(scale)


class Numbers(Modality):
    """Reads `{column: value}` or a series, a token per value or per PATCH steps; predicts columns or a series."""

    name: ClassVar[str] = "numbers"

    def __init__(self, text: Text, scales: Scales) -> None:
        self.text = text
        self.scales = scales
        self._name_ids = functools.lru_cache(4096)(lambda name: text.encode(" " + name.replace("_", " "))[:8])

    def source(self, raw: Any, rng: Rng = None, options: Options = NO_OPTIONS) -> Segment:
        """Tokens of a mapping of columns (missing values allowed: None or NaN) or of a NumberSeries."""
        arrays = self._arrays(raw)
        length = len(arrays["values"])
        return Segment("numbers_in", arrays, line(length), length, np.zeros(length, bool))

    def target(self, raw: Any, rng: Rng = None, options: Options = NO_OPTIONS) -> Segment:
        """Queries for a mapping of columns or a series; unobserved values are not learned."""
        arrays = self._arrays(raw)
        length = len(arrays["values"])
        learn = np.asarray(arrays["observed"].any(1))
        return Segment("numbers_out", arrays, line(length), length, learn, "block")

    def _arrays(self, raw: Any) -> Arrays:
        is_series = isinstance(raw, NumberSeries)
        if isinstance(raw, NumberSeries):
            columns = {raw.name: raw.values}
        elif isinstance(raw, Mapping) and raw:
            columns = {name: [value] for name, value in raw.items()}
        else:
            raise DataError("numbers were expected as {column: value} or a series, and at least one of them")
        scales = {name: self.scale(name) for name in columns}
        tokens = [
            (name, column[start : start + PATCH])
            for name, column in columns.items()
            for start in range(0, len(column), PATCH)
        ]
        values = np.full((len(tokens), PATCH), math.nan)
        # Word ids of column names, eight at most, padded with -1.
        name_ids = np.full((len(tokens), 8), -1, dtype=np.int64)
        for row, (name, patch) in enumerate(tokens):
            values[row, : len(patch)] = [math.nan if v is None else _number(name, v) for v in patch]
            words = self._name_ids(name)
            name_ids[row, : len(words)] = words
        scale = np.asarray([scales[name] for name, _ in tokens]).reshape(-1, 2)  # N 2
        observed = np.isfinite(values)  # N P
        loc = scale[:, :1]
        squashed = np.arcsinh((np.where(observed, values, loc) - loc) / scale[:, 1:])
        return {
            "values": np.clip(squashed, -LIMIT, LIMIT).astype(np.float32),
            "observed": observed,
            "scale": scale.astype(np.float32),
            "name_ids": name_ids,
            "is_series": np.full(len(tokens), is_series),
        }

    def scale(self, name: str) -> tuple[float, float]:
        """Location and scale of a column.

        Raises:
            DataError: the model has not seen this column.
        """
        if name not in self.scales:
            raise DataError(f"the model has no column {name!r}; {nearest(name, sorted(self.scales))}")
        return self.scales[name]

    def adapters(self, hidden_size: int) -> dict[str, Adapter]:
        return {"numbers_in": NumbersIn(hidden_size), "numbers_out": NumbersOut(hidden_size)}


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{name}={value!r} is not a number: fix or map the column") from None
    if math.isinf(number):
        raise DataError(f"{name} is infinite: fix the value or leave it empty")
    return number


class NumbersIn(Adapter):
    """Periodic and plain features of the values of a token; the model adds the name's words."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.empty(FREQUENCIES))
        self.series = nn.Embedding(2, hidden_size)
        self.inner = nn.Linear(PATCH * (2 + 2 * FREQUENCIES), hidden_size)
        self.outer = nn.Linear(hidden_size, hidden_size)
        nn.init.normal_(self.frequencies, std=FREQUENCY_STD)
        nn.init.normal_(self.series.weight, std=0.02)

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        observed = arrays["observed"].to(self.frequencies.dtype)  # N P
        values = arrays["values"].to(self.frequencies.dtype) * observed
        angle = 2 * math.pi * values[..., None] * self.frequencies  # N P -> N P Q
        waves = torch.cat((angle.sin(), angle.cos()), -1) * observed[..., None]
        features = torch.cat((waves.flatten(1), values, observed), -1)  # N P*(2Q+2)
        return self.outer(F.silu(self.inner(features))) + self.series(arrays["is_series"].long())


class NumbersOut(Adapter):
    """A query for up to PATCH values; the head predicts a histogram over t for each."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.query = nn.Embedding(2, hidden_size)
        self.step = nn.Parameter(torch.empty(PATCH, hidden_size))
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.bins = nn.Linear(hidden_size, BINS)
        nn.init.normal_(self.query.weight, std=0.02)
        nn.init.normal_(self.step, std=0.02)

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        return self.query(arrays["is_series"].long())

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the bins of each step of a patch.  # N D -> N P B"""
        return self.bins(F.silu(self.inner(hidden)[:, None] + self.step))

    def nll(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        return self._expected(hidden, arrays, one_hot_bins(arrays["values"]))

    def training_loss(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        mean = self._expected(hidden, arrays, smooth_bins(arrays["values"]))
        return mean / arrays["observed"].sum(-1).clamp(min=1)

    def _expected(self, hidden: Tensor, arrays: dict[str, Tensor], target: Tensor) -> Tensor:
        """Cross-entropy with soft targets, summed over the observed steps of a token.  # N P B -> N"""
        log_probability = self.logits(hidden).float().log_softmax(-1)
        return -((log_probability * target).sum(-1) * arrays["observed"]).sum(-1)


def one_hot_bins(values: Tensor) -> Tensor:
    """The bin of each value as a distribution.  # N P -> N P B"""
    index = ((values.float() + LIMIT) * (BINS / (2 * LIMIT))).long().clamp(0, BINS - 1)
    return F.one_hot(index, BINS).float()


def smooth_bins(values: Tensor) -> Tensor:
    """Mass of a narrow Gaussian around each value in every bin.  # N P -> N P B"""
    sigma = SMOOTHING * 2 * LIMIT / BINS
    borders = torch.linspace(-LIMIT, LIMIT, BINS + 1, device=values.device)
    below = torch.special.ndtr((borders - values.float()[..., None]) / sigma)  # N P B+1
    mass = below.diff(dim=-1)
    return mass / mass.sum(-1, keepdim=True).clamp(min=1e-6)


class Histogram:
    """Predicted distributions of M values and their statistics, in the column's own units.

    `probability` is M B over bins in t; `scale` M 2 holds loc and scale.
    """

    def __init__(self, probability: np.ndarray, scale: np.ndarray) -> None:
        self.probability = probability.astype(np.float64)
        self.loc, self.scale = scale.astype(np.float64).T
        self.borders = np.linspace(-LIMIT, LIMIT, BINS + 1)

    def mean(self) -> np.ndarray:
        """Expected value, bin by bin.  # M"""
        middles = np.sinh((self.borders[:-1] + self.borders[1:]) / 2)
        return self.loc + self.scale * (self.probability @ middles)

    def quantile(self, fraction: float) -> np.ndarray:
        """Value below which `fraction` of the mass lies, linear in t within a bin.  # M"""
        below = np.pad(self.probability.cumsum(1), ((0, 0), (1, 0)))
        below /= below[:, -1:]
        return self.loc + self.scale * np.sinh([np.interp(fraction, row, self.borders) for row in below])

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
