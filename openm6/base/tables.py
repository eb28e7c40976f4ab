"""The tables of facts that come with the package: GPUs, carbon of grids, published training energies; with sources."""

from __future__ import annotations

import csv
from importlib.resources import files
from io import StringIO


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of `base/facts/NAME.csv`, every cell as text; an empty cell means that the fact is not known."""
    text = files("openm6.base").joinpath("facts", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(StringIO(text)))
