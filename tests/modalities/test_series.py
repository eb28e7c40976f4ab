"""Series: their own units, periods and logarithms, simple forecasts, likelihoods, and trends that go on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openm6.modalities.histogram import BINS, LIMIT
from openm6.modalities.numbers import Numbers
from openm6.modalities.regression import time_features
from openm6.modalities.series import (
    FORECASTS,
    PATCH,
    NumberSeries,
    SeriesIn,
    SeriesOut,
    SeriesStats,
    Window,
    fit_scale,
    fit_series,
    future_arrays,
    past_arrays,
    simple_forecasts,
)
from openm6.modalities.text import Text, train_tokenizer

COLUMN = (100.0, 20.0)
MONTHLY = SeriesStats(12, log=True)


def sales(count: int, first: int = 0) -> np.ndarray:
    """Growth in percent and a season of twelve steps, without noise."""
    step = np.arange(first, first + count)
    return 100 * 1.01**step * np.exp(0.2 * np.sin(2 * np.pi * step / 12) + 0.1 * np.cos(np.pi * step / 3))


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return Numbers(Text(train_tokenizer(["sales"], 300)), {"sales": COLUMN}, {"sales": MONTHLY})


def test_scales_are_robust() -> None:
    rng = np.random.default_rng(0)
    values = np.append(rng.normal(50, 4, 4000), [1e9, np.nan, np.inf])
    centre, spread = fit_scale(values)
    assert centre == pytest.approx(50, abs=0.3) and spread == pytest.approx(4, rel=0.05)
    assert fit_scale(np.array([])) == (0.0, 1.0)
    assert fit_scale(np.array([7.0, 7.0])) == (7.0, 7.0), "a constant column still has a spread above 0"
    assert fit_scale(np.full(3, 0.1)) == (0.1, 0.1), "their standard deviation is 1e-17 by rounding"
    rounded = 0.3 + np.tile([0.0, np.spacing(0.3)], 8)
    assert fit_scale(rounded)[1] == pytest.approx(0.3), "nor are values that differ by it a scale"
    assert fit_scale(np.zeros(5))[1] > 0
    assert fit_scale(np.array([0.0] * 99 + [100.0]))[1] > 0


def test_period_and_logarithm_are_found() -> None:
    rng = np.random.default_rng(0)
    noisy = sales(150) * np.exp(rng.normal(0, 0.03, 150))
    noisy[::17] = np.nan
    assert fit_series([noisy[first : first + 48] for first in range(0, 100, 5)]) == MONTHLY
    weekly = np.arange(300) % 7 + rng.normal(0, 0.5, 300)
    assert fit_series([weekly[first : first + 60] for first in range(0, 200, 9)]) == SeriesStats(7)
    walks = rng.normal(size=(30, 60)).cumsum(1)
    assert fit_series(list(walks)) == SeriesStats()
    assert fit_series([]) == fit_series([np.full(40, np.nan)]) == fit_series([np.full(40, 3.0)]) == SeriesStats()
    assert fit_series([1.1 + 0.3 * np.arange(100)]) == SeriesStats(), "the changes of a line differ by rounding alone"


def test_some_simple_forecast_goes_on_with_trend_and_season_beyond_anything_seen() -> None:
    past, future = sales(60), sales(24, first=60)
    window = Window.of(past, MONTHLY, COLUMN)
    found = np.exp(window.loc + window.scale * simple_forecasts(window, 24))  # H K
    error = np.abs(found / future[:, None] - 1).mean(0)
    assert error.min() < 0.01 and found.max() > past.max()
    assert error[0] > 0.1, "the last value alone does not"


@pytest.mark.parametrize("count", [0, 1, 2, 7, 13, 40])
@pytest.mark.parametrize("stats", [SeriesStats(), MONTHLY, SeriesStats(5)])
def test_any_length_has_finite_features(count: int, stats: SeriesStats) -> None:
    for values in (list(sales(count)), [5.0] * count, [None] * count, [-1.0, None] * (count // 2)):
        for arrays in (
            past_arrays(NumberSeries("sales", values, clock=((0.0,), 86_400.0)), stats, COLUMN),
            future_arrays(NumberSeries("sales", [1.0, None] * 10, values), stats, COLUMN),
        ):
            assert all(np.isfinite(array).all() for array in arrays.values() if array.dtype != bool)


def test_units_do_not_matter() -> None:
    """A series in other units is the same to the model, but for its level against the column's."""
    for factor, offset in ((1000.0, 0.0), (0.01, 0.0), (2.0, 50.0)):
        plain, other = sales(40), factor * sales(40) + offset
        stats = SeriesStats(12, log=offset == 0)
        first, second = (
            future_arrays(NumberSeries("sales", list(values[32:]), list(values[:32])), stats, COLUMN)
            for values in (plain, other)
        )
        for name in ("steps", "values", "forecasts", "change"):
            np.testing.assert_allclose(first[name], second[name], rtol=1e-4, atol=1e-4)


def test_patches_end_with_the_last_step(numbers: Numbers) -> None:
    tokens = numbers.source(NumberSeries("sales", [float(value) for value in range(1, PATCH + 4)]))
    assert tokens.kind == "series_in" and len(tokens) == 2
    seen = tokens.arrays["steps"][:, :, 1]
    assert seen[0].tolist() == [0] * (PATCH - 3) + [1] * 3 and seen[1].all()


def test_the_past_is_hidden_if_asked(numbers: Numbers) -> None:
    """Without inputs the likelihood must not know the past."""
    future = [float(value) for value in sales(8, first=40)]
    hidden = [
        numbers.target(NumberSeries("sales", future, list(past)), options={"mask_context": True}).arrays
        for past in (sales(40), sales(40, first=7))
    ]
    shown = [
        numbers.target(NumberSeries("sales", future, list(past))).arrays for past in (sales(40), sales(40, first=7))
    ]
    assert all(np.array_equal(hidden[0][name], hidden[1][name]) for name in hidden[0])
    assert not np.array_equal(shown[0]["forecasts"], shown[1]["forecasts"])


def test_likelihoods_are_densities_on_the_scale_of_the_column(numbers: Numbers) -> None:
    """Summed over the values that a step may take, p(x) is 1; so forecasts compare with frequencies of the column."""
    torch.manual_seed(0)
    adapter, past = SeriesOut(16).requires_grad_(False), list(sales(40))
    # Narrow, so that all of it lies within the limits of the column.
    adapter.bins.bias.copy_(-2 * torch.linspace(-LIMIT, LIMIT, BINS) ** 2)
    width = 2 * LIMIT / BINS / 8
    places = np.arange(-LIMIT, LIMIT, width) + width / 2
    hidden = torch.randn(1, 16)
    found = [
        float(adapter.nll(hidden, tensors(numbers.target(NumberSeries("sales", [value], past)).arrays)))
        for value in COLUMN[0] + COLUMN[1] * np.sinh(places)
        if value > 0
    ]
    # nll is that of a bin of the column; eight places share one.
    assert np.exp(-np.asarray(found)).sum() / 8 == pytest.approx(1, abs=0.03)


def test_missing_steps_weigh_nothing_and_histograms_have_the_units_of_the_column(numbers: Numbers) -> None:
    torch.manual_seed(0)
    adapter, hidden = SeriesOut(16).requires_grad_(False), torch.randn(2, 16)
    past = list(sales(40))
    one, other = (
        tensors(numbers.target(NumberSeries("sales", [150.0, value, *[None] * 7, 151.0], past)).arrays)
        for value in (None, math.nan)
    )
    torch.testing.assert_close(adapter.nll(hidden, one), adapter.nll(hidden, other))
    assert one["observed"].sum() == 2
    (histogram,) = adapter.histograms(hidden[None], one)
    assert histogram.log.all() and len(histogram.probability) == 2
    low, high = histogram.interval(0.5)
    assert (50 < low).all() and (low < high).all() and (high < 1000).all()


def test_the_head_learns_which_simple_forecast_is_right() -> None:
    """The location moves with the gradient: of eight forecasts the head finds the ones that continue the series."""
    torch.manual_seed(0)
    starts = np.random.default_rng(0).integers(0, 60, 64).tolist()
    windows = [NumberSeries("sales", list(sales(8, s + 48)), list(sales(48, s))) for s in starts]
    parts = [future_arrays(window, MONTHLY, COLUMN) for window in windows]
    arrays = tensors({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    arrays["width"] = torch.ones(len(arrays["change"]))
    adapter = SeriesOut(32)
    optimizer = torch.optim.Adam(adapter.parameters(), 0.01)

    def errors() -> tuple[float, float]:
        """Of the median in percent, and of the location in units of the window."""
        with torch.no_grad():
            hidden = adapter.embed(arrays)
            _, location = adapter.distribution(hidden, arrays)
            found = adapter.histograms(hidden[:, None], arrays)
        medians = np.concatenate([histogram.median() for histogram in found])
        truth = np.concatenate([window.values for window in windows])
        return 100 * float(np.abs(medians / truth - 1).mean()), float((location - arrays["values"]).abs().mean())

    before = errors()
    for _ in range(100):
        optimizer.zero_grad()
        adapter.training_loss(adapter.embed(arrays), arrays).mean().backward()
        optimizer.step()
    after = errors()
    assert before[0] > 5 and after[0] < 0.5 and after[1] < 0.6 * before[1]


def test_what_has_no_logarithm_is_forecast_too(numbers: Numbers) -> None:
    """As many values are predicted as were observed, and none that is 0 or less makes a loss infinite."""
    segment = numbers.target(NumberSeries("sales", [100.0, 0.0, -2.0, None], list(sales(40))))
    assert segment.arrays["observed"][0].tolist() == [True] * 3 + [False] * 5
    out, arrays, hidden = SeriesOut(16), tensors(segment.arrays), torch.randn(1, 16)
    losses = torch.stack([out.nll(hidden, arrays), out.training_loss(hidden, arrays)])
    assert losses.isfinite().all() and losses.max() < 100
    with torch.no_grad():
        (histogram,) = out.histograms(hidden[None], arrays)
    assert np.isfinite(histogram.crps(np.array([100.0, 0.0, -2.0]))).all()


def test_logarithms_grow_no_further_than_the_range_of_the_past(numbers: Numbers) -> None:
    """Ten times the largest value, or its ratio to the smallest: exp would make any tail of a wide past infinite."""
    torch.manual_seed(0)
    out = SeriesOut(16)
    for lowest, bound in ((50.0, 1000.0), (0.1, 100_000.0)):
        past = np.geomspace(lowest, 100.0, 40).tolist()
        series = NumberSeries("sales", [1.0] * 8, past, stats=SeriesStats(log=True))
        arrays = tensors(numbers.target(series).arrays)
        arrays["change"] += 5  # tails far away
        with torch.no_grad():
            (histogram,) = out.histograms(torch.randn(1, 1, 16), arrays)
        assert histogram.quantile(0.999).max() == pytest.approx(bound)
        assert histogram.crps(np.full(8, 100.0)).max() < bound


def test_without_a_past_logarithms_are_bounded_by_the_column() -> None:
    window = Window.of(np.full(8, np.nan), SeriesStats(log=True), (100.0, 50.0))
    assert 1000 <= math.exp(window.most) <= 3000


def test_what_was_not_observed_does_not_show() -> None:
    torch.manual_seed(0)
    values = [1.0, 2.0, None, 4.0, 5.0, 4.0, 3.0, 2.0]
    arrays = past_arrays(NumberSeries("sales", values), SeriesStats(), COLUMN)
    assert arrays["steps"][0, 2].tolist() == [0.0] * arrays["steps"].shape[-1]
    assert SeriesIn(16).embed(tensors(arrays)).isfinite().all()


def test_a_jump_after_a_constant_past_is_finite_where_it_is_rounded(numbers: Numbers) -> None:
    past = (300.0 + np.tile([0.0, np.spacing(300.0)], 16)).tolist()
    arrays = tensors(numbers.target(NumberSeries("sales", [1e6], past)).arrays)
    head = SeriesOut(16)
    assert torch.isfinite(head.training_loss(torch.zeros(len(arrays["change"]), 16), arrays)).all()
    assert arrays["units"][0, 1] in (0.1, COLUMN[1])


def test_times_of_the_week() -> None:
    daily = time_features(([0.0], 86_400.0), 3, 14)
    assert daily.shape == (14, 8) and (daily[:, 0] == 0).all(), "a day is no cycle of days"
    np.testing.assert_allclose(daily[:7, 1], daily[7:, 1], atol=1e-12)
    assert not time_features(None, 0, 5).any()
    assert FORECASTS == simple_forecasts(Window.of(sales(30), MONTHLY, COLUMN), 3).shape[1]
