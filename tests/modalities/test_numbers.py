"""Numbers: what may be missing, what is refused, and histograms against direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openm6.core.errors import DataError
from openm6.modalities.numbers import (
    BINS,
    LIMIT,
    PATCH,
    Histogram,
    Numbers,
    NumberSeries,
    NumbersIn,
    NumbersOut,
    fit_scale,
    one_hot_bins,
    smooth_bins,
)
from openm6.modalities.text import Text, train_tokenizer

SCALES = {"body_mass": (4000.0, 800.0), "length": (40.0, 5.0)}


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return Numbers(Text(train_tokenizer(["body mass", "length"], 300)), SCALES)


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("missing", [None, math.nan, float("nan")])
def test_missing_values_are_seen_as_missing_and_never_learned(numbers: Numbers, missing: float | None) -> None:
    tokens = numbers.target({"body_mass": missing, "length": 41.0})
    assert tokens.learn.tolist() == [False, True]
    assert tokens.arrays["observed"][:, 0].tolist() == [False, True]
    torch.manual_seed(0)
    embed = NumbersIn(16).embed
    read = numbers.source({"body_mass": missing}).arrays
    other = {**read, "values": read["values"] + 1}
    assert torch.equal(embed(as_tensors(read)), embed(as_tensors(other))), "what is not there must not show"


def test_what_is_missing_weighs_nothing(numbers: Numbers) -> None:
    torch.manual_seed(0)
    adapter, hidden = NumbersOut(16).requires_grad_(False), torch.randn(2, 16)
    arrays = numbers.target(NumberSeries("length", [40.0, None, 50.0] + [None] * 6 + [41.0])).arrays
    assert arrays["observed"].sum() == 3 and arrays["values"].shape == (2, PATCH)
    bins = one_hot_bins(torch.from_numpy(arrays["values"])).argmax(-1)
    log_probability = adapter.logits(hidden).log_softmax(-1)
    direct = -(log_probability[0, 0, bins[0, 0]] + log_probability[0, 2, bins[0, 2]])
    nll = adapter.nll(hidden, as_tensors(arrays))
    assert float(nll[0]) == pytest.approx(float(direct), rel=1e-5)
    assert float(nll[1]) == pytest.approx(-float(log_probability[1, 1, bins[1, 1]]), rel=1e-5)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"length": math.inf}, "length is infinite"),
        ({"length": -math.inf}, "length is infinite"),
        ({"length": "tall"}, "length='tall' is not a number"),
        ({"lenght": 3.0}, "did you mean 'length'"),
        ({}, "at least one of them"),
        (NumberSeries("length", [1.0, math.inf]), "length is infinite"),
        (NumberSeries("depth", [1.0]), "has no column 'depth'"),
    ],
)
def test_what_cannot_be_read_is_refused(numbers: Numbers, raw: object, sentence: str) -> None:
    for method in (numbers.source, numbers.target):
        with pytest.raises(DataError, match=sentence):
            method(raw)


def test_extreme_values_stay_finite(numbers: Numbers) -> None:
    arrays = numbers.source({"body_mass": 1e300, "length": -1e300}).arrays
    assert arrays["values"][:, 0].tolist() == [LIMIT, -LIMIT]


def test_a_name_carries_its_words(numbers: Numbers) -> None:
    ids = numbers.source({"body_mass": 1.0, "length": 1.0}).arrays["name_ids"]
    assert ids.shape == (2, 8) and (ids[:, 0] >= 0).all() and (ids[0] != ids[1]).any()
    words = [token for token in ids[0].tolist() if token >= 0]
    assert numbers.text.decode(words) == " body mass"


def test_a_series_is_cut_into_patches(numbers: Numbers) -> None:
    tokens = numbers.source(NumberSeries("length", [float(v) for v in range(PATCH + 3)]))
    assert len(tokens) == 2 and tokens.arrays["is_series"].all()
    assert tokens.arrays["observed"].sum() == PATCH + 3
    assert not numbers.source({"length": 1.0}).arrays["is_series"].any()


def test_scales_are_robust() -> None:
    rng = np.random.default_rng(0)
    values = np.append(rng.normal(50, 4, 4000), [1e9, np.nan, np.inf])
    centre, spread = fit_scale(values)
    assert centre == pytest.approx(50, abs=0.3) and spread == pytest.approx(4, rel=0.05)
    assert fit_scale(np.array([])) == (0.0, 1.0)
    assert fit_scale(np.array([7.0, 7.0])) == (7.0, 7.0), "a constant column still has a spread above 0"
    assert fit_scale(np.zeros(5))[1] > 0
    assert fit_scale(np.array([0.0] * 99 + [100.0]))[1] > 0


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
    spread = 2 * np.mean(ordered * (2 * rank + 1 - len(ordered)) / len(ordered))
    direct = np.abs(draws - truth).mean() - spread / 2
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
