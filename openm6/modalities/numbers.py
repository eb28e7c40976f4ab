"""Numbers: values with column names in, distributions out; a column is one token, a series a token for each patch.

A value is scaled by its column's statistics and squashed, t = asinh((x - loc) / scale), so that tails stay
finite. Out comes a histogram over t: mean, median, intervals and samples follow from it. `series` has its own scales.
If a column has simple predictors, t is the distance to their predictions, in units of their typical error.
"""

# Letters: N tokens, K word ids of a name, M simple predictions, D hidden size, B bins, Q frequencies

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.core.errors import DataError, nearest
from openm6.core.lru_cache import LRUCache
from openm6.modalities.dates import date_names, split_dates
from openm6.modalities.histogram import BINS, LIMIT, MOST, Histogram, expected_nll, mix_neighbours
from openm6.modalities.interface import NO_OPTIONS, Adapter, Arrays, Modality, Options, Part, Rng, Segment, line
from openm6.modalities.regression import MAX_NUMBER, FittedRidges
from openm6.modalities.series import (
    DISTANCE_WEIGHT,
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
from openm6.modalities.simple_predictors import (
    PREDICTIONS,
    Given,
    LabelPrediction,
    Prediction,
    TablePredictors,
    given_columns,
    log_softmax,
)
from openm6.modalities.text import Text

CACHE_BYTES = 2**23  # of the features of rows
QUERY_FEATURES = 2 * PREDICTIONS + 4
LONGEST_CELL = 64  # letters of a cell or a name in a row that is cached
BLEND_WEIGHT = 3.0  # of the blend of simple predictions in the location, before training

Scales = dict[str, tuple[float, float]]


class Numbers(Modality):
    """Reads `{column: value}` or a series; predicts columns or the steps after a series.

    `scales` holds location and scale of each column, `series` what is known of those that are read over time, `ridges`
    what was fitted to their windows, and `widths` the correction of predicted distributions by kind and column, or
    weights of the model and of each expert by label. `predictors` are those of each table that has any.
    """

    name: ClassVar[str] = "numbers"

    def __init__(
        self, text: Text, scales: Scales, series: Mapping[str, SeriesStats], predictors: Sequence[TablePredictors] = ()
    ) -> None:
        self.text = text
        self.scales = scales
        self.series = series
        self.ridges: Mapping[str, FittedRidges] = {}
        self.widths: Mapping[str, Mapping[str, float]] = {}
        self.predictors = predictors
        self.dates: Mapping[str, str | None] = {}  # columns of dates and their formats
        self._cache = LRUCache[Arrays](CACHE_BYTES)  # rows come back in every epoch
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

        Unobserved values are not learned. With `mask_context` the past counts as unknown. Simple predictors see the
        columns `given`, and are those without the `fold` of a training example.
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
            given = {} if options.get("mask_context") else options.get("given", {})
            arrays, kind = self._query_arrays(raw, given, options), "numbers_out"
            length, learn, names = len(arrays["values"]), arrays["observed"], list(raw)
        widths = self.widths.get(kind, {})
        arrays["width"] = np.asarray([widths.get(name, 1.0) for name in names], np.float32)
        return Segment(kind, arrays, line(length), length, np.asarray(learn), "block")

    def _past(self, series: NumberSeries) -> Arrays:
        arrays = past_arrays(self._checked(series), self._stats(series), self.scale(series.name))
        return {**arrays, "name_ids": self._names([series.name] * len(arrays["steps"]))}

    def _checked(self, series: NumberSeries) -> NumberSeries:
        """The series with its values as numbers; DataError for a value that is none, or is too large."""
        self.scale(series.name)
        values, past = (
            [math.nan if value is None else _number(series.name, value) for value in part]
            for part in (series.values, series.past)
        )
        if any(abs(value) > MAX_NUMBER for value in (*values, *past)):
            raise DataError(f"{series.name} holds a value beyond {MAX_NUMBER:g}: correct it, or leave it out")
        return NumberSeries(series.name, values, past, series.clock)

    def _stats(self, series: NumberSeries) -> SeriesStats:
        return series.stats or self.series.get(series.name) or SeriesStats()

    def _query_arrays(self, raw: Any, given: Given, options: Options) -> Arrays:
        """Of a column: what is predicted of it, and its value in units of the prediction."""
        arrays = self._arrays(raw)
        known = {name: value for name, value in given.items() if name not in raw}
        found = [self._prediction(name, known, options) for name in raw]
        values = np.asarray([math.nan if value is None else float(value) for value in raw.values()])
        loc, scale, log, most = np.asarray([one.units for one in found]).T
        positive = np.where(log > 0, np.where(values > 0, np.log(np.maximum(values, 1e-300)), -np.inf), values)
        u = np.clip((positive - loc) / scale, -math.sinh(LIMIT), math.sinh(LIMIT))
        # log of dt/dz, t being the value on the scale of the column: so that likelihoods compare with those of others.
        z = np.sinh(arrays["values"].astype(np.float64))
        inner = np.where(log > 0, np.exp(np.minimum(loc + scale * u, 700.0)), 1.0)
        unit = np.log(scale * inner / arrays["scale"][:, 1] / np.sqrt(1 + z**2))
        observed = arrays["observed"]
        return {
            "values": np.where(observed, u, 0).astype(np.float32),
            "observed": observed,
            "name_ids": arrays["name_ids"],
            "forecasts": np.stack([one.values for one in found]).astype(np.float32),
            "features": np.stack([_query_features(one) for one in found]).astype(np.float32),
            "change": np.asarray([one.change for one in found], np.float32),
            "units": np.stack([loc, scale, log, most], 1),
            "log_unit": np.where(observed, unit, 0).astype(np.float32),
        }

    def given(self, parts: Sequence[Part]) -> Given:
        """The columns that a prompt shows: numbers, and categories named in its texts, as `cut: Ideal`."""
        found = self._with_dates(given_columns(parts))
        text = " ".join(part.raw for part in parts if part.modality == "text")
        for table in self.predictors:
            for name, words in table.categories.items():
                longest = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
                if match := re.search(rf"(?<!\w){re.escape(name.replace('_', ' '))}: ({longest})(?!\w)", text):
                    found[name] = match[1]
        return found

    def label_predictions(self, options: Options, classes: Iterable[str] = ()) -> LabelPrediction | None:
        """What simple predictors make of a label, or None. It has these classes; if its `column` is known, two of them.

        `options` are those of a target: what is `given`, the `source` if it is known, as other sources have other
        classes, and the `column` of the label. Without it, the `words` of the prompt must name it, unless there are
        more than two classes, as `yes` and `no` answer many questions.
        """
        given, names, words = options.get("given") or {}, set(classes), options.get("words", "")
        # Tables are counted from the last, as those of a start follow new ones.
        usable = [
            (len((table.inputs & given.keys()).difference(label.hidden)), number, column)
            for number, table in enumerate(reversed(self.predictors), 1)
            for column, label in table.labels_of(options.get("source")).items()
            if (
                options["column"] in label.hidden and (not names or len(names & set(label.classes)) > 1)
                if "column" in options
                else names <= set(label.classes)
                and (len(names) > 2 or (names and any(x.replace("_", " ") in words for x in label.hidden)))
            )
        ]  # fmt: skip
        most, number, column = max(usable, default=(0, 0, ""))
        return self.predictors[-number].predict_label(column, given, number) if most else None

    def label_scores(self, nll: np.ndarray, classes: Sequence[str], targets: Sequence[Options]) -> np.ndarray:
        """Log-probabilities of classes, by the model and by simple predictors if there are any.  # B L -> B L"""
        found = log_softmax(-nll)
        for row, options in enumerate(targets):
            if predicted := self.label_predictions(options, classes):
                experts = predicted.with_model(found[row], classes)
                weights = [*self.widths.get(predicted.key, {}).values()] or predicted.prior
                found[row] = log_softmax(np.asarray(weights) @ experts)
        return found

    def ranking(
        self, nll: Sequence[float], texts: Sequence[str], lengths: Sequence[int], parts: Sequence[Part]
    ) -> list[tuple[float, int]]:
        """Nats and length of each text after a prompt, the length 1 if they are classes of a label with predictors."""
        words = " ".join(part.raw for part in parts if part.modality == "text")
        options = {"given": self.given(parts), "words": words}
        if len(texts) > 1 and self.label_predictions(options, texts) is not None:
            nll, lengths = -self.label_scores(np.asarray([nll]), texts, [options])[0], [1] * len(texts)
        return list(zip(map(float, nll), lengths, strict=True))

    def _prediction(self, column: str, given: Given, options: Options) -> Prediction:
        """What simple predictors, those of the `source` if it is known, make of a column; else its middle and scale."""
        own = (table for table in self.predictors if table.is_of(options.get("source")))
        best = max(own, key=lambda table: table.num_usable(column, given), default=None)
        if best is not None and best.num_usable(column, given):
            return best.predict(column, given, options.get("fold"))
        return Prediction(np.zeros(PREDICTIONS), 1.0, (*self.scale(column), False, MOST))

    def _arrays(self, raw: Any) -> Arrays:
        if not isinstance(raw, Mapping) or not raw:
            raise DataError("numbers were expected as {column: value} or a series, and at least one of them")
        raw = self._with_dates(raw)
        compute = functools.partial(self._features, raw)
        try:
            # The cache counts what it keeps, but not the texts of a key.
            is_short = all(len(cell) <= LONGEST_CELL for cell in (*raw, *raw.values()) if isinstance(cell, str))
            return dict(self._cache.get_or_compute(tuple(raw.items()) if is_short else None, compute))
        # A value that has no hash is no number, either.
        except TypeError:
            return compute()

    def _with_dates(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with the parts of its dates, but for those that training had no value of, such as an hour."""
        unseen = {part for column in self.dates for part in date_names(column)} - self.scales.keys()
        return {name: value for name, value in split_dates(row, self.dates).items() if name not in unseen}

    def _features(self, raw: Mapping[str, Any]) -> Arrays:
        scale = np.asarray([self.scale(name) for name in raw])  # N 2
        values = np.asarray([math.nan if value is None else _number(name, value) for name, value in raw.items()])
        observed = np.isfinite(values)
        z = (np.where(observed, values, scale[:, 0]) - scale[:, 0]) / scale[:, 1]
        return {
            "values": squashed(z).astype(np.float32),
            "observed": observed,
            "scale": scale,
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
        """Location and scale of a column; DataError if the model has not seen it."""
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


def _query_features(found: Prediction) -> np.ndarray:
    """Predictions, how far they are from their blend, and how much of the table they are from."""
    known = found.values.any()
    rest = [math.log(found.change), found.uncertainty, found.fraction, known]
    return np.concatenate([squashed(found.values), np.arcsinh((found.values - found.values[0]) / found.change), rest])


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{name}={value!r} is not a number: fix or map the column") from None
    except OverflowError:  # an integer of more digits than a float has
        number = math.inf
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
    """A query for the value of a column; the head weighs simple predictions and predicts a histogram around them."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(hidden_size))
        self.features = nn.Linear(QUERY_FEATURES, hidden_size)
        self.outer = nn.Linear(hidden_size, hidden_size)
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.direct = nn.Linear(QUERY_FEATURES, hidden_size)
        self.bins = nn.Linear(hidden_size, BINS)
        self.weights = nn.Linear(hidden_size, PREDICTIONS)
        nn.init.normal_(self.query, std=0.02)
        mix_neighbours(self.bins.weight)
        nn.init.normal_(self.weights.weight, std=0.02)
        nn.init.zeros_(self.weights.bias)
        nn.init.constant_(self.weights.bias[:1], BLEND_WEIGHT)

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        features = arrays["features"].to(self.query.dtype)
        return self.query + self.outer(F.silu(self.features(features)))

    def distribution(self, hidden: Tensor, arrays: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the bins, and the location that they are around.  # N D -> N B, N"""
        inner = F.silu(self.inner(hidden) + self.direct(arrays["features"].to(hidden.dtype)))
        weight = self.weights(inner).float().softmax(-1)  # N M
        return self.bins(inner).float().log_softmax(-1), (weight * arrays["forecasts"]).sum(-1)

    def histograms(self, hidden: Tensor, arrays: dict[str, Tensor]) -> list[Histogram]:
        """The distributions of the observed values of each row.  # B T D, B*T … -> B"""
        log_probability, location = self.distribution(hidden.flatten(0, 1), arrays)
        loc, scale, log, most = arrays["units"].double().T
        scales = torch.stack([loc + scale * location, scale * arrays["change"]], -1)  # N 2
        found = (log_probability.exp(), scales, log.bool(), arrays["width"], most, arrays["observed"])
        rows = (array.unflatten(0, (len(hidden), -1)).cpu().numpy() for array in found)
        return [Histogram(p[seen], scale[seen], log[seen], width[seen], most[seen])
                for p, scale, log, width, most, seen in zip(*rows, strict=True)]  # fmt: skip

    def nll(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        nll, _ = expected_nll(*self.distribution(hidden, arrays), arrays["values"], arrays["change"])
        return (nll + arrays["log_unit"]) * arrays["observed"]

    def training_loss(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        predicted, found = arrays["forecasts"].any(-1), self.distribution(hidden, arrays)
        nll, distance = expected_nll(*found, arrays["values"], arrays["change"], smooth=True)
        return (nll + arrays["log_unit"] + DISTANCE_WEIGHT * distance * predicted) * arrays["observed"]
