"""Grams from joules, by hand and by country."""

from __future__ import annotations

import pytest

from openm6.core.config import build
from openm6.core.errors import ConfigError
from openm6.core.files import read_table
from openm6.energy.carbon import Grid, grid
from openm6.energy.meter import EnergyConfig


def test_grams_by_hand() -> None:
    assert Grid("X", "X", 500.0, 2023).grams(7.2e6, pue=1.1) == pytest.approx(2 * 500 * 1.1)


def test_a_country_by_code_or_name() -> None:
    assert grid("fra") == grid("France") and grid("FRA").grams_per_kwh == 56
    assert grid("WLD").year == 2023


def test_every_row_has_a_plausible_intensity_and_a_source() -> None:
    rows = read_table("grid_intensity")
    every = [grid(row["code"]) for row in rows]
    assert len({row.code for row in every}) == len(rows) > 60
    assert all(10 < row.grams_per_kwh < 1000 and row.year >= 2020 for row in every)
    assert all(row["source"] for row in rows)


def test_an_unknown_country_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no grid of country 'Frence' in the table; did you mean 'France'\?"):
        grid("Frence")
    with pytest.raises(ConfigError, match="pue"):
        build(EnergyConfig, {"pue": 0.5}, "loop.energy")
    with pytest.raises(ConfigError, match="loop.energy: country: no grid of country 'Mars'"):
        build(EnergyConfig, {"country": "Mars"}, "loop.energy")
