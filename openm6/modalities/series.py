"""Series: values of one column over time in, distributions of later steps out; a patch of steps is one token.

All is measured within the window that is given, so that a series can go on beyond whatever was seen before: values by
the window's own location and scale, later steps by their distance to simple forecasts (`simple_forecasts`), which the
head weighs, in units of the window's typical change from step to step or from season to season.
"""

# Letters: N tokens, P steps of a patch, C steps of the past, H of the future, K simple forecasts, T features of a time,
# M features of a step, W features of a window, D hidden size, B bins, Q frequencies

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.modalities import regression
from openm6.modalities.histogram import BINS, LIMIT, MOST, Histogram, expected_nll
from openm6.modalities.interface import Adapter, Arrays

PATCH = 8
FREQUENCIES = 16
FREQUENCY_STD = 0.3  # small on purpose: large ones memorize (arXiv 2203.05556 and its authors' later advice)
FORECASTS = 11
WINDOW = 4  # features of a window: location and scale against the column's, typical change, number of steps
PAST_FEATURES = 2 + 2 + regression.TIMES
FUTURE_FEATURES = 2 * FORECASTS + 1 + regression.TIMES
MIN_CHANGE = 0.02  # a typical change is at least this fraction of the scale of the window
FARTHEST_VALUE = 1e9  # in changes of its window, of a value to learn
DAMPING = 0.95  # of the slope of a trend, each further step
DISTANCE_WEIGHT = 0.5  # in the loss, of the distance to the location: the histogram alone would lie beside it
MIN_CORRELATION = 0.3  # a lag is a period if the changes of a series correlate as much with those so many steps before
MAX_CHANGES = 3.0  # medians of the changes
MIN_ENERGY = 1e-20  # of these changes, against the values
MIN_GROWTH = 0.5  # the logarithm is taken if the changes grow with the level by at least this power
MIN_WINDOWS_STEPS = 16
GROWTH = math.log(10)  # what a series in logarithms may exceed its largest value by, or by its range if that is larger
ROUNDING = 1e-14  # of the largest of equal values that sums and products have rounded


@dataclass(frozen=True)
class SeriesStats:
    """What the training windows of a column have in common: steps of a season (1: none), and whether logs are taken."""

    period: int = 1
    log: bool = False


@dataclass(frozen=True)
class NumberSeries:
    """Values of one column over time; None or NaN where nothing was observed.

    A series to forecast has its `past`. `clock` holds the times of the values (of the past first, if there is one), as
    far as they are given, and the length of a step, in seconds; None if they are unknown. `stats` are those of the
    column if None.
    Covariates stand `beside` a past: their values begin at the same time, and those of known ones last longer.
    `position` is that of a training window among those of its series, and their number; of other windows None.
    """

    name: str
    values: Sequence[float | None]
    past: Sequence[float | None] = ()
    clock: regression.Clock | None = None
    stats: SeriesStats | None = None
    beside: "Sequence[NumberSeries]" = ()
    position: tuple[int, int] | None = None

    def to_forecast(self, ahead: int) -> "NumberSeries":
        """The steps after these as a target; its values are only asked for, so any will do."""
        return NumberSeries(self.name, [1.0] * ahead, self.values, self.clock, self.stats)


def is_constant(values: np.ndarray) -> bool:
    """Whether values differ by rounding alone, which as a unit would make any other value infinite in float32."""
    return bool(np.ptp(values) <= ROUNDING * np.abs(values).max())


def fit_scale(values: np.ndarray) -> tuple[float, float]:
    """Location (median) and scale (interquartile range / 1.349, the normal's sigma) of the observed values."""
    seen = values[np.isfinite(values)]
    if not len(seen):
        return 0.0, 1.0
    low, middle, high = np.quantile(seen, (0.25, 0.5, 0.75))
    # Of equal values, the standard deviation is not always an exact 0.
    deviation = 0.0 if is_constant(seen) else float(seen.std())
    between = 0.0 if is_constant(np.asarray([low, high])) else high - low
    scale = between / 1.349 or deviation or abs(float(middle)) or 1.0
    return float(middle), float(scale)


def fit_series(windows: Sequence[np.ndarray]) -> SeriesStats:
    """Period and transformation of a column from windows of it, NaN where nothing was observed."""
    filled = [fill_gaps(window) for window in windows if np.isfinite(window).sum() >= MIN_WINDOWS_STEPS]
    if not filled:
        return SeriesStats()
    log = all((window > 0).all() for window in filled) and _growth(filled) >= MIN_GROWTH
    return SeriesStats(_period([np.log(window) for window in filled] if log else filled), log)


def fit_column(windows: Sequence[NumberSeries], stats: SeriesStats) -> regression.FittedRidges | None:
    """The regressions of a column from training windows that have positions, of the lengths that most of them have."""
    seen = [window for window in windows if window.position is not None
            and all(np.isfinite(_floats(part)).any() for part in (window.past, window.values))]  # fmt: skip
    if not seen:
        return None
    lengths = [(len(window.past), len(window.values)) for window in seen]
    most = Counter(lengths).most_common(1)[0][0]
    usable = [window for window, length in zip(seen, lengths, strict=True) if length == most]
    whole = np.stack([fill_gaps(_floats([*window.past, *window.values])) for window in usable])  # W C+H
    if stats.log:
        if (whole <= 0).any():
            return None
        whole = np.log(whole)
    ends = len(usable[0].past)
    timed = all(window.clock is not None for window in usable)
    times = np.concatenate([regression.time_features(window.clock, ends, 1) for window in usable]) if timed else None
    positions = [window.position for window in usable if window.position is not None]
    column = fit_scale(np.concatenate([_floats(window.past) for window in usable]))
    found = [Window.of(_floats(window.past), stats, column) for window in usable]
    units = np.asarray([(one.loc, one.scale) for one in found])
    return regression.fit_ridges(whole[:, :ends], whole[:, ends:], times, positions, units)


def _growth(windows: list[np.ndarray]) -> float:
    """The power p in `typical change ~ level ** p` over halves of windows: 1 for growth in percent."""
    halves = [half for window in windows for half in np.array_split(window, 2)]
    change = np.array([np.abs(np.diff(half)).mean() for half in halves])
    level = np.log([np.median(half) for half in halves])
    kept = change > 0
    if kept.sum() < 2 or np.ptp(level[kept]) < 0.2:
        return 0.0
    return float(np.polyfit(level[kept], np.log(change[kept]), 1)[0])


def _period(windows: list[np.ndarray]) -> int:
    """The lag at which clipped changes correlate most, the shortest of its multiples; 1 if correlations only fade."""
    longest = min(map(len, windows)) // 2
    total, norm = np.zeros(longest + 1), 0.0
    for window in windows:
        change = np.diff(window)
        change = change - change.mean()
        bound = MAX_CHANGES * float(np.median(np.abs(change)))
        change = np.clip(change, -bound, bound) if bound > 0 else change
        energy = float(change @ change)
        if energy > MIN_ENERGY * float(window @ window):  # the changes of a line differ by rounding alone
            total += [change[lag:] @ change[: len(change) - lag] / energy * len(change) / (len(change) - lag)
                      for lag in range(longest + 1)]  # fmt: skip
            norm += 1
    correlation = total / max(norm, 1.0)
    peaks = [
        lag for lag in range(2, longest)
        if correlation[lag] >= max(correlation[lag - 1], correlation[lag + 1])
        and correlation[lag] >= MIN_CORRELATION + max(0.0, correlation[1:lag].min())
    ]  # fmt: skip
    best = max((correlation[lag] for lag in peaks), default=0.0)
    return next((lag for lag in peaks if correlation[lag] >= 0.9 * best), 1)


def fill_gaps(values: np.ndarray) -> np.ndarray:
    """Missing steps on the line between their neighbours; all 0 if nothing was observed."""
    seen = np.isfinite(values)
    if seen.all():
        return values
    steps = np.arange(len(values))
    return np.interp(steps, steps[seen], values[seen]) if seen.any() else np.zeros(len(values))


@dataclass(frozen=True)
class Window:
    """The past of a series in its own units: x = loc + scale * z, or exp of that if `log`."""

    z: np.ndarray  # C, without gaps
    loc: float
    scale: float
    change: float  # typical change of z, from season to season if that is smaller than from step to step
    log: bool
    period: int
    most: float = MOST  # logarithm of a value to come

    @classmethod
    def of(cls, past: np.ndarray, stats: SeriesStats, column: tuple[float, float]) -> Self:
        """Measured on C observed or missing values; without any, by the scale of the column."""
        seen = past[np.isfinite(past)]
        log = stats.log and bool((seen > 0).all())
        if not len(seen):
            loc, scale = column
            if log:
                loc, scale = math.log(max(loc, 1e-9)), min(scale / max(loc, 1e-9), 1.0)
            most = loc + max(3 * scale, GROWTH) if log else MOST
            return cls(np.zeros(len(past)), loc, scale, 1.0, log, 1, most)
        x = np.log(past) if log else past
        seen = x[np.isfinite(x)]
        loc, scale = fit_scale(seen)
        if is_constant(seen):
            scale = 0.1 if log else column[1]
        z = (fill_gaps(x) - loc) / scale
        period = stats.period if 1 < stats.period <= len(z) // 2 else 1
        lags = {1, period} & set(range(1, len(z)))
        change = min((float(np.abs(z[lag:] - z[:-lag]).mean()) for lag in lags), default=1.0)
        most = seen.max() + max(np.ptp(seen), GROWTH) if log else MOST
        return cls(z, loc, scale, max(change, MIN_CHANGE), log, period, float(most))

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Values in the units of the window; NaN stays, and what has no logarithm lies at the lower end.  # X -> X"""
        if not self.log:
            return (values - self.loc) / self.scale
        z = (np.log(np.where(values > 0, values, 1.0)) - self.loc) / self.scale
        return np.where(values <= 0, -math.sinh(LIMIT), np.where(np.isnan(values), np.nan, z))


def simple_forecasts(
    window: Window, horizon: int, clock: regression.Clock | None = None, ridges: regression.Ridges | None = None
) -> np.ndarray:
    """What simple methods forecast, in units of the window: the head weighs them for each step.  # -> H K

    Last value; mean of the last season; mean of all; damped trend; last season, plain and moved by its drift; season
    and trend; the same with the last deviation, which fades; an autoregression; two fitted regressions, or it again.
    """
    z, period = window.z, window.period
    length, step = len(z), np.arange(1, horizon + 1)
    if not length:
        return np.zeros((horizon, FORECASTS))
    recent = period if period > 1 else min(length, PATCH)
    level = z[-recent:].mean()
    before = z[-2 * recent : -recent]
    drift = (level - before.mean()) / recent if len(before) == recent else (z[-1] - z[0]) / max(1, length - 1)
    damped = drift * np.cumsum(DAMPING**step)
    phase = (step - 1) % period
    last_season = z[length - period :][phase]
    profile, rest = _profile(z, period, drift)
    smooth = level + drift * ((recent - 1) / 2 + step) + profile[(length + step - 1) % period]
    kept = float(rest[1:] @ rest[:-1] / max(rest[:-1] @ rest[:-1], 1e-12)) if length > 2 else 0.0
    fading = smooth + rest[-1] * np.clip(kept, 0.0, 0.98) ** step
    plain = np.full(horizon, 1.0)
    own = regression.autoregression(z, period, horizon)
    fitted = [own, own]
    if ridges is not None:
        loc, scale = (0.0, 1.0) if ridges.of_scaled else (window.loc, window.scale)
        found = ridges.forecasts(loc + scale * z, clock, horizon)
        fitted = [np.clip((x - loc) / scale, -regression.MAX_VALUE, regression.MAX_VALUE) for x in found]
    return np.stack([
        plain * z[-1], plain * level, plain * z.mean(), z[-1] + damped, last_season,
        last_season + drift * period * ((step - 1) // period + 1), smooth, fading, own, *fitted,
    ], 1)  # fmt: skip


def _profile(z: np.ndarray, period: int, drift: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean deviation of each phase from the level of its season, and what the last season's fit leaves.  # C -> p, C"""
    length = len(z)
    step = np.arange(length)
    seasons = length // period
    if period == 1:
        profile = np.zeros(1)
    else:
        whole = z[length - seasons * period :].reshape(seasons, period)
        slope = drift * (np.arange(period) - (period - 1) / 2)
        deviation = (whole - whole.mean(1, keepdims=True) - slope).mean(0)
        profile = np.roll(deviation, (length - seasons * period) % period)
    recent = period if period > 1 else min(length, PATCH)
    trend = z[-recent:].mean() + drift * (step - (length - 1) + (recent - 1) / 2)
    return profile, z - trend - profile[step % period]


def past_arrays(series: NumberSeries, stats: SeriesStats, column: tuple[float, float]) -> Arrays:
    """Features of a series as input, cut into patches from its end, so that the last one is full.  # -> N P M, N W"""
    values = _floats(series.values)
    window = Window.of(values, stats, column)
    count = len(values)
    lagged = np.zeros((count, 2))
    for column_index, lag in enumerate((1, window.period)):
        lagged[lag:, column_index] = np.arcsinh((window.z[lag:] - window.z[:-lag]) / window.change)
    observed = np.isfinite(values)
    steps = np.concatenate(
        [np.where(observed, squashed(window.z), 0)[:, None], observed[:, None], lagged * observed[:, None],
         regression.time_features(series.clock, 0, count)], 1,
    )  # fmt: skip
    patches = max(1, -(-count // PATCH))
    features = np.zeros((patches * PATCH, PAST_FEATURES), np.float32)
    features[len(features) - count :] = steps
    return {
        "steps": features.reshape(patches, PATCH, PAST_FEATURES),
        "window": np.tile(_window_features(window, values, column), (patches, 1)),
    }


def future_arrays(
    series: NumberSeries, stats: SeriesStats, column: tuple[float, float], ridges: regression.Ridges | None = None
) -> Arrays:
    """Features of the steps to forecast, and what was observed there.  # -> N P M, N W, N P …"""
    values, past = _floats(series.values), _floats(series.past)
    window = Window.of(past, stats, column)
    count = len(values)
    patches = max(1, -(-count // PATCH))
    ridges = ridges if window.log == stats.log else None
    forecasts = simple_forecasts(window, patches * PATCH, series.clock, ridges)  # H K
    middle = forecasts.mean(1, keepdims=True)
    length = np.log1p(np.arange(len(forecasts)) / max(window.period, PATCH))[:, None]
    times = regression.time_features(series.clock, len(past), len(forecasts))
    steps = np.concatenate([squashed(forecasts), np.arcsinh((forecasts - middle) / window.change), length, times], 1)
    truth = np.full(len(forecasts), np.nan)
    truth[:count] = values
    z = np.clip(window.scaled(truth), -FARTHEST_VALUE, FARTHEST_VALUE)  # its square is a number in float32
    observed = np.isfinite(z)
    # log of dt/dz, t being the value on the scale of the column: so that likelihoods compare with those of others.
    off = np.clip((np.where(observed, truth, column[0]) - column[0]) / column[1], -math.sinh(LIMIT), math.sinh(LIMIT))
    inner = np.where(observed & (truth > 0), truth, math.exp(min(window.loc, 700.0))) if window.log else 1.0
    unit = np.log(window.scale * inner / column[1] / np.sqrt(1 + off**2))
    return {
        "steps": steps.astype(np.float32).reshape(patches, PATCH, FUTURE_FEATURES),
        "window": np.tile(_window_features(window, past, column), (patches, 1)),
        "forecasts": forecasts.astype(np.float32).reshape(patches, PATCH, FORECASTS),
        "values": np.where(observed, z, 0).astype(np.float32).reshape(patches, PATCH),
        "observed": observed.reshape(patches, PATCH),
        "log_unit": np.where(observed, unit, 0).astype(np.float32).reshape(patches, PATCH),
        "change": np.full(patches, window.change, np.float32),
        "units": np.tile(np.asarray([window.loc, window.scale, window.log, window.most]), (patches, 1)),
    }


def squashed(values: np.ndarray) -> np.ndarray:
    """asinh, within the limits."""
    return np.clip(np.arcsinh(values), -LIMIT, LIMIT)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.asarray([math.nan if value is None else value for value in values], float)


def _window_features(window: Window, values: np.ndarray, column: tuple[float, float]) -> np.ndarray:
    loc, scale = fit_scale(values)
    features = [(loc - column[0]) / column[1], math.log(scale / column[1]), math.log(window.change), len(values) / 64]
    return squashed(np.asarray(features)).astype(np.float32)


class SeriesIn(Adapter):
    """Periodic and plain features of the steps of a patch and of its window; the model adds the name's words."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.empty(FREQUENCIES))
        self.inner = nn.Linear(PATCH * (PAST_FEATURES + 2 * FREQUENCIES) + WINDOW, hidden_size)
        self.outer = nn.Linear(hidden_size, hidden_size)
        nn.init.normal_(self.frequencies, std=FREQUENCY_STD)

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        steps = arrays["steps"].to(self.frequencies.dtype)  # N P M
        angle = 2 * math.pi * steps[..., :1] * self.frequencies  # N P Q
        waves = torch.cat((angle.sin(), angle.cos()), -1) * steps[..., 1:2]
        features = torch.cat((steps.flatten(1), waves.flatten(1), arrays["window"].to(steps.dtype)), -1)
        return self.outer(F.silu(self.inner(features)))


class SeriesOut(Adapter):
    """A query for the next PATCH steps; the head weighs the simple forecasts and predicts histograms around them."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.features = nn.Linear(PATCH * FUTURE_FEATURES + WINDOW, hidden_size)
        self.outer = nn.Linear(hidden_size, hidden_size)
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.step = nn.Linear(FUTURE_FEATURES, hidden_size)
        self.step_embedding = nn.Parameter(torch.empty(PATCH, hidden_size))
        self.bins = nn.Linear(hidden_size, BINS)
        self.weights = nn.Linear(hidden_size, FORECASTS)
        nn.init.normal_(self.step_embedding, std=0.02)
        nn.init.normal_(self.weights.weight, std=0.02)
        nn.init.zeros_(self.weights.bias)

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        steps = arrays["steps"].to(self.step_embedding.dtype)
        return self.outer(F.silu(self.features(torch.cat((steps.flatten(1), arrays["window"].to(steps.dtype)), -1))))

    def distribution(self, hidden: Tensor, arrays: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the bins of each step, and the location they are around.  # N D -> N P B, N P"""
        steps = arrays["steps"].to(hidden.dtype)
        inner = F.silu(self.inner(hidden)[:, None] + self.step(steps) + self.step_embedding)  # N P D
        weight = self.weights(inner).float().softmax(-1)  # N P K
        return self.bins(inner).float().log_softmax(-1), (weight * arrays["forecasts"]).sum(-1)

    def histograms(self, hidden: Tensor, arrays: dict[str, Tensor]) -> list[Histogram]:
        """The distributions of the observed steps of each row, in the column's units.  # B T D, B*T … -> B"""
        log_probability, location = self.distribution(hidden.flatten(0, 1), arrays)
        units, change = arrays["units"].double(), arrays["change"].double()  # N 4, N
        loc = units[:, :1] + units[:, 1:2] * location  # N P
        scale = torch.stack([loc, (units[:, 1] * change)[:, None].expand_as(loc)], -1)  # N P 2
        width, most = (one[:, None].expand_as(loc) for one in (arrays["width"], units[:, 3]))
        found = (log_probability.exp(), scale, width, most, arrays["observed"])
        rows = (array.flatten(0, 1).unflatten(0, (len(hidden), -1)).cpu().numpy() for array in found)
        logs = arrays["units"][:, 2].reshape(len(hidden), -1)[:, 0].bool().tolist()
        return [Histogram(p[seen], scale[seen], log, width[seen], most[seen])
                for p, scale, width, most, seen, log in zip(*rows, logs, strict=True)]  # fmt: skip

    def nll(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        nll, _ = expected_nll(*self.distribution(hidden, arrays), arrays["values"], arrays["change"][:, None])
        return ((nll + arrays["log_unit"]) * arrays["observed"]).sum(-1)

    def training_loss(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        count = arrays["observed"].sum(-1).clamp(min=1)
        found, change = self.distribution(hidden, arrays), arrays["change"][:, None]
        nll, distance = expected_nll(*found, arrays["values"], change, smooth=True)
        return ((nll + DISTANCE_WEIGHT * distance) * arrays["observed"]).sum(-1) / count
