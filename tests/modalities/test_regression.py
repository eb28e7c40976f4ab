"""Regressions of series: within a window, and fitted to many windows, without those that a fold holds."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from openm6.modalities.numbers import Numbers
from openm6.modalities.regression import FOLDS, Clock, FittedRidges, LagRidge, autoregression, fit_ridges, time_features
from openm6.modalities.series import NumberSeries, SeriesStats, fit_column
from openm6.modalities.text import Text, train_tokenizer

DAY = 86_400.0
CONTEXT, HORIZON = 24, 6


def windows(values: np.ndarray, clock: bool = False) -> list[NumberSeries]:
    """All windows of a series of days, as training windows."""
    count = len(values) - CONTEXT - HORIZON + 1
    return [
        NumberSeries(
            "sales", list(values[n + CONTEXT : n + CONTEXT + HORIZON]), list(values[n : n + CONTEXT]),
            ([n * DAY], DAY) if clock else None, position=(n, count),
        )
        for n in range(count)
    ]  # fmt: skip


def fitted(series: list[NumberSeries], log: bool = False) -> FittedRidges:
    found = fit_column(series, SeriesStats(log=log))
    assert found is not None
    return found


def seasonal(count: int) -> np.ndarray:
    step = np.arange(count)
    return 50 + 0.3 * step + 8 * np.sin(2 * np.pi * step / 7) + np.random.default_rng(0).normal(0, 0.3, count)


def test_growth_without_end_stays_finite() -> None:
    ridge = LagRidge(2, True, np.asarray([[0.0], [9.0], [0.0]], np.float32))
    found = ridge.forecast(np.asarray([1.0, 2.0]), None, 2000)
    assert np.isfinite(found).all() and found[-1] > 1e100


def test_an_autoregression_returns_to_the_mean_and_goes_on_with_a_season() -> None:
    rng = np.random.default_rng(0)
    noise = np.zeros(80)
    for step in range(1, 80):
        noise[step] = 0.6 * noise[step - 1] + rng.normal()
    noise[-1] = 5.0
    found = autoregression(noise, 1, 12)
    assert found[0] < 4 and abs(found[-1] - noise.mean()) < 1
    wave = np.sin(2 * np.pi * np.arange(60) / 6)
    np.testing.assert_allclose(autoregression(wave, 6, 12), wave[:12], atol=0.2)
    assert autoregression(wave[:4], 1, 3).tolist() == [wave[3]] * 3, "too short for any fit"


def test_ridges_go_on_with_trend_and_season_beyond_their_horizon() -> None:
    values = seasonal(200)
    ridges = fitted(windows(values[:150])).of(None)
    for found in ridges.forecasts(values[126:150], None, 3 * HORIZON):
        assert np.abs(found - values[150:168]).mean() < 1.5
    assert np.abs(values[149] - values[150:168]).mean() > 4


def test_a_training_window_is_forecast_by_what_was_fitted_to_others() -> None:
    values = np.random.default_rng(0).normal(size=120).cumsum()
    plain, spoiled = windows(values), windows(values)
    count = plain[0].position[1]  # type: ignore[index]
    index = count // 2
    spoiled[index] = NumberSeries("sales", [1e3] * HORIZON, spoiled[index].past, position=(index, count))
    one, other = fitted(plain), fitted(spoiled)
    own = index * FOLDS // count
    np.testing.assert_array_equal(one.of((index, count)).plain.weights, one.folds[own].plain.weights)
    # The penalty may differ, as it is chosen on all folds.
    apart = [np.abs(a.plain.weights - b.plain.weights).max() for a, b in zip(one.folds, other.folds, strict=True)]
    assert apart[own] < 0.2 * min(apart[:own] + apart[own + 1 :])


def test_the_year_is_read_from_the_clock_if_that_helps() -> None:
    step = np.arange(1400)
    values = 10 * np.sin(2 * np.pi * step / 365.2425) + np.random.default_rng(0).normal(0, 2, 1400)
    found = fitted(windows(values, clock=True))
    assert found.whole.full.timed and not found.whole.plain.timed
    past = values[700 : 700 + CONTEXT]
    plain, full = found.whole.forecasts(past, ([700 * DAY], DAY), HORIZON)
    assert not np.array_equal(plain, full)
    without = found.whole.forecasts(past, None, HORIZON)
    assert np.array_equal(without[0], without[1]), "the time is unknown"
    assert not fitted(windows(values)).whole.full.timed


def test_months_lie_where_they_are_and_go_on_by_the_step() -> None:
    """By a first time and a step of 31 days, the last of sixty months would lie a month late."""
    dates = [datetime(2015 + n // 12, 1 + n % 12, 1, tzinfo=UTC).timestamp() for n in range(60)]
    found = time_features((dates, 31 * DAY), 0, 61)
    year = np.unwrap(np.arctan2(found[:, 3], found[:, 7])) / (2 * np.pi)
    np.testing.assert_allclose(np.diff(year[:60:12]), 1, atol=0.003, err_msg="a year, up to leap years")
    assert year[60] - year[59] == pytest.approx(31 / 365.2425)


def test_texts_hold_all_that_is_needed() -> None:
    found = fitted(windows(seasonal(120), clock=True))
    again = FittedRidges.of_texts(found.to_texts())
    past = seasonal(120)[-CONTEXT:]
    for one, other in zip(*(x.of((3, 9)).forecasts(past, None, 9) for x in (again, again)), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(*(x.of(None).forecasts(past, ([0.0], DAY), 9) for x in (found, again)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_series_of_other_magnitudes_do_not_decide_alone() -> None:
    """Small ones have a week, large ones are a walk; a value of 0 rules logarithms out."""
    rng, step = np.random.default_rng(0), np.arange(160)
    week = np.maximum(0, 2 + 2 * np.sin(2 * np.pi * step / 7))
    small = [week + rng.normal(0, 0.1, 160).clip(0) for _ in range(6)]
    large = [1e6 + 1e5 * rng.normal(size=160).cumsum() for _ in range(2)]
    found = fitted([window for values in (*small, *large) for window in windows(values[:130])])
    assert found.whole.of_scaled and FittedRidges.of_texts(found.to_texts()).whole.of_scaled
    assert not fitted(windows(seasonal(150))).whole.of_scaled, "one series is as it is"
    numbers = Numbers(Text(train_tokenizer(["sales"], 300)), {"sales": (2.0, 2.0)}, {"sales": SeriesStats(7)})
    numbers.ridges = {"sales": found}
    future = NumberSeries("sales", list(small[0][130:136]), list(small[0][106:130]))
    arrays = numbers.target(future).arrays
    loc, scale = arrays["units"][0, :2]
    forecast = loc + scale * arrays["forecasts"][0, :HORIZON, -2]
    assert np.abs(forecast - small[0][130:136]).mean() < 0.3


def test_windows_of_the_length_that_most_have_are_enough() -> None:
    known = windows(seasonal(150))
    short = replace(known[0], values=known[0].values[:-1])
    assert fitted([short, *known]).to_texts() == fitted(known).to_texts()


def test_few_windows_have_none() -> None:
    assert fit_column(windows(seasonal(40)), SeriesStats()) is None
    assert fit_column([NumberSeries("sales", [1.0], [2.0])], SeriesStats()) is None


def test_a_window_without_a_value_takes_nothing_from_others() -> None:
    known = windows(seasonal(200) + 9)
    late = replace(known[0], past=[math.nan] * len(known[0].past), values=[math.nan] * len(known[0].values))
    for log in (False, True):
        found, expected = (
            fit_column([late, *known[1:]], SeriesStats(log=log)),
            fit_column(known[1:], SeriesStats(log=log)),
        )
        assert found is not None and expected is not None and found.to_texts() == expected.to_texts()
    assert fit_column(windows(seasonal(120) - 60), SeriesStats(log=True)) is None, "logarithms of what is negative"
    assert fit_ridges(np.ones((3, 9)), np.ones((3, 2)), None, [(n, 3) for n in range(3)], np.ones((3, 2))) is None


@pytest.mark.parametrize("gaps", [False, True])
def test_the_modality_takes_those_of_the_place(gaps: bool) -> None:
    values = seasonal(150)
    if gaps:
        values[::9] = np.nan
    series = windows(values, clock=True)
    numbers = Numbers(Text(train_tokenizer(["sales"], 300)), {"sales": (60.0, 20.0)}, {"sales": SeriesStats(7)})
    before = numbers.target(series[5]).arrays["forecasts"]
    assert np.array_equal(before[..., -1], before[..., -3]), "the autoregression stands in"
    numbers.ridges = {"sales": fitted(series)}
    training, other = (
        numbers.target(one).arrays["forecasts"] for one in (series[5], NumberSeries("sales", *_past(series[5])))
    )
    assert np.isfinite(training).all() and not np.array_equal(training[..., -1], before[..., -1])
    assert not np.array_equal(training[..., -1], other[..., -1])
    artificial = NumberSeries("sales", *_past(series[5]), stats=SeriesStats(7))
    np.testing.assert_array_equal(numbers.target(artificial).arrays["forecasts"], before)


def _past(series: NumberSeries) -> tuple[list[float | None], list[float | None], Clock | None]:
    return list(series.values), list(series.past), series.clock
