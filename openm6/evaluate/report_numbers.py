"""Predicted distributions as small charts: a shape with interval and truth for one value, a fan for a series."""

# Letters: M values

from __future__ import annotations

import math
from typing import Any

import numpy as np

from openm6.evaluate.figures import plain, words
from openm6.evaluate.report_charts import Axes, Frame, band, path, plot, ticks, upright
from openm6.evaluate.report_markup import Markup, join, tag
from openm6.modalities.numbers import Histogram, NumberSeries

MOST_STRIPS = 6
LEAST_PAST, PAST_SHARE = 16, 3  # steps of the past that are drawn: so many times the horizon
SHARES = np.concatenate([[0.01], np.arange(0.025, 1, 0.025), [0.99]])


def true_values(truth: Any) -> tuple[list[str], np.ndarray]:
    """Names and values of a truth given as columns, a series or bare numbers; NaN where none was seen.  # M"""
    if isinstance(truth, dict):
        return [str(name) for name in truth], _floats(truth.values())
    if isinstance(truth, NumberSeries):
        return [truth.name] * len(truth.values), _floats(truth.values)
    values = _floats(np.atleast_1d(np.asarray(truth, dtype=object)).ravel())
    return [""] * len(values), values


def _floats(values: Any) -> np.ndarray:
    return np.array([math.nan if value is None else float(value) for value in values])


def prediction(answer: Histogram, truth: Any) -> Markup:
    """One strip for each predicted value: shape of the distribution, 80 % interval, median and truth."""
    names, values = true_values(truth)
    values, names = _asked(answer, values, names)
    strips = [
        _strip(answer, index, name, value)
        for index, (name, value) in enumerate(zip(names, values, strict=True))
    ]
    rest = len(strips) - MOST_STRIPS
    more = tag("p.more", f"and {rest} more") if rest > 0 else None
    return join([*strips[:MOST_STRIPS], more])


def _asked(answer: Histogram, values: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """The truths that the histogram answers: all, or, as the decoder does, only those that were observed."""
    number = len(answer.probability)
    if len(values) != number:
        seen = np.isfinite(values)
        values, names = values[seen], [name for name, kept in zip(names, seen, strict=True) if kept]
    # A truth of another length cannot be matched to its distributions; these are shown without it.
    return (values, names) if len(values) == number else (np.full(number, math.nan), [""] * number)


def _strip(answer: Histogram, index: int, name: str, truth: float) -> Markup:
    cuts = np.array([answer.quantile(share)[index] for share in SHARES])  # values, rising
    low, middle, high = (float(np.interp(share, SHARES, cuts)) for share in (0.1, 0.5, 0.9))
    seen = [truth] if math.isfinite(truth) else []
    frame = Frame.around(np.array([cuts[0], cuts[-1], *seen]), np.array([0.0, 1.0]), from_zero=True)
    layers = [
        _shape(frame, cuts),
        path(frame, np.array([low, high]), np.zeros(2), "interval"),
        upright(frame, middle, "median", top=30),
        *[upright(frame, truth, "truth") for truth in seen],
    ]
    places = ticks(frame.left, frame.right, 5)
    told = f"median {plain(middle)}, 80 % between {plain(low)} and {plain(high)}, truth {plain(truth)}"
    drawing = plot(frame, layers, Axes(x=[(place, plain(place)) for place in places]), told, "strip")
    return tag("figure.number", drawing, _caption(name, (low, middle, high), truth))


def _shape(frame: Frame, cuts: np.ndarray) -> Markup:
    """The density between neighbouring quantiles, as an area scaled to the height of the chart."""
    width = np.maximum(np.diff(cuts), 1e-9 * (frame.right - frame.left))
    density = np.diff(SHARES) / width
    # Steps much narrower than a pixel make needles that would flatten the rest of the shape.
    density = np.minimum(density, 4 * np.median(density)) / min(density.max(), 4 * np.median(density))
    middles = np.concatenate([cuts[:1], (cuts[:-1] + cuts[1:]) / 2, cuts[-1:]])
    heights = np.concatenate([[0], density, [0]])
    return band(frame, middles, np.zeros(len(heights)), heights * 0.96, "shape")


def _caption(name: str, cuts: tuple[float, float, float], truth: float) -> Markup:
    low, middle, high = cuts
    span = f"{plain(middle, 3)} (80 %: {plain(low, 3)} to {plain(high, 3)})"
    said = [tag("b", words(name) + " ") if name else None, span]
    if not math.isfinite(truth):
        return tag("figcaption", *said)
    inside = low <= truth <= high
    verdict = tag("span.verdict.right" if inside else "span.verdict.wrong", "inside" if inside else "outside")
    return tag("figcaption", *said, tag("br"), "truth ", tag("b.truth-word", plain(truth)), " ", verdict)


def forecast(past: NumberSeries, answer: Histogram, truth: Any) -> Markup:
    """The past of a series, the fan of its predicted future (80 % and 50 %) and what came."""
    _, future = true_values(truth)
    before = _floats(past.values or [None])[-max(LEAST_PAST, PAST_SHARE * len(future)) :]
    steps = np.arange(1, len(future) + 1)
    seen = np.isfinite(future) if len(answer.probability) != len(future) else np.ones(len(future), bool)
    if seen.sum() != len(answer.probability):
        return prediction(answer, truth)  # nothing says which step each distribution belongs to
    cuts = {share: answer.quantile(share) for share in (0.1, 0.25, 0.5, 0.75, 0.9)}
    frame = Frame.around(
        np.array([1 - len(before), len(future)]), np.concatenate([before, future, cuts[0.1], cuts[0.9]])
    )
    layers = [
        band(frame, steps[seen], cuts[0.1], cuts[0.9], "fan"),
        band(frame, steps[seen], cuts[0.25], cuts[0.75], "fan"),
        upright(frame, 0, "now"),
        path(frame, np.arange(1 - len(before), 1), before, "past"),
        path(frame, np.concatenate([[0], steps]), np.concatenate([before[-1:], future]), "truth"),
        path(frame, steps[seen], cuts[0.5], "line"),
    ]
    drawing = plot(frame, layers, _clock(frame, len(future)), _told(past, cuts[0.5], future))
    return tag("figure.number", drawing, _inside(past.name, cuts, future[seen]))


def _clock(frame: Frame, horizon: int) -> Axes:
    y = [(value, plain(value)) for value in ticks(frame.bottom, frame.top, 3)]
    return Axes(x=[(frame.left, f"{plain(frame.left - 1)} steps"), (0, "now"), (horizon, f"+{horizon}")], y=y)


def _told(past: NumberSeries, median: np.ndarray, future: np.ndarray) -> str:
    predicted, came = (" ".join(plain(value) for value in values[:12]) for values in (median, future))
    return f"{words(past.name)}: predicted {predicted}; came {came}"


def _inside(name: str, cuts: dict[float, np.ndarray], truth: np.ndarray) -> Markup:
    seen = np.isfinite(truth)
    held = int(((cuts[0.1] <= truth) & (truth <= cuts[0.9]))[seen].sum())
    return tag("figcaption", tag("b", words(name)), f" {held} of {int(seen.sum())} steps inside the 80 % fan")
