"""Numbers: values with column names in, distributions out; a column is one token, a series a token for each patch.

A value is scaled by its column's statistics and squashed, t = asinh((x - loc) / scale), so that tails stay
finite. Out comes a histogram over t: mean, median, intervals and samples follow from it. `series` has its own scales.
"""

# Letters: N tokens, K word ids of a name, D hidden size, B bins, Q frequencies

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.core.errors import DataError, nearest
from openm6.core.lru_cache import LRUCache
from openm6.modalities.histogram import BINS, Histogram, mix_neighbours, one_hot_bins, smooth_bins
from openm6.modalities.interface import NO_OPTIONS, Adapter, Arrays, Modality, Options, Rng, Segment, line
from openm6.modalities.regression import FittedRidges
from openm6.modalities.series import (
    FREQUENCIES,
    FREQUENCY_STD,
    NumberSeries,
    SeriesIn,
    SeriesOut,
    SeriesStats,
    future_arrays,
    past_arrays,
    squashed,
)
from openm6.modalities.text import Text

# Of the features of rows.
CACHE_BYTES = 2**23

Scales = dict[str, tuple[float, float]]


class Numbers(Modality):
    """Reads `{column: value}` or a series; predicts columns or the steps after a series.

    `scales` holds location and scale of each column, `series` what is known of those that are read over time, `ridges`
    what was fitted to their windows, and `widths` the correction of predicted distributions by kind and column.
    """

    name: ClassVar[str] = "numbers"

    def __init__(self, text: Text, scales: Scales, series: Mapping[str, SeriesStats]) -> None:
        self.text = text
        self.scales = scales
        self.series = series
        self.ridges: Mapping[str, FittedRidges] = {}
        self.widths: Mapping[str, Mapping[str, float]] = {}
        # Rows come back in every epoch.
        self._cache = LRUCache[Arrays](CACHE_BYTES)
        self._name_ids = functools.lru_cache(4096)(lambda name: text.encode(" " + name.replace("_", " "))[:8])

    def source(self, raw: Any, rng: Rng = None, options: Options = NO_OPTIONS) -> Segment:
        """Tokens of a mapping of columns (missing values allowed: None or NaN) or of a NumberSeries."""
        if isinstance(raw, NumberSeries):
            parts = [self._past(series) for series in (raw, *raw.beside)]
            arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            kind, length = "series_in", len(arrays["steps"])
        else:
            arrays, kind = self._arrays(raw), "numbers_in"
            length = len(arrays["values"])
        return Segment(kind, arrays, line(length), length, np.zeros(length, bool))

    def target(self, raw: Any, rng: Rng = None, options: Options = NO_OPTIONS) -> Segment:
        """Queries for a mapping of columns, or for the steps after the past of a NumberSeries.

        Unobserved values are not learned. With `mask_context` the past counts as unknown.
        """
        if isinstance(raw, NumberSeries):
            series = self._checked(raw)
            if options.get("mask_context"):
                series = NumberSeries(raw.name, series.values)
            fitted = self.ridges.get(raw.name) if raw.stats is None else None
            ridges = None if fitted is None else fitted.of(raw.position)
            arrays = future_arrays(series, self._stats(raw), self.scale(raw.name), ridges)
            kind, length, learn = "series_out", len(arrays["steps"]), arrays["observed"].any(1)
            names = [raw.name] * length
            arrays["name_ids"] = self._names(names)
        else:
            arrays, kind = self._arrays(raw), "numbers_out"
            length, learn, names = len(arrays["values"]), arrays["observed"], list(raw)
        widths = self.widths.get(kind, {})
        arrays["width"] = np.asarray([widths.get(name, 1.0) for name in names], np.float32)
        return Segment(kind, arrays, line(length), length, np.asarray(learn), "block")

    def _past(self, series: NumberSeries) -> Arrays:
        arrays = past_arrays(self._checked(series), self._stats(series), self.scale(series.name))
        return {**arrays, "name_ids": self._names([series.name] * len(arrays["steps"]))}

    def _checked(self, series: NumberSeries) -> NumberSeries:
        """The series with its values as numbers; DataError for a value that is none."""
        self.scale(series.name)
        values, past = (
            [math.nan if value is None else _number(series.name, value) for value in part]
            for part in (series.values, series.past)
        )
        return NumberSeries(series.name, values, past, series.clock)

    def _stats(self, series: NumberSeries) -> SeriesStats:
        return series.stats or self.series.get(series.name) or SeriesStats()

    def _arrays(self, raw: Any) -> Arrays:
        if not isinstance(raw, Mapping) or not raw:
            raise DataError("numbers were expected as {column: value} or a series, and at least one of them")
        compute = functools.partial(self._features, raw)
        try:
            return dict(self._cache.get_or_compute(tuple(raw.items()), compute))
        # A value that has no hash is no number, either.
        except TypeError:
            return compute()

    def _features(self, raw: Mapping[str, Any]) -> Arrays:
        scale = np.asarray([self.scale(name) for name in raw])  # N 2
        values = np.asarray([math.nan if value is None else _number(name, value) for name, value in raw.items()])
        observed = np.isfinite(values)
        z = (np.where(observed, values, scale[:, 0]) - scale[:, 0]) / scale[:, 1]
        return {
            "values": squashed(z).astype(np.float32),
            "observed": observed,
            "scale": scale.astype(np.float32),
            "name_ids": self._names(list(raw)),
        }

    def _names(self, names: list[str]) -> np.ndarray:
        """Word ids of column names, eight at most, padded with -1.  # N 8"""
        ids = np.full((len(names), 8), -1, dtype=np.int64)
        for row, name in enumerate(names):
            words = self._name_ids(name)
            ids[row, : len(words)] = words
        return ids

    def scale(self, name: str) -> tuple[float, float]:
        """Location and scale of a column.

        Raises:
            DataError: the model has not seen this column.
        """
        if name not in self.scales:
            raise DataError(f"the model has no column {name!r}; {nearest(name, sorted(self.scales))}")
        return self.scales[name]

    def adapters(self, hidden_size: int) -> dict[str, Adapter]:
        return {
            "numbers_in": NumbersIn(hidden_size),
            "numbers_out": NumbersOut(hidden_size),
            "series_in": SeriesIn(hidden_size),
            "series_out": SeriesOut(hidden_size),
        }


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{name}={value!r} is not a number: fix or map the column") from None
    if math.isinf(number):
        raise DataError(f"{name} is infinite: fix the value or leave it empty")
    return number


class NumbersIn(Adapter):
    """Periodic and plain features of a value; the model adds the name's words."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.empty(FREQUENCIES))
        self.inner = nn.Linear(2 + 2 * FREQUENCIES, hidden_size)
        self.outer = nn.Linear(hidden_size, hidden_size)
        nn.init.normal_(self.frequencies, std=FREQUENCY_STD)

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        observed = arrays["observed"].to(self.frequencies.dtype)[:, None]  # N 1
        values = arrays["values"].to(self.frequencies.dtype)[:, None] * observed
        angle = 2 * math.pi * values * self.frequencies  # N 1 -> N Q
        features = torch.cat((angle.sin() * observed, angle.cos() * observed, values, observed), -1)  # N 2Q+2
        return self.outer(F.silu(self.inner(features)))


class NumbersOut(Adapter):
    """A query for the value of a column; the head predicts a histogram over t."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(hidden_size))
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.bins = nn.Linear(hidden_size, BINS)
        nn.init.normal_(self.query, std=0.02)
        mix_neighbours(self.bins.weight)

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        return self.query.expand(len(arrays["values"]), -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the bins.  # N D -> N B"""
        return self.bins(F.silu(self.inner(hidden)))

    def histograms(self, hidden: Tensor, arrays: dict[str, Tensor]) -> list[Histogram]:
        """The distributions of the observed values of each row.  # B T D, B*T … -> B"""
        probability = self.logits(hidden.flatten(0, 1)).float().softmax(-1)
        rows = (array.cpu().numpy().reshape(len(hidden), -1, *array.shape[1:]) for array in
                (probability, arrays["scale"], arrays["width"], arrays["observed"]))  # fmt: skip
        return [Histogram(p[seen], scale[seen], width=width[seen])
                for p, scale, width, seen in zip(*rows, strict=True)]  # fmt: skip

    def nll(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        return self._expected(hidden, arrays, one_hot_bins(arrays["values"]))

    def training_loss(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        return self._expected(hidden, arrays, smooth_bins(arrays["values"]))

    def _expected(self, hidden: Tensor, arrays: dict[str, Tensor], target: Tensor) -> Tensor:
        """Cross-entropy with soft targets; 0 for what was not observed.  # N B -> N"""
        log_probability = self.logits(hidden).float().log_softmax(-1)
        return -(log_probability * target).sum(-1) * arrays["observed"]
