"""Joules in words, in grams of CO2e by country from a table, and beside the training of GPT-3."""

from __future__ import annotations

from dataclasses import dataclass

from openm6.core.errors import ConfigError, nearest
from openm6.core.files import read_table

JOULES_PER_KWH = 3.6e6
WORLD = "WLD"

# Estimates of the energy of training GPT-3.
GPT3_MWH = 1287.0  # arXiv 2104.10350: 10,000 V100 × 14.8 days × 330 W × PUE 1.10
GPT3_TOKENS = 300e9
GPT3_JOULES_PER_TOKEN = GPT3_MWH * 3.6e9 / GPT3_TOKENS  # 15.4

GPT3_CAVEAT = (
    "GPT-3 took 15.4 J per token (1,287 MWh for 300B tokens, computed from rated hardware, arXiv 2104.10350). "
    "The ratio compares the energy of one token of training. It does not compare the models: energy per token grows "
    "with the active parameters and falls with newer hardware, and a small model that is cheap is not equal to a large "
    "one."
)


def in_joules(joules: float) -> str:
    """Return three digits with their unit, such as `12.3 kJ`."""
    sizes = ((1e12, "TJ"), (1e9, "GJ"), (1e6, "MJ"), (1e3, "kJ"))
    size, unit = next((pair for pair in sizes if joules >= pair[0]), (1.0, "J"))
    return f"{joules / size:.3g} {unit}"


@dataclass(frozen=True)
class Grid:
    """Grams of CO2e for each kWh made in a country, over the life cycle of its plants, in one year."""

    code: str
    name: str
    grams_per_kwh: float
    year: int

    def grams(self, joules: float, pue: float = 1.0) -> float:
        """CO2e of `joules` at the devices; `pue` is what the building draws for each joule that they draw."""
        return joules * pue / JOULES_PER_KWH * self.grams_per_kwh


def grid(country: str) -> Grid:
    """The grid of a country by its three-letter code or English name, in any case; ConfigError if there is none."""
    rows = read_table("grid_intensity")
    for row in rows:
        if country.lower() in (row["code"].lower(), row["name"].lower()):
            return Grid(row["code"], row["name"], float(row["g_co2e_per_kwh"]), int(row["year"]))
    known = sorted(row[key] for row in rows for key in ("name", "code"))
    hint = nearest(country.upper() if len(country) == 3 else country.title(), known)
    raise ConfigError(f"no grid of country {country!r} in the table; {hint}")
