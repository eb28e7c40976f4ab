"""Charts as plain data: SVG paths in a 100 × 100 box that stretches with the page, and the labels beside it."""

# Shapes: P points of a line, V predicted values

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from openm6.evaluate.formatting import plain, short_count, words
from openm6.evaluate.results import true_values
from openm6.modalities.histogram import Histogram
from openm6.modalities.series import NumberSeries

MAX_POINTS = 90
MAX_VALUES = 6
# Steps of the past in the chart of a forecast: this many times the horizon, and no fewer than MIN_PAST.
PAST_HORIZONS, MIN_PAST = 3, 16
LEVELS = np.concatenate([[0.01], np.arange(0.025, 1, 0.025), [0.99]])

Ticks = Sequence[tuple[float, str]]
"""Positions on an axis with their labels; in the units of the data, or in percent of the box once in a Chart."""


@dataclass(frozen=True)
class Shape:
    name: str
    path: str


@dataclass(frozen=True)
class Chart:
    """Shapes in drawing order and labels in percent of the box; `description` is for screen readers."""

    description: str
    shapes: list[Shape]
    x: Ticks
    y: Ticks


@dataclass(frozen=True)
class Frame:
    """The part of the data plane that a chart shows, and its shapes; the y axis of the box points down."""

    left: float
    right: float
    bottom: float
    top: float

    @classmethod
    def around(cls, xs: np.ndarray, ys: np.ndarray, from_zero: bool = False) -> Self:
        """The frame that contains all finite points, with a margin above and below."""
        left, right = _extent(xs)
        bottom, top = _extent(ys)
        margin = 0.06 * (top - bottom)
        return cls(left, right, min(0.0, bottom) if from_zero else bottom - margin, top + margin)

    def x(self, values: np.ndarray | float) -> np.ndarray:
        return 100 * (np.asarray(values, float) - self.left) / (self.right - self.left)

    def y(self, values: np.ndarray | float) -> np.ndarray:
        return 100 * (self.top - np.asarray(values, float)) / (self.top - self.bottom)

    def line(self, xs: np.ndarray, ys: np.ndarray, name: str) -> Shape:
        """A line through the points, interrupted at points that are not finite."""
        commands, drawing = [], False
        for x, y in zip(self.x(xs), self.y(ys), strict=True):
            if math.isfinite(x) and math.isfinite(y):
                # `h0` draws an isolated point as a segment of length 0, which round line caps turn into a dot.
                commands.append(f"L{x:.2f} {y:.2f}" if drawing else f"M{x:.2f} {y:.2f}h0")
            drawing = math.isfinite(x) and math.isfinite(y)
        return Shape(name, "".join(commands))

    def area(self, xs: np.ndarray, low: np.ndarray, high: np.ndarray, name: str) -> Shape:
        """The area between two lines, over the points at which both are finite."""
        finite = np.isfinite(low) & np.isfinite(high) & np.isfinite(xs)
        around = self.x(np.concatenate([xs[finite], xs[finite][::-1]]))
        corners = zip(around, self.y(np.concatenate([low[finite], high[finite][::-1]])), strict=True)
        path = "L".join(f"{x:.2f} {y:.2f}" for x, y in corners)
        return Shape(name, f"M{path}Z" if path else "")

    def vertical(self, x: float, name: str, top: float = 0.0) -> Shape:
        return Shape(name, f"M{self.x(x):.2f} 100.00V{top:.2f}" if math.isfinite(x) else "")

    def chart(self, shapes: Iterable[Shape], description: str, x: Ticks = (), y: Ticks = ()) -> Chart:
        """A chart with a grid line at each tick of the y axis; ticks are in units of the data."""
        columns = [(float(self.x(value)), text) for value, text in x]
        rows = [(float(self.y(value)), text) for value, text in y]
        grid = [Shape("grid", f"M0 {position:.2f}H100") for position, _ in rows]
        return Chart(description, [*grid, *shapes], columns, rows)


def _extent(values: np.ndarray) -> tuple[float, float]:
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    # A constant line would have a frame of no height; it is drawn in the middle of one.
    half = 0.5 * abs(low) or 0.5
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high)) else (low - half, high + half)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values from `low` to `high`, about `count` of them, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [round(multiple * step, 12) for multiple in range(first, last + 1)]


def thin(values: np.ndarray, count: int = MAX_POINTS) -> list[np.ndarray]:
    """The values in at most `count` groups of neighbours: a long run is drawn no finer than a screen can show."""
    return np.array_split(values, min(count, len(values)))


def finite_mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def history(steps: np.ndarray, lines: np.ndarray, description: str, from_zero: bool = False) -> Chart:
    """Values over steps: one line with its spread, or several fine lines with their mean.  # P, lines P"""
    xs = np.array([finite_mean(group) for group in thin(steps)])
    means = np.array([[finite_mean(group) for group in thin(values)] for values in lines])
    if len(lines) == 1:
        groups = [group[np.isfinite(group)] for group in thin(lines[0])]
        deciles = np.array([np.quantile(g, (0.1, 0.9)) if len(g) else (math.nan, math.nan) for g in groups])
        frame = Frame.around(xs, deciles, from_zero)
        shapes = [frame.area(xs, deciles[:, 0], deciles[:, 1], "spread")]
    else:
        frame = Frame.around(xs, means, from_zero)
        shapes = [frame.line(xs, values, "fine") for values in means]
    shapes.append(frame.line(xs, np.array([finite_mean(column) for column in means.T]), "line"))
    x = [(value, short_count(value)) for value in ticks(frame.left, frame.right) if value == round(value)]
    y = [(value, plain(value)) for value in ticks(frame.bottom, frame.top)]
    return frame.chart(shapes, description, x, y)


def bar(value: float, baseline: float, whole: float | None) -> tuple[float, float]:
    """A score and its baseline in percent of `whole`, or of the larger of the two with a margin."""
    largest = whole or max(value, baseline, 1e-12) * 1.08
    length, mark = (min(100.0, max(0.0, 100 * part / largest)) for part in (value, baseline))
    return length, mark


@dataclass(frozen=True)
class ValueChart:
    """A predicted value: the shape of its distribution, the 80 % interval with the median, and the truth."""

    chart: Chart
    name: str
    low: float
    median: float
    high: float
    truth: float

    @property
    def inside(self) -> bool:
        return self.low <= self.truth <= self.high


def value_charts(answer: Histogram, truth: Any) -> list[ValueChart]:
    """A chart for each predicted value, MAX_VALUES at most."""
    # The model predicts the observed values only.
    named = list(zip(*true_values(truth), strict=True))
    # Without any value there is no truth to compare with.
    pairs = [pair for pair in named if math.isfinite(pair[1])] or named
    if len(pairs) != len(answer.probability):
        # A truth of another length cannot be matched to the distributions.
        pairs = [("", math.nan)] * len(answer.probability)
    return [_value_chart(answer, i, name, float(value)) for i, (name, value) in enumerate(pairs[:MAX_VALUES])]


def _value_chart(answer: Histogram, index: int, name: str, truth: float) -> ValueChart:
    quantiles = np.array([answer.quantile(level)[index] for level in LEVELS])  # rising
    low, median, high = (float(np.interp(level, LEVELS, quantiles)) for level in (0.1, 0.5, 0.9))
    xs = np.array([quantiles[0], quantiles[-1], truth])
    frame = Frame.around(xs, np.array([0.0, 1.0]), from_zero=True)
    width = np.maximum(np.diff(quantiles), 1e-9 * (frame.right - frame.left))
    density = np.diff(LEVELS) / width
    # Steps much narrower than a pixel make needles that would flatten the rest of the shape.
    density = np.minimum(density, 4 * np.median(density)) / min(density.max(), 4 * np.median(density))
    centers = np.concatenate([quantiles[:1], (quantiles[:-1] + quantiles[1:]) / 2, quantiles[-1:]])
    heights = np.concatenate([[0], density, [0]])
    shapes = [
        frame.area(centers, np.zeros(len(heights)), heights * 0.96, "shape"),
        frame.line(np.array([low, high]), np.zeros(2), "interval"),
        frame.vertical(median, "median", top=30),
        *([frame.vertical(truth, "truth")] if math.isfinite(truth) else []),
    ]
    description = f"median {plain(median)}, 80 % between {plain(low)} and {plain(high)}"
    description += f", truth {plain(truth)}" * math.isfinite(truth)
    x = [(value, plain(value)) for value in ticks(frame.left, frame.right, 3)]
    return ValueChart(frame.chart(shapes, description, x), name, low, median, high, truth)


@dataclass(frozen=True)
class ForecastChart:
    """A forecast: the past, 80 % and 50 % intervals with the median, and the truth; `inside` counts truths in 80 %."""

    chart: Chart
    name: str
    inside: int
    observed: int


def forecast_chart(past: NumberSeries, answer: Histogram, truth: Any) -> ForecastChart | None:
    """The chart of a forecast, whose truth may be missing; None if the distributions cannot be matched to steps."""
    _, future = true_values(truth)
    before = np.array(past.values or [None], float)[-max(MIN_PAST, PAST_HORIZONS * len(future)) :]
    steps = np.arange(1, len(future) + 1)
    known = int(np.isfinite(future).sum())
    observed = np.isfinite(future) | (known == 0)
    if observed.sum() != len(answer.probability):
        return None
    quantiles = {level: answer.quantile(level) for level in (0.1, 0.25, 0.5, 0.75, 0.9)}
    xs = np.array([1 - len(before), len(future)])
    frame = Frame.around(xs, np.concatenate([before, future, quantiles[0.1], quantiles[0.9]]))
    shapes = [
        frame.area(steps[observed], quantiles[0.1], quantiles[0.9], "fan"),
        frame.area(steps[observed], quantiles[0.25], quantiles[0.75], "fan"),
        frame.vertical(0, "now"),
        frame.line(np.arange(1 - len(before), 1), before, "past"),
        frame.line(np.concatenate([[0], steps]), np.concatenate([before[-1:], future]), "truth"),
        frame.line(steps[observed], quantiles[0.5], "line"),
    ]
    shapes = [shape for shape in shapes if known or shape.name != "truth"]
    predicted, true = (" ".join(plain(value) for value in v[:12]) for v in (quantiles[0.5], future))
    description = f"{words(past.name)}: predicted {predicted}" + f"; truth {true}" * bool(known)
    x = [(frame.left, f"{plain(frame.left - 1)} steps"), (0, "now"), (len(future), f"+{len(future)}")]
    y = [(value, plain(value)) for value in ticks(frame.bottom, frame.top, 3)]
    inside = (quantiles[0.1] <= future[observed]) & (future[observed] <= quantiles[0.9])
    return ForecastChart(frame.chart(shapes, description, x, y), past.name, int(inside.sum()), known)
