"""Linear regressions of later steps of a series on its last ones: within one window, and fitted to many windows."""

# Letters: W windows, C steps of the past, H of the future, L lags, T features of a time, X inputs, F folds

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

# A sine and a cosine of the time of the day, of the week, of the month and of the year, in seconds.
CYCLES = (86_400.0, 7 * 86_400.0, 30.436875 * 86_400.0, 365.2425 * 86_400.0)
TIMES = 2 * len(CYCLES)
# Times of the steps from the first on, as far as they are given, and the length of a step, in seconds. Months and days
# of business have no one length.
Clock = tuple[Sequence[float], float]

MAX_NUMBER = 1e30  # a larger value, such as a mark for a missing one, makes features in fp32 infinite
ORDER, PENALTY = 8, 3.0  # of the regression within a window
MIN_INPUT = 0.1  # deviation of an input, of that of the values
MAX_VALUE = 45.0  # of a forecast, in scales of its window
MAX_CHANGE = 1e150  # of one, before that: growth without end becomes infinite, and then no number
LAGS = (8, 16, 32, 64, 96)
PENALTIES = np.logspace(-1, 5, 13)
FOLDS = 5  # runs of training windows, each forecast by what was fitted to the others
MIN_WINDOWS = 16
MIN_GAIN = 0.01  # more inputs are taken if they lower the error of the folds by this fraction
HALF_LIFE = 0.5  # of the length of a series: windows so much further away weigh half as much


def time_features(clock: Clock | None, first: int, count: int) -> np.ndarray:
    """Where in the day, week, month and year each step lies; 0 if unknown or shorter than a step.  # -> X T"""
    if clock is None:
        return np.zeros((count, TIMES))
    given, length = clock
    steps = first + np.arange(count)
    last = len(given) - 1
    seconds = np.asarray(given)[np.minimum(steps, last)] + length * np.maximum(steps - last, 0)
    angle = 2 * np.pi * seconds[:, None] / np.asarray(CYCLES)
    seen = np.asarray(CYCLES) >= 2 * length
    return np.concatenate([np.sin(angle) * seen, np.cos(angle) * seen], 1)


def autoregression(z: np.ndarray, period: int, horizon: int) -> np.ndarray:
    """Forecasts step by step: each change from the last values, those of a season ago, and the distance to the mean.

    Ridge regression within the window; the last value again if it is too short.  # C -> H
    """
    order = min(ORDER, len(z) // 4)
    lags = np.asarray([*range(2, order + 1), *([period, period + 1] if period > 1 else [])])
    longest = int(lags.max(initial=1))
    if order < 2 or len(z) - longest < 2 * len(lags):
        return np.full(horizon, z[-1])
    mean, ends = z.mean(), np.arange(longest, len(z))[:, None]
    inputs = np.concatenate([z[ends - lags] - z[ends - 1], z[ends - 1] - mean], 1)
    scale = np.maximum(inputs.std(0), MIN_INPUT * z.std()) + 1e-9
    inputs = inputs / scale
    change = z[longest:] - z[longest - 1 : -1]
    weights = np.linalg.solve(inputs.T @ inputs + PENALTY * np.eye(inputs.shape[1]), inputs.T @ change) / scale
    found = np.concatenate([z[-longest:], np.zeros(horizon)])
    lowest, highest = 2 * z.min() - z.max(), 2 * z.max() - z.min()
    for end in range(longest, len(found)):
        last = found[end - 1]
        step = last + (found[end - lags] - last) @ weights[:-1] + (last - mean) * weights[-1]
        found[end] = min(max(step, lowest), highest)
    return found[longest:]


@dataclass(frozen=True)
class LagRidge:
    """Ridge regression of H steps, less the last value, on the lags less it, perhaps on itself, and on the time."""

    lags: int
    level: bool
    weights: np.ndarray  # X + 1 H, the constant last, float32 as they are saved
    of_scaled: bool = False  # whether values are in units of their own window

    @property
    def timed(self) -> bool:
        return len(self.weights) > self.lags + self.level

    def forecast(self, values: np.ndarray, clock: Clock | None, horizon: int) -> np.ndarray:
        """The steps after C values without gaps; those beyond H follow from the first ones.  # C -> H"""
        found = values
        while len(found) < len(values) + horizon:
            times = time_features(clock, len(found), 1)
            inputs = _inputs(found[None], times if self.timed else None, self.lags, self.level)
            found = np.concatenate([found, found[-1] + np.clip((inputs @ self.weights)[0], -MAX_CHANGE, MAX_CHANGE)])
        return found[len(values) : len(values) + horizon]

    def to_text(self) -> str:
        """Lags, level and H, the weights as base64 of float32, and `scaled` if values are."""
        weights = base64.b64encode(self.weights.tobytes()).decode()
        return f"{self.lags} {self.level:d} {self.weights.shape[1]} {weights}{' scaled' * self.of_scaled}"

    @classmethod
    def of_text(cls, text: str) -> Self:
        lags, level, horizon, weights, *scaled = text.split()
        array = np.frombuffer(base64.b64decode(weights), np.float32).reshape(-1, int(horizon))
        return cls(int(lags), level == "1", array, bool(scaled))


def _inputs(past: np.ndarray, times: np.ndarray | None, lags: int, level: bool) -> np.ndarray:
    """Lags less the last value, the last value, the time of the first step, and a constant.  # W C, W T -> W X+1"""
    missing = lags - past.shape[1]
    recent = np.pad(past, ((0, 0), (missing, 0)), mode="edge") if missing > 0 else past[:, -lags:]
    last = recent[:, -1:]
    parts = [recent[:, :-1] - last, last[:, : int(level)], *([] if times is None else [times]), np.ones_like(last)]
    return np.concatenate(parts, 1)


@dataclass(frozen=True)
class Ridges:
    """Of a column: `plain` on its lags alone, `full` on what else lowers the error, for series with a clock."""

    plain: LagRidge
    full: LagRidge

    @property
    def of_scaled(self) -> bool:
        return self.plain.of_scaled

    def forecasts(self, values: np.ndarray, clock: Clock | None, horizon: int) -> list[np.ndarray]:
        """Of both; without a clock, the plain one twice if the other needs it.  # C -> 2 · H"""
        full = self.plain if clock is None and self.full.timed else self.full
        return [ridge.forecast(values, clock, horizon) for ridge in (self.plain, full)]


@dataclass(frozen=True)
class FittedRidges:
    """Those of all training windows, and for each fold those of the other folds, which forecast its windows."""

    whole: Ridges
    folds: tuple[Ridges, ...] = ()

    def to_texts(self) -> tuple[str, str]:
        return self.whole.plain.to_text(), self.whole.full.to_text()

    @classmethod
    def of_texts(cls, texts: tuple[str, str]) -> Self:
        return cls(Ridges(*map(LagRidge.of_text, texts)))

    def of(self, position: tuple[int, int] | None) -> Ridges:
        """Those for a training window at a position among the windows of its series; for any other window if None."""
        return self.whole if position is None or not self.folds else self.folds[position[0] * FOLDS // position[1]]


@dataclass(frozen=True)
class _Windows:
    """What ridges are fitted to: the windows of each fold are forecast by those that are fitted to the others."""

    past: np.ndarray  # W C
    future: np.ndarray  # W H
    times: np.ndarray | None  # W T, of the first steps
    fold: np.ndarray  # W
    weight: np.ndarray  # F+1 W: of all windows, and of those of the other folds
    of_scaled: bool = False

    def fit(self, lags: int, level: bool, timed: bool) -> tuple[np.ndarray, list[LagRidge]]:
        """The errors of the windows with the best penalty, and the ridges of all windows and of the folds.  # W"""
        inputs = _inputs(self.past, self.times if timed else None, lags, level)
        target = self.future - self.past[:, -1:]
        solved = [_solve(inputs, target, one) for one in self.weight]  # F+1 · P X+1 H
        errors = np.empty((len(PENALTIES), len(target)))
        for index, weights in enumerate(solved[1:]):
            rows = self.fold == index
            errors[:, rows] = np.abs(inputs[rows] @ weights - target[rows]).sum(-1)
        best = int(errors.sum(1).argmin())
        ridges = [LagRidge(lags, level, weights[best].astype(np.float32), self.of_scaled) for weights in solved]
        return errors[best], ridges

    def fit_best(self) -> tuple[np.ndarray, FittedRidges]:
        """The errors with the best inputs; ridges on lags alone, and on what lowers the error of these.  # W"""
        size = self.past.shape[1]
        lags = ([lag for lag in LAGS if lag < size] + [size])[: len(LAGS)]

        def best(level: bool, timed: bool) -> tuple[np.ndarray, list[LagRidge]]:
            return min((self.fit(lag, level, timed) for lag in lags), key=lambda one: one[0].sum())

        plain = full = best(level=False, timed=False)
        for level, timed in ((False, True), (True, True), (True, False)):
            if not timed or self.times is not None:
                found = best(level, timed)
                full = found if found[0].sum() < (1 - MIN_GAIN) * full[0].sum() else full
        whole, *folds = [Ridges(*both) for both in zip(plain[1], full[1], strict=True)]
        return full[0], FittedRidges(whole, tuple(folds))


def fit_ridges(
    past: np.ndarray,
    future: np.ndarray,
    times: np.ndarray | None,
    positions: Sequence[tuple[int, int]],
    units: np.ndarray,
) -> FittedRidges | None:
    """Fit to W windows, the penalty and the inputs chosen by the error on folds; None if there are too few.

    Values are as they are or, if that lowers the error in their units, in those of each window: the series of a column
    may differ by orders of magnitude, and the largest would decide alone.

    past: W C; future: W H; times: W T of the first steps; positions: row among those of its series, and their number;
    units: W 2, location and scale of each window
    """
    begin, count = np.asarray(positions).T
    fold = begin * FOLDS // count
    # Windows whose targets overlap those of a fold are no others.
    steps = future.shape[1]
    kept = [(begin <= index * count / FOLDS - steps) | (begin >= (index + 1) * count / FOLDS + steps)
            for index in range(FOLDS)]  # fmt: skip
    if min(rows.sum() for rows in kept) < MIN_WINDOWS:
        return None
    fraction, starts = begin / count, np.arange(FOLDS)[:, None] / FOLDS
    away = np.concatenate([[1 - fraction], np.maximum(starts - fraction, fraction - starts - 1 / FOLDS)])
    chosen = np.concatenate([np.full((1, len(past)), True), kept])
    weight = chosen * 0.5 ** (np.maximum(away, 0) / HALF_LIFE)  # F+1 W
    loc, scale = units.T[:, :, None]  # W 1
    errors, found = _Windows(past, future, times, fold, weight).fit_best()
    own = _Windows((past - loc) / scale, (future - loc) / scale, times, fold, weight, of_scaled=True)
    own_errors, own_found = own.fit_best()
    return own_found if own_errors.sum() < (1 - MIN_GAIN) * (errors / scale[:, 0]).sum() else found


def _solve(inputs: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weights of ridge regression for each penalty P, of inputs in their own units.  # W X+1, W H, W -> P X+1 H"""
    count, weight = np.count_nonzero(weight), weight / weight.sum()
    x = inputs[:, :-1]
    mean, middle = weight @ x, weight @ target
    scale = np.sqrt(weight @ (x - mean) ** 2) + 1e-12
    x = (x - mean) / scale
    values, vectors = np.linalg.eigh((x.T * weight) @ x * count)
    projected = vectors.T @ ((x.T * weight) @ (target - middle)) * count  # X H
    found = vectors @ (projected / (np.maximum(values, 0)[:, None] + PENALTIES[:, None, None])) / scale[:, None]
    return np.concatenate([found, (middle - mean @ found)[:, None]], 1)
