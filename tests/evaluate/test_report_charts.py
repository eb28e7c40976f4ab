"""Charts: places of points, round ticks, gaps, and many points thinned to few."""

from __future__ import annotations

import re

import numpy as np
import pytest

from openm6.evaluate.report_charts import MOST_POINTS, Frame, band, bar, history, path, ticks, upright


def places(markup: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", markup)]


def test_a_line_goes_from_corner_to_corner_with_y_up() -> None:
    frame = Frame(left=0, right=10, bottom=-1, top=1)
    drawn = path(frame, np.array([0.0, 10.0]), np.array([-1.0, 1.0]), "line")
    assert places(drawn) == [(0, 100), (100, 0)]


def test_a_gap_lifts_the_pen_and_a_lone_point_is_a_dot() -> None:
    frame = Frame(0, 4, 0, 1)
    drawn = path(frame, np.arange(5.0), np.array([0, 1, np.nan, 1, np.nan]), "line")
    assert drawn.count("M") == 2 and drawn.count("L") == 1
    assert "M75.00 0.00h0" in drawn


def test_a_band_leaves_out_what_is_not_finite() -> None:
    frame = Frame(0, 2, 0, 1)
    drawn = band(frame, np.arange(3.0), np.array([0, np.nan, 0.0]), np.ones(3), "fan")
    assert places(drawn) == [(0, 100), (100, 100), (100, 0), (0, 0)]
    assert 'd=""' in band(frame, np.arange(3.0), np.full(3, np.nan), np.ones(3), "fan")
    assert 'd=""' in upright(frame, float("nan"), "truth")


@pytest.mark.parametrize(
    ("low", "high", "wanted", "expected"),
    [
        (0.0, 1.0, 4, [0, 0.5, 1]),
        (0.13, 0.47, 4, [0.2, 0.3, 0.4]),
        (-3.0, 2.0, 5, [-3, -2, -1, 0, 1, 2]),
        (10.0, 2140.0, 4, [1000, 2000]),
        (1e-7, 5e-7, 4, [1e-7, 2e-7, 3e-7, 4e-7, 5e-7]),
    ],
)
def test_ticks_are_round(low, high, wanted, expected) -> None:
    assert ticks(low, high, wanted) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[], [np.nan], [3.0, 3.0], [0.0], [-np.inf, 2.0], [1e300, 1e300]])
def test_any_values_have_a_frame(values) -> None:
    frame = Frame.around(np.array(values), np.array(values))
    assert frame.right > frame.left and frame.top > frame.bottom
    assert np.isfinite([frame.left, frame.right, frame.bottom, frame.top]).all()


def test_many_points_are_thinned_without_losing_a_level() -> None:
    steps = np.arange(1.0, 50_001)
    drawn = history(steps, np.where(steps < 25_000, 4.0, 2.0)[None], "loss")
    line = next(part for part in drawn.split("<path") if 'class="line"' in part)
    heights = [y for _, y in places(line)]
    assert len(heights) == MOST_POINTS
    assert min(heights) < 10 and max(heights) > 90  # both levels are there, with air around them


def test_layers_are_drawn_with_their_mean() -> None:
    drawn = history(np.array([1.0, 2.0]), np.array([[0.0, 0.0], [2.0, 2.0]]), "c_v", from_zero=True)
    assert drawn.count('class="fine"') == 2
    mean = next(part for part in drawn.split("<path") if 'class="line"' in part)
    assert [round(y) for _, y in places(mean)] == [53, 53]  # half of 2 with 6 % air above


def test_a_bar_is_cut_at_its_track() -> None:
    assert "H50.0" in bar(0.5, 0.25, 1.0) and "M25.0 0" in bar(0.5, 0.25, 1.0)
    assert "H100.0" in bar(3.0, 0.25, 1.0)
    assert "H92.6" in bar(8.0, 4.0, None)  # no whole: the larger of the two nearly fills it
