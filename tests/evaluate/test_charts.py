"""Charts: positions of points, round ticks, interruptions, and many points thinned to few."""

from __future__ import annotations

import re

import numpy as np
import pytest

from openm6.evaluate.charts import (
    MAX_POINTS,
    MAX_VALUES,
    Frame,
    bar,
    forecast_chart,
    history,
    ticks,
    value_charts,
)
from openm6.modalities.series import NumberSeries
from tests.evaluate.example_report import histogram


def positions(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def test_a_line_goes_from_corner_to_corner_with_y_up() -> None:
    frame = Frame(left=0, right=10, bottom=-1, top=1)
    drawn = frame.line(np.array([0.0, 10.0]), np.array([-1.0, 1.0]), "line")
    assert drawn.name == "line" and positions(drawn.path) == [(0, 100), (100, 0)]


def test_a_missing_point_interrupts_a_line_and_an_isolated_point_is_a_dot() -> None:
    frame = Frame(0, 4, 0, 1)
    drawn = frame.line(np.arange(5.0), np.array([0, 1, np.nan, 1, np.nan]), "line").path
    assert drawn.count("M") == 2 and drawn.count("L") == 1
    assert "M75.00 0.00h0" in drawn


def test_an_area_leaves_out_what_is_not_finite() -> None:
    frame = Frame(0, 2, 0, 1)
    drawn = frame.area(np.arange(3.0), np.array([0, np.nan, 0.0]), np.ones(3), "fan")
    assert positions(drawn.path) == [(0, 100), (100, 100), (100, 0), (0, 0)]
    assert frame.area(np.arange(3.0), np.full(3, np.nan), np.ones(3), "fan").path == ""
    assert frame.vertical(float("nan"), "truth").path == ""


def test_ticks_are_placed_in_percent_with_a_grid_line_each() -> None:
    drawn = Frame(0, 10, 0, 1).chart([], "c", x=[(5, "five")], y=[(0.25, "low"), (1, "high")])
    assert (drawn.x, drawn.y) == ([(50.0, "five")], [(75.0, "low"), (0.0, "high")])
    assert [shape.path for shape in drawn.shapes] == ["M0 75.00H100", "M0 0.00H100"]


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0.0, 1.0, 4, [0, 0.5, 1]),
        (0.13, 0.47, 4, [0.2, 0.3, 0.4]),
        (-3.0, 2.0, 5, [-3, -2, -1, 0, 1, 2]),
        (10.0, 2140.0, 4, [1000, 2000]),
        (1e-7, 5e-7, 4, [1e-7, 2e-7, 3e-7, 4e-7, 5e-7]),
    ],
)
def test_ticks_are_round(low: float, high: float, count: int, expected: list[float]) -> None:
    assert ticks(low, high, count) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[], [np.nan], [3.0, 3.0], [0.0], [-np.inf, 2.0], [1e300, 1e300]])
def test_any_values_have_a_frame(values: list[float]) -> None:
    frame = Frame.around(np.array(values), np.array(values))
    assert frame.right > frame.left and frame.top > frame.bottom
    assert np.isfinite([frame.left, frame.right, frame.bottom, frame.top]).all()


def test_many_points_are_thinned_without_losing_a_level() -> None:
    steps = np.arange(1.0, 50_001)
    drawn = history(steps, np.where(steps < 25_000, 4.0, 2.0)[None], "loss")
    heights = [y for shape in drawn.shapes if shape.name == "line" for _, y in positions(shape.path)]
    assert len(heights) == MAX_POINTS
    assert min(heights) < 10 and max(heights) > 90  # both levels are there, with a margin around them


def test_layers_are_drawn_with_their_mean() -> None:
    drawn = history(np.array([1.0, 2.0]), np.array([[0.0, 0.0], [2.0, 2.0]]), "expert_load_cv", from_zero=True)
    assert [shape.name for shape in drawn.shapes].count("fine") == 2
    assert drawn.shapes[-1].name == "line"
    assert [round(y) for _, y in positions(drawn.shapes[-1].path)] == [
        53,
        53,
    ]  # half of 2 with a margin of 6 %


def test_a_bar_ends_within_its_track() -> None:
    assert bar(0.5, 0.25, 1.0) == (50.0, 25.0)
    assert bar(3.0, 0.25, 1.0)[0] == 100.0
    assert bar(8.0, 4.0, None)[0] == pytest.approx(100 / 1.08)  # no whole: the larger nearly fills the track


def test_predicted_values_have_a_chart_each_up_to_a_limit() -> None:
    charts = value_charts(histogram(2), {"a": 10.5, "b": 99.0})
    assert [(c.name, c.truth, c.inside) for c in charts] == [("a", 10.5, True), ("b", 99.0, False)]
    assert charts[0].median == pytest.approx(10, abs=0.1)
    assert len(value_charts(histogram(9), NumberSeries("t", [1.0] * 9))) == MAX_VALUES
    observed = value_charts(histogram(1), {"a": None, "b": 10.0})  # the decoder predicts observed values only
    assert [c.name for c in observed] == ["b"]
    (unmatched,) = value_charts(histogram(1), {"a": 1.0, "b": 2.0})
    assert unmatched.name == "" and np.isnan(unmatched.truth)


def test_a_forecast_counts_the_observed_truths_inside_its_interval() -> None:
    past, future = NumberSeries("t", [9.0, 10.0]), NumberSeries("t", [10.0, None, 99.0])
    drawn = forecast_chart(past, histogram(2), future)
    assert drawn is not None and (drawn.inside, drawn.observed) == (1, 2)
    assert forecast_chart(past, histogram(7), future) is None, "nothing assigns the distributions to steps"
