"""Histograms of predicted numbers against direct computation, and the bins that a value falls into."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openm6.modalities.histogram import BINS, LIMIT, Histogram, fit_width, mix_neighbours, one_hot_bins, smooth_bins


def test_smooth_bins_are_distributions_around_the_value() -> None:
    values = torch.tensor([[-LIMIT, -4.49, -1.0, 0.0, 0.013, 2.7, 4.49, LIMIT]])
    mass = smooth_bins(values)
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 8))
    borders = torch.linspace(-LIMIT, LIMIT, BINS + 1)
    middles = (borders[:-1] + borders[1:]) / 2
    inner = slice(2, 6)  # at the ends half of the mass is cut off
    torch.testing.assert_close((mass * middles).sum(-1)[:, inner], values[:, inner], rtol=0, atol=2e-3)
    # A value between two bins may lie in either.
    assert ((mass.argmax(-1) - one_hot_bins(values).argmax(-1)).abs() <= 1).all()


def test_one_hot_bins_at_the_edges() -> None:
    width = 2 * LIMIT / BINS
    values = torch.tensor([[-LIMIT, -LIMIT + width / 2, -LIMIT + 1.5 * width, -1e-6, 1e-6, LIMIT - 1e-4, LIMIT]])
    assert one_hot_bins(values).argmax(-1).tolist() == [[0, 0, 1, BINS // 2 - 1, BINS // 2, BINS - 1, BINS - 1]]
    assert torch.equal(one_hot_bins(values).sum(-1), torch.ones(1, 7))


def sampled(histogram: Histogram, count: int) -> np.ndarray:
    """Many draws of the first distribution, by cell and place in it, not by quantiles."""
    rng = np.random.default_rng(0)
    cell = rng.choice(BINS, count, p=histogram.probability[0] / histogram.probability[0].sum())
    squashed = histogram.borders[cell] + rng.random(count) * (histogram.borders[1] - histogram.borders[0])
    return histogram.loc[0] + histogram.scale[0] * np.sinh(squashed)


@pytest.fixture(scope="module")
def histogram() -> Histogram:
    """Two humps, the right one heavier."""
    middles = np.linspace(-LIMIT, LIMIT, BINS + 1)[:-1] + LIMIT / BINS
    shape = np.exp(-0.5 * ((middles + 0.8) / 0.2) ** 2) + 2 * np.exp(-0.5 * ((middles - 0.9) / 0.3) ** 2)
    return Histogram((shape / shape.sum())[None], np.array([[10.0, 3.0]]))


def test_a_histogram_against_many_draws(histogram: Histogram) -> None:
    draws = sampled(histogram, 400_000)
    assert histogram.mean()[0] == pytest.approx(draws.mean(), abs=0.03)
    assert histogram.median()[0] == pytest.approx(np.median(draws), abs=0.03)
    for share in (0.05, 0.3, 0.7, 0.95):
        assert histogram.quantile(share)[0] == pytest.approx(np.quantile(draws, share), abs=0.05)
    low, high = histogram.interval(0.8)
    assert ((draws >= low) & (draws <= high)).mean() == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("truth", [2.0, 8.0, 11.0, 25.0])
def test_crps_against_its_definition(histogram: Histogram, truth: float) -> None:
    """CRPS = E|X - y| - E|X - X'| / 2."""
    draws = sampled(histogram, 100_000)
    ordered = np.sort(draws)
    rank = np.arange(len(ordered))
    width = 2 * np.mean(ordered * (2 * rank + 1 - len(ordered)) / len(ordered))
    direct = np.abs(draws - truth).mean() - width / 2
    assert histogram.crps(np.array([truth]))[0] == pytest.approx(direct, rel=0.02)


def test_a_certain_histogram() -> None:
    probability = np.zeros((1, BINS))
    probability[0, BINS // 2] = 1
    sure = Histogram(probability, np.array([[5.0, 2.0]]))
    width = 2 * np.sinh(2 * LIMIT / BINS)
    for found in (sure.mean(), sure.median(), *sure.interval(0.98)):
        assert 5.0 <= found[0] <= 5.0 + width
    assert sure.crps(np.array([5.05]))[0] < width


def test_rows_do_not_mix() -> None:
    probability = np.zeros((2, BINS))
    probability[0, 10], probability[1, 150] = 1, 1
    both = Histogram(probability, np.array([[0.0, 1.0], [100.0, 2.0]]))
    for row in (0, 1):
        alone = Histogram(probability[row : row + 1], np.array([[0.0, 1.0], [100.0, 2.0]])[row : row + 1])
        assert both.median()[row] == alone.median()[0] and both.mean()[row] == alone.mean()[0]
        assert both.crps(np.array([1.0, 99.0]))[row] == pytest.approx(alone.crps([1.0, 99.0][row])[0])


def test_a_histogram_of_logarithms(histogram: Histogram) -> None:
    log = Histogram(histogram.probability, np.array([[2.0, 0.3]]), log=True)
    plain = Histogram(histogram.probability, np.array([[2.0, 0.3]]))
    for fraction in (0.05, 0.5, 0.95):
        assert log.quantile(fraction)[0] == pytest.approx(np.exp(plain.quantile(fraction)[0]))
    draws = np.exp(sampled(plain, 400_000))
    assert log.mean()[0] == pytest.approx(draws.mean(), rel=0.01)
    # Outer bins whose exp has no meaning must not decide the mean.
    width = Histogram(np.full((1, BINS), 1 / BINS) * 1e-4 + histogram.probability, np.array([[2.0, 1.0]]), log=True)
    assert np.isfinite(width.mean()[0]) and width.mean()[0] < 100
    bounded = Histogram(log.probability, np.array([[2.0, 0.3]]), log=True, most=np.array([2.5]))
    assert bounded.quantile(0.999)[0] == pytest.approx(np.exp(2.5)) and log.quantile(0.999)[0] > 13
    assert bounded.median() == log.median()


def test_a_width_moves_quantiles_away_from_the_median(histogram: Histogram) -> None:
    wide = Histogram(histogram.probability, np.array([[10.0, 3.0]]), width=np.array([1.5]))
    assert wide.probability.sum() == pytest.approx(1) and wide.median()[0] == pytest.approx(histogram.median()[0])
    for fraction in (0.1, 0.3, 0.9):
        plain, moved = (np.arcsinh((x.quantile(fraction)[0] - 10) / 3) for x in (histogram, wide))
        middle = np.arcsinh((histogram.median()[0] - 10) / 3)
        assert moved - middle == pytest.approx(1.5 * (plain - middle), abs=0.03)
    same = Histogram(histogram.probability, np.array([[10.0, 3.0]]), width=np.array([1.0]))
    np.testing.assert_array_equal(same.probability, histogram.probability)


@pytest.mark.parametrize("log", [False, True])
def test_the_fitted_width_covers_what_it_should(histogram: Histogram, log: bool) -> None:
    """Predictions that are too narrow by a half, over many values of which each is a block, and over few."""
    count, rng = 2000, np.random.default_rng(0)
    narrow = Histogram(np.repeat(histogram.probability, count, 0), np.tile([[1.0, 0.2]], (count, 1)), log)
    wide = Histogram(narrow.probability, np.tile([[1.0, 0.2]], (count, 1)), log, width=np.full(count, 1.5))
    draws = np.array([rng.choice(BINS, p=row) for row in wide.probability])
    truth = 1 + 0.2 * np.sinh(wide.borders[draws] + LIMIT / BINS)
    truth = np.exp(truth) if log else truth
    needed = narrow.width_needed(truth)
    assert fit_width(needed, count) == pytest.approx(1.5, abs=0.1)
    corrected = Histogram(narrow.probability, np.tile([[1.0, 0.2]], (count, 1)), log, np.full(count, 1.5))
    low, high = corrected.interval(0.8)
    assert ((low <= truth) & (truth <= high)).mean() == pytest.approx(0.8, abs=0.03)
    assert 1 < fit_width(needed[:9], 1) < 1.3 and fit_width(needed[:0], 0) == 1
    assert fit_width(needed[:9], 0, prior=1.3) == pytest.approx(1.3)
    assert fit_width(needed / 2, 9) == 1 and fit_width(needed / 2, count) < 0.9


def test_the_first_weights_of_near_bins_are_alike_and_as_large_as_before() -> None:
    torch.manual_seed(0)
    weight = torch.randn(BINS, 400)
    mix_neighbours(weight)
    alike = torch.corrcoef(weight)
    assert alike.diagonal(1).min() > 0.8 and alike.diagonal(12).abs().max() < 0.3
    assert weight.norm(dim=1) / 20 == pytest.approx(torch.ones(BINS), abs=0.15)
