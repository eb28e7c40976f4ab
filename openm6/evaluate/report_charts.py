"""Charts as inline SVG: shapes in a 100 × 100 box that stretches with the page, labels as text that does not."""

# Letters: P points of a line

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openm6.evaluate.figures import plain, short_count
from openm6.evaluate.report_markup import Markup, tag

MOST_POINTS = 90
_STRETCHED = {"viewBox": "0 0 100 100", "preserveAspectRatio": "none"}


@dataclass(frozen=True)
class Frame:
    """What part of the data plane a chart shows; `x` and `y` carry data into the box, whose y points down."""

    left: float
    right: float
    bottom: float
    top: float

    @classmethod
    def around(cls, xs: np.ndarray, ys: np.ndarray, from_zero: bool = False) -> Frame:
        """The frame that just holds all finite points, with a little air above and below."""
        left, right = _extent(xs)
        bottom, top = _extent(ys)
        air = 0.06 * (top - bottom)
        bottom = min(0.0, bottom) if from_zero else bottom - air
        return cls(left, right, bottom, top + air)

    def x(self, values: np.ndarray) -> np.ndarray:
        return 100 * (np.asarray(values, float) - self.left) / (self.right - self.left)

    def y(self, values: np.ndarray) -> np.ndarray:
        return 100 * (self.top - np.asarray(values, float)) / (self.top - self.bottom)


def _extent(values: np.ndarray) -> tuple[float, float]:
    seen = np.asarray(values, float)
    seen = seen[np.isfinite(seen)]
    if not len(seen):
        return 0.0, 1.0
    low, high = float(seen.min()), float(seen.max())
    # A flat line would have a frame of no height; it is shown in the middle of one.
    half = 0.5 * abs(low) or 0.5
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high)) else (low - half, high + half)


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round values from `low` to `high`, about `wanted` of them, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [round(number * step, 12) for number in range(first, last + 1)]


def path(frame: Frame, xs: np.ndarray, ys: np.ndarray, name: str) -> Markup:
    """A line through the points, broken where one is not finite; `name` is its class."""
    pieces, drawing = [], False
    for x, y in zip(frame.x(xs), frame.y(ys), strict=True):
        if math.isfinite(x) and math.isfinite(y):
            # `h0` gives a lone point a length of nothing, which round ends turn into a dot.
            pieces.append(f"L{x:.2f} {y:.2f}" if drawing else f"M{x:.2f} {y:.2f}h0")
        drawing = math.isfinite(x) and math.isfinite(y)
    return tag(f"path.{name}", attributes={"d": "".join(pieces)})


def band(frame: Frame, xs: np.ndarray, low: np.ndarray, high: np.ndarray, name: str) -> Markup:
    """The area between two lines over the points at which both are finite."""
    seen = np.isfinite(low) & np.isfinite(high) & np.isfinite(xs)
    xs = frame.x(np.concatenate([xs[seen], xs[seen][::-1]]))
    ys = frame.y(np.concatenate([low[seen], high[seen][::-1]]))
    corners = "L".join(f"{x:.2f} {y:.2f}" for x, y in zip(xs, ys, strict=True))
    return tag(f"path.{name}", attributes={"d": f"M{corners}Z" if corners else ""})


def upright(frame: Frame, x: float, name: str, top: float = 0, bottom: float = 100) -> Markup:
    """A line up and down at `x`, between two heights of the box."""
    place = float(frame.x(np.array(x)))
    shape = f"M{place:.2f} {bottom:.2f}V{top:.2f}" if math.isfinite(place) else ""
    return tag(f"path.{name}", attributes={"d": shape})


@dataclass(frozen=True)
class Axes:
    """What is written beside a chart: places and words, in the data's own units."""

    x: Sequence[tuple[float, str]] = ()
    y: Sequence[tuple[float, str]] = ()


def plot(frame: Frame, layers: Sequence[Markup], axes: Axes, told: str, name: str = "plot") -> Markup:
    """The drawing with its labels; `told` is what a screen reader says of it."""
    grid = [
        tag("path.grid", attributes={"d": f"M0 {y:.2f}H100"})
        for y in frame.y(np.array([value for value, _ in axes.y]))
    ]
    box = {**_STRETCHED, "role": "img", "aria-label": told}
    rows = [_label("y", "top", float(frame.y(np.array(value))), text) for value, text in axes.y]
    columns = [_label("x", "left", float(frame.x(np.array(value))), text) for value, text in axes.x]
    return tag(f"div.{name}", tag("svg", *grid, *layers, attributes=box), *rows, *columns)


def _label(axis: str, side: str, place: float, text: str) -> Markup:
    edge = ".first" if place < 8 else ".last" if place > 92 else ""
    where = {"style": f"{side}:{place:.2f}%", "aria-hidden": "true"}
    return tag(f"span.{axis}{edge}", text, attributes=where)


def thin(values: np.ndarray, most: int = MOST_POINTS) -> list[np.ndarray]:
    """The values in at most `most` neighbouring groups: a long run is drawn no finer than a screen can show."""
    return np.array_split(values, min(most, len(values)))


def mean_of(group: np.ndarray) -> float:
    """Mean of the finite values of a group; NaN where there is none."""
    seen = group[np.isfinite(group)]
    return float(seen.mean()) if len(seen) else math.nan


def history(steps: np.ndarray, lines: np.ndarray, told: str, from_zero: bool = False) -> Markup:
    """Values over steps: one line in full, or several as fine lines with their mean in full.  # P, lines P"""
    places = np.array([mean_of(group) for group in thin(steps)])
    means = np.array([[mean_of(group) for group in thin(line)] for line in lines])
    low, high = _spread(lines[0]) if len(lines) == 1 else (means, means)
    frame = Frame.around(places, np.stack([low, high]), from_zero)
    if len(lines) == 1:
        layers = [band(frame, places, low, high, "spread")]
    else:
        layers = [path(frame, places, line, "fine") for line in means]
    layers.append(path(frame, places, np.array([mean_of(column) for column in means.T]), "line"))
    whole = [value for value in ticks(frame.left, frame.right, 4) if value == round(value)]  # no half steps
    axes = Axes(
        x=[(value, short_count(value)) for value in whole],
        y=[(value, plain(value)) for value in ticks(frame.bottom, frame.top, 4)],
    )
    return plot(frame, layers, axes, told)


def _spread(line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Between which values eight tenths of each group lie.  # P -> groups, groups"""
    seen = [group[np.isfinite(group)] for group in thin(line)]
    low, high = ([float(np.quantile(g, q)) if len(g) else math.nan for g in seen] for q in (0.1, 0.9))
    return np.array(low), np.array(high)


def bar(value: float, baseline: float, whole: float | None) -> Markup:
    """A score as a bar with its baseline as a mark, both as parts of `whole` or of the larger of the two."""
    largest = whole or max(value, baseline, 1e-12) * 1.08
    length, mark = (min(100.0, max(0.0, 100 * part / largest)) for part in (value, baseline))
    shapes = [
        tag("path.track", attributes={"d": "M0 50H100"}),
        tag("path.fill", attributes={"d": f"M0 50H{length:.1f}"}),
        tag("path.mark", attributes={"d": f"M{mark:.1f} 0V100"}),
    ]
    return tag("svg.bar", *shapes, attributes={**_STRETCHED, "aria-hidden": "true"})
