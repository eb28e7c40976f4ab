"""Prices found again from what they made, and none below zero."""

from __future__ import annotations

import pytest

from openm6.bench.fitting import Point, fit, fit_parts, spread


def test_a_fit_finds_what_made_the_figures() -> None:
    made = [
        Point("step", {"calls": 1.0, "parts": part, "tokens": tokens}, 3 + 2 * part + 0.1 * tokens)
        for part, tokens in zip([1.0, 2.0, 5.0, 7.0], [10.0, 40.0, 20.0, 10.0], strict=True)
    ]
    assert fit(made) == pytest.approx({"calls": 3.0, "parts": 2.0, "tokens": 0.1})
    costs = fit_parts(made)
    assert costs["step"].seconds({"calls": 2.0, "parts": 4.0}) == pytest.approx(14.0)
    assert spread(made, costs)["step"] < 1e-6


def test_nothing_costs_less_than_nothing() -> None:
    falling = [Point("part", {"calls": 1.0, "tokens": tokens}, 10 - tokens) for tokens in (1.0, 3.0, 6.0)]
    prices = fit(falling)
    assert min(prices.values()) >= 0 and prices["tokens"] == 0


def test_small_parts_weigh_as_much_as_large_ones() -> None:
    points = [Point("part", {"tokens": 1.0}, 1.0), Point("part", {"tokens": 1000.0}, 2000.0)]
    assert spread(points, fit_parts(points))["part"] < 0.5


def test_what_is_needed_has_a_price_even_where_noise_would_do_without() -> None:
    noisy = [Point("step", {"calls": 1.0, "parts": part}, 5.0 - part) for part in (1.0, 2.0, 3.0)]
    assert fit(noisy)["parts"] == 0 and fit(noisy, "parts")["parts"] > 0
