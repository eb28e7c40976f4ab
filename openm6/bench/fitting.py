"""Prices of causes from what was measured, by least squares of relative errors, none below zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from openm6.plan.cost import Causes, Cost


@dataclass(frozen=True)
class Point:
    """One measurement: what was done, and the seconds (or bytes) that it took."""

    part: str
    causes: Causes
    taken: float


def fit(points: Sequence[Point], needed: str | None = None) -> dict[str, float]:
    """The price of each cause under which the points come nearest to what they took.

    Causes number five at most: every choice of those that may cost something is tried, and the best that needs no
    price below zero is kept. The cause that is `needed` is in all of them, however noisy the points.
    """
    names = sorted({name for point in points for name in point.causes})
    columns = np.array([[point.causes.get(name, 0.0) for name in names] for point in points])
    taken = np.array([point.taken for point in points])
    relative = columns / taken[:, None]
    scale = np.abs(relative).max(0)
    scale[scale == 0] = 1.0
    best, found = np.inf, np.zeros(len(names))
    for chosen in product((False, True), repeat=len(names)):
        use = np.array(chosen)
        if not use.any() or (needed is not None and not use[names.index(needed)]):
            continue
        values = np.zeros(len(names))
        values[use] = np.linalg.lstsq(relative[:, use] / scale[use], np.ones(len(taken)), rcond=None)[0]
        values /= scale
        error = float(np.square(relative @ values - 1.0).sum())
        if (values >= 0).all() and error < best - 1e-12:
            best, found = error, values
    return dict(zip(names, found.tolist(), strict=True))


def fit_parts(points: Sequence[Point]) -> dict[str, Cost]:
    """The cost of each part that was measured."""
    names = dict.fromkeys(point.part for point in points)
    return {name: Cost(prices=fit([point for point in points if point.part == name])) for name in names}


def spread(points: Sequence[Point], costs: dict[str, Cost]) -> dict[str, float]:
    """The largest relative error of each part's cost over its points."""
    found: dict[str, float] = {}
    for point in points:
        error = abs(costs[point.part].seconds(point.causes) / point.taken - 1.0)
        found[point.part] = max(found.get(point.part, 0.0), error)
    return found
