"""Artificial series of trends, seasons, smooth processes and regimes: a model that saw many forecasts new ones."""

# Letters: L steps of a series

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from openm6.core.seeds import derive_seed, numpy_generator
from openm6.data.records import Record
from openm6.data.source import Neighbour, Source, SourceConfig, Split, check_index

# Steps of a season: of days in weeks, months in years, hours in days, …; any other period is drawn between the bounds.
PERIODS = (4, 7, 12, 24, 52)
PERIOD_BOUNDS = (3, 48)
# Chances of a part of a series.
SEASON, TREND, SMOOTH, SHIFT, OUTLIERS, GAPS, PERCENT = 0.7, 0.7, 0.5, 0.15, 0.1, 0.15, 0.4


class SyntheticSeriesConfig(SourceConfig):
    """Artificial series without end: `count` in an epoch, each of `min_context` to `context` steps and a `horizon`."""

    kind: Literal["synthetic_series"] = "synthetic_series"
    column: str = "series"  # the name that they have in common
    min_context: int = Field(default=24, ge=8, le=65536)
    context: int = Field(default=96, ge=8, le=65536)
    horizon: int = Field(default=16, ge=1, le=65536)
    count: int = Field(default=100_000, ge=1)
    test_count: int = Field(default=200, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _contexts_in_order(self) -> Self:
        if self.min_context > self.context:
            raise ValueError(f"min_context {self.min_context} exceeds context {self.context}: change either")
        return self

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        count = {"train": self.count, "validation": 0, "test": self.test_count}[split]
        return SyntheticSeriesSource(name, self, split, count)


@dataclass(eq=False)
class SyntheticSeriesSource(Source):
    """Windows of artificial series, others each epoch; `extra` as of windows, with `period` and `log`."""

    name: str
    config: SyntheticSeriesConfig
    split: Split
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        return self.at(index, 0)

    def at(self, index: int, epoch: int) -> Record:
        index, config = check_index(index, len(self)), self.config
        rng = numpy_generator(derive_seed(config.seed, "synthetic series", self.split), epoch, index)
        context = int(rng.integers(config.min_context, config.context + 1))
        values, period, log = draw_series(rng, context + config.horizon)
        series = {config.column: [None if np.isnan(value) else float(value) for value in values]}
        extra: dict[str, Any] = {"context": context, "horizon": config.horizon, "block": f"{epoch}/{index}"}
        extra |= {"period": period, "log": log}
        return {"id": f"{self.name}/{self.split}/{epoch}/{index}", "series": series, "extra": extra}


def draw_series(rng: np.random.Generator, length: int) -> tuple[np.ndarray, int, bool]:
    """Values (NaN: missing), the steps of a season (1: none), and whether the changes grow with the level.  # -> L"""
    step = np.arange(length)
    period = 1
    noise = _noise(rng, length)
    values = noise * 10 ** rng.uniform(-1.5, 0.3)
    if rng.random() < TREND:
        values = values + _trend(rng, step)
    if rng.random() < SEASON:
        period = int(rng.choice(PERIODS)) if rng.random() < 0.7 else int(rng.integers(*PERIOD_BOUNDS))
        values = values + _season(rng, step, period) * 10 ** rng.uniform(-0.7, 0.5)
        period = period if period <= length // 3 else 1
    if rng.random() < SMOOTH:
        values = values + _smooth(rng, length) * 10 ** rng.uniform(-1.0, 0.3)
    if rng.random() < SHIFT:
        values = values + np.where(step >= rng.integers(length), rng.normal(0, 2), 0.0)
    if rng.random() < OUTLIERS:
        values = values + np.where(rng.random(length) < 0.03, rng.normal(0, 4, length), 0.0)
    log = bool(rng.random() < PERCENT)
    if log:
        values = np.exp(values / max(values.std(), 1e-6) * rng.uniform(0.05, 0.8))
    values = values * 10 ** rng.uniform(-2, 4) + (0.0 if log else rng.normal(0, 100))
    if rng.random() < GAPS:
        missing = rng.random(length) < rng.uniform(0.02, 0.3)
        missing[-1] = False  # something is to be forecast
        values = np.where(missing, np.nan, values)
    return values, period, log


def _noise(rng: np.random.Generator, length: int) -> np.ndarray:
    """White, autoregressive, or a random walk, with normal or heavy tails; its scale may change once.  # -> L"""
    white = rng.standard_t(4, length) if rng.random() < 0.3 else rng.normal(size=length)
    if rng.random() < 0.2:
        white = white * np.where(np.arange(length) < rng.integers(length), 1.0, 10 ** rng.uniform(-0.5, 0.5))
    kind = rng.random()
    if kind < 0.3:
        return white
    keep = 1.0 if kind > 0.75 else rng.uniform(0.2, 0.98)
    values = np.empty(length)
    last = rng.normal() / np.sqrt(max(1 - keep * keep, 0.05))
    for index, value in enumerate(white.tolist()):
        last = keep * last + value
        values[index] = last
    return values / max(values.std(), 1e-6)


def _trend(rng: np.random.Generator, step: np.ndarray) -> np.ndarray:
    """A line, bent or saturating with some chance.  # L -> L"""
    fraction = step / len(step)
    slope = rng.normal(0, 3)
    kind = rng.random()
    if kind < 0.5:
        return slope * fraction
    if kind < 0.8:
        return slope * fraction + rng.normal(0, 3) * np.maximum(fraction - rng.random(), 0)
    return slope * (1 - np.exp(-fraction * rng.uniform(1, 5)))


def _season(rng: np.random.Generator, step: np.ndarray, period: int) -> np.ndarray:
    """Harmonics, or a profile drawn step by step; its amplitude may change over time.  # L -> L"""
    if rng.random() < 0.6:
        waves = [rng.normal() / (n + 1) * np.sin(2 * np.pi * ((n + 1) * step / period + rng.random()))
                 for n in range(int(rng.integers(1, 4)))]  # fmt: skip
        season = np.sum(waves, 0)
    else:
        season = rng.normal(size=period)[step % period]
    season = season / max(season.std(), 1e-6)
    return season * (1 + rng.uniform(-0.5, 0.5) * step / len(step))


def _smooth(rng: np.random.Generator, length: int) -> np.ndarray:
    """A smooth process: white noise under a Gaussian window, as a draw from an RBF kernel.  # -> L"""
    width = rng.uniform(2, length / 3)
    reach = np.arange(-int(3 * width), int(3 * width) + 1)
    window = np.exp(-0.5 * (reach / width) ** 2)
    values = np.convolve(rng.normal(size=length + len(window) - 1), window, mode="valid")
    return values / max(values.std(), 1e-6)
