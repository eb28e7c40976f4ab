"""Forecast windows of a set of series, and the baselines: seasonal naive, ridge and boosting on lags, ETS."""

# Letters: W windows, H steps ahead, Q quantiles, L lags, R rows of a series

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import RidgeCV

from benchmarks.harness import Deadline
from benchmarks.own_data.datasets import Horizon
from benchmarks.own_data.frame import Frame
from benchmarks.own_data.scores import SERIES_LEVELS
from openm6.core.errors import DataError

MAX_LAGS = 48
MAX_ROWS = 30_000  # of boosting
HELD_OUT = 0.2  # of the training windows, for the quantiles of residuals
HARMONICS = 3
LOG_FLOOR = 0.05  # of the median
NO_ETS = "ETS is left out: statsmodels is not installed"


@dataclass(frozen=True)
class Window:
    """One forecast: of which column and group, and the row of the series at which it begins."""

    column: str
    group: str
    origin: int


class Panel:
    """Series by column and group, in order of time; the last `test_rows` of each are forecast from several origins."""

    def __init__(self, frame: Frame, targets: tuple[str, ...], horizon: Horizon) -> None:
        self.horizon = horizon
        self.targets = targets
        groups = list(frame.columns[horizon.group]) if horizon.group else [""] * len(frame)
        # Rows of the table by group; all sets come sorted by time.
        self.rows = {name: np.flatnonzero([own == name for own in groups]) for name in dict.fromkeys(groups)}
        self.values = {
            (column, group): frame.numbers(column)[rows] for column in targets for group, rows in self.rows.items()
        }
        self.frame = frame

    def border(self, group: str) -> int:
        """Return the number of training rows of a group."""
        return len(self.rows[group]) - self.horizon.test_rows

    def training(self) -> Frame:
        """Return the rows before the test rows of each group."""
        kept = np.concatenate([rows[: self.border(group)] for group, rows in self.rows.items()])
        return self.frame.rows(np.sort(kept))

    @cached_property
    def windows(self) -> list[Window]:
        """The forecasts of the test rows with at least one observed value."""
        found = []
        for (column, group), values in self.values.items():
            for origin in range(self.border(group), len(values) - self.horizon.steps + 1, self.horizon.stride):
                if np.isfinite(values[origin : origin + self.horizon.steps]).any():
                    found.append(Window(column, group, origin))
        return found

    @cached_property
    def truth(self) -> np.ndarray:
        """The values to be forecast.  # W H"""
        steps = self.horizon.steps
        return np.stack([self.values[one.column, one.group][one.origin : one.origin + steps] for one in self.windows])

    @cached_property
    def blocks(self) -> np.ndarray:
        """Windows that overlap, and columns of one table at one time, are no independent evidence.  # W"""
        names = [f"{one.group}/{one.origin // self.horizon.steps}" for one in self.windows]
        return np.unique(names, return_inverse=True)[1]

    @property
    def columns(self) -> np.ndarray:
        """The column of each window.  # W"""
        return np.asarray([one.column for one in self.windows])

    def past(self, window: Window) -> np.ndarray:
        """Return everything before a window, filled forward; test rows among it, as far as they have passed."""
        return filled(self.values[window.column, window.group][: window.origin], self.horizon.season)

    def train_values(self, column: str) -> list[np.ndarray]:
        """Return the training values of each group, filled forward."""
        season = self.horizon.season
        found = [filled(self.values[column, group][: self.border(group)], season) for group in self.rows]
        return [values for values in found if len(values)]


def filled(values: np.ndarray, season: int) -> np.ndarray:
    """Return the values from the season of the first observed one on; a missing one repeats the one before it.

    Whole seasons are left out, so that the phase follows from the number of values.
    """
    seen = np.flatnonzero(np.isfinite(values))
    if not len(seen):
        return values[:0]
    start = seen[0] - seen[0] % season
    last = np.maximum.accumulate(np.where(np.isfinite(values), np.arange(len(values)), seen[0]))
    return values[last[start:]]


def seasonal_naive(panel: Panel, deadline: Deadline) -> np.ndarray:
    """Repeat the last season, or the last value where that fits the training rows better.  # W H Q

    The interval comes from the errors of the same rule in the training rows, by step.
    """
    steps, found = panel.horizon.steps, {}
    for column in panel.targets:
        errors = {
            season: np.concatenate([_naive_errors(values, season, steps) for values in panel.train_values(column)])
            for season in {1, panel.horizon.season}
        }
        errors = {season: rows for season, rows in errors.items() if len(rows)}
        season = min(errors, key=lambda one: np.abs(errors[one]).mean())
        found[column] = season, np.quantile(errors[season], SERIES_LEVELS, axis=0).T  # H Q
    forecasts = []
    for one in panel.windows:
        season, offsets = found[one.column]
        forecasts.append(_repeated(panel.past(one), season, steps)[:, None] + offsets - _median(offsets))
    return np.stack(forecasts)


def _median(offsets: np.ndarray) -> np.ndarray:
    """Return the middle column, so that the point forecast is the rule itself.  # H Q -> H 1"""
    return offsets[:, len(SERIES_LEVELS) // 2, None]


def _repeated(past: np.ndarray, season: int, steps: int) -> np.ndarray:
    season = min(season, len(past))
    return past[len(past) - season + np.arange(steps) % season]


def _naive_errors(values: np.ndarray, season: int, steps: int) -> np.ndarray:
    """Return errors of the rule at all origins of a series.  # origins H"""
    origins = range(season, len(values) - steps + 1)
    rows = [values[origin : origin + steps] - _repeated(values[:origin], season, steps) for origin in origins]
    return np.asarray(rows).reshape(-1, steps)


class Lags:
    """Windows of one column as regression: lags and the phase of the season, relative to the last value.

    In logs if all training values are well above zero, else in units of the series' deviation.
    """

    def __init__(self, panel: Panel, column: str) -> None:
        self.steps, self.season = panel.horizon.steps, panel.horizon.season
        train = panel.train_values(column)
        shortest = min(map(len, train))
        lags = max(self.steps, 2 * self.season if self.season <= MAX_LAGS // 2 else MAX_LAGS)
        self.lags = max(2, min(lags, MAX_LAGS, shortest // 3))
        # A value near zero would be an outlier in logs.
        self.log = all(values.min() > LOG_FLOOR * np.median(values) > 0 for values in train)
        self.scale = float(np.mean([values.std() for values in train])) or 1.0
        rows = [
            (self.features(values[:origin]), self.change(values[: origin + self.steps], origin))
            for values in train
            for origin in range(self.lags, len(values) - self.steps + 1)
        ]
        if len(rows) < 10:
            raise DataError(f"{column}: the training rows are too few for lags")
        # In order of time within a group; held-out windows are the last of each.
        self.x, self.y = (np.stack(part) for part in zip(*rows, strict=True))
        counts = [max(0, len(values) - self.steps + 1 - self.lags) for values in train]
        self.held = np.concatenate([np.arange(count) >= (1 - HELD_OUT) * count for count in counts])

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Return values in logs or in deviations."""
        return np.log(np.maximum(values, 1e-9)) if self.log else values / self.scale

    def features(self, past: np.ndarray) -> np.ndarray:
        """Return the last L values less the last one, and the phase of the season.  # L + 2 HARMONICS"""
        recent = self.transform(past[-self.lags :])
        recent = np.pad(recent, (self.lags - len(recent), 0), mode="edge")
        angle = 2 * math.pi * len(past) / self.season * np.arange(1, HARMONICS + 1)
        return np.concatenate((recent - recent[-1], np.sin(angle), np.cos(angle)))

    def change(self, values: np.ndarray, origin: int) -> np.ndarray:
        """Return the H values from the origin on, less the one before.  # H"""
        found = self.transform(values)
        return found[origin:] - found[origin - 1]

    def restore(self, change: np.ndarray, past: np.ndarray) -> np.ndarray:
        """Return forecasts in the column's units from changes.  # H Q -> H Q"""
        level = self.transform(past[-1:])[0] + change
        return np.exp(level) if self.log else level * self.scale


def ridge_on_lags(panel: Panel, deadline: Deadline) -> np.ndarray:
    """Ridge regression of all steps on lags; the interval from its errors on the last training windows.  # W H Q"""

    def fitted(lags: Lags) -> Callable[[np.ndarray], np.ndarray]:
        alphas = np.logspace(-3, 2, 11)
        part = RidgeCV(alphas=alphas).fit(lags.x[~lags.held], lags.y[~lags.held])
        residuals = lags.y[lags.held] - part.predict(lags.x[lags.held])
        offsets = np.quantile(residuals, SERIES_LEVELS, axis=0).T
        offsets = offsets - _median(offsets)
        whole = RidgeCV(alphas=alphas).fit(lags.x, lags.y)
        return lambda features: whole.predict(features[None])[0][:, None] + offsets

    return _forecast(panel, fitted)


def boosting_on_lags(panel: Panel, deadline: Deadline) -> np.ndarray | None:
    """HistGradientBoosting with the quantile loss on lags and the step, one model per level.  # W H Q"""

    def fitted(lags: Lags) -> Callable[[np.ndarray], np.ndarray]:
        steps = np.arange(lags.steps, dtype=float)
        x = np.column_stack((np.repeat(lags.x, lags.steps, axis=0), np.tile(steps, len(lags.x))))
        y = lags.y.reshape(-1)
        chosen = np.random.default_rng(0).permutation(len(y))[:MAX_ROWS]
        models = []
        for level in SERIES_LEVELS:
            if deadline.passed:
                raise TimeoutError
            model = HistGradientBoostingRegressor(loss="quantile", quantile=float(level), random_state=0)
            models.append(model.fit(x[chosen], y[chosen]))

        def forecast(features: np.ndarray) -> np.ndarray:
            asked = np.column_stack((np.tile(features, (lags.steps, 1)), steps))
            return np.sort(np.stack([model.predict(asked) for model in models], 1), 1)

        return forecast

    try:
        return _forecast(panel, fitted)
    except TimeoutError:
        return None


def _forecast(panel: Panel, fitted: Callable[[Lags], Callable[[np.ndarray], np.ndarray]]) -> np.ndarray:
    lags = {column: Lags(panel, column) for column in panel.targets}
    models = {column: fitted(own) for column, own in lags.items()}
    found = []
    for one in panel.windows:
        past, own = panel.past(one), lags[one.column]
        found.append(own.restore(models[one.column](own.features(past)), past))
    return np.stack(found)


def exponential_smoothing(panel: Panel, deadline: Deadline) -> np.ndarray | None:
    """ETS of statsmodels with additive damped trend and season, refitted at each origin.  # W H Q

    Raises:
        ImportError: statsmodels is not installed.
    """
    # An optional package for this baseline only.
    from statsmodels.tsa.holtwinters import ExponentialSmoothing  # noqa: PLC0415

    steps, season, found = panel.horizon.steps, panel.horizon.season, []
    for one in panel.windows:
        if deadline.passed:
            return None
        past = panel.past(one)
        seasonal = "add" if 1 < season <= len(past) // 3 and season <= MAX_LAGS else None
        model = ExponentialSmoothing(
            past, trend="add", damped_trend=True, seasonal=seasonal, seasonal_periods=season if seasonal else None
        ).fit()
        # Errors grow with the root of the step, roughly.
        offsets = np.quantile(past - model.fittedvalues, SERIES_LEVELS)
        offsets -= offsets[len(SERIES_LEVELS) // 2]  # the point forecast is the method's own
        found.append(model.forecast(steps)[:, None] + np.sqrt(np.arange(1, steps + 1))[:, None] * offsets)
    return np.stack(found)
