"""From joules to grams of CO2e: the carbon of a country's grid, from a table without network."""

from __future__ import annotations

from dataclasses import dataclass

from openm6.base.config import nearest
from openm6.base.energy.units import JOULES_PER_KWH
from openm6.base.errors import ConfigError
from openm6.base.tables import read_table

WORLD = "WLD"


@dataclass(frozen=True)
class Grid:
    """Grams of CO2e for each kWh made in a country, over the life cycle of its plants, in one year."""

    code: str
    name: str
    grams_per_kwh: float
    year: int
    source: str

    def grams(self, joules: float, pue: float = 1.0) -> float:
        """CO2e of `joules` at the devices; `pue` is what the building draws for each joule that they draw."""
        return joules * pue / JOULES_PER_KWH * self.grams_per_kwh


def grids() -> list[Grid]:
    """Every grid in the table."""
    return [
        Grid(row["code"], row["name"], float(row["g_co2e_per_kwh"]), int(row["year"]), row["source"])
        for row in read_table("grid_intensity")
    ]


def grid(country: str) -> Grid:
    """The grid of a country by its three-letter code or English name, in any case.

    Raises:
        ConfigError: it is not in the table.
    """
    every = grids()
    for found in every:
        if country.lower() in (found.code.lower(), found.name.lower()):
            return found
    known = sorted([found.name for found in every] + [found.code for found in every])
    hint = nearest(country.upper() if len(country) == 3 else country.title(), known)
    raise ConfigError(f"no grid of country {country!r} in the table; {hint}")
