"""Every metric: a perfect answer scores best, a wrong one worse, and all stay in their range."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openm6.evaluate.metrics import (
    METRICS,
    KNNClassifier,
    Scored,
    all_metrics,
    bigram_f1,
    image_features,
    metric_title,
    same_text,
    score,
    truths,
)
from openm6.modalities.histogram import BINS, LIMIT, Histogram
from openm6.modalities.image import read_image
from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Example
from tests.data.sample_images import png

HOLE = (0.25, 0.25, 0.75, 0.75)


def example(answer: Any, key: str = "", options: dict[str, Any] | None = None) -> Example:
    return Example("t", "en", [], Part("text", answer, options or {}), answer, key or str(answer))


def texts(*pairs: tuple[str, str]) -> Scored:
    return Scored([example(truth) for _, truth in pairs], [answer for answer, _ in pairs])


def around(value: float, width: float) -> Histogram:
    """A bump at `value` in a column of location 0 and scale 1, `width` bins wide."""
    place = (np.arcsinh(value) + LIMIT) * BINS / (2 * LIMIT) - 0.5
    mass = np.exp(-0.5 * ((np.arange(BINS) - place) / width) ** 2)
    return Histogram((mass / mass.sum())[None], np.array([[0.0, 1.0]]))


def numbers(answers: list[Histogram], wanted: list[float], baseline: float = 0.0) -> Scored:
    examples = [example({"x": value}) for value in wanted]
    count = len(wanted)
    return Scored(examples, list(answers), scale=[np.ones(1)] * count, reference=[np.full(1, baseline)] * count)


def images(colours: list[str], wanted: list[str]) -> Scored:
    known = KNNClassifier(
        np.stack([image_features(striped(c)) for c in ("red", "blue") for _ in range(3)]),
        ["red"] * 3 + ["blue"] * 3,
        image_features,
    )
    examples = [example(png(c, 64), c, {"mask_box": HOLE}) for c in wanted]
    return Scored(examples, [striped(c) for c in colours], knn=known)


def striped(colour: str) -> Image.Image:
    """Stripes down for red, across for blue: the classifier sees shapes, not at colours."""
    image = Image.new("RGB", (64, 64), "white")
    for place in range(0, 64, 16):
        image.paste(colour, (place, 0, place + 8, 64) if colour == "red" else (0, place, 64, place + 8))
    return image


def plain(colours: list[str], wanted: list[str]) -> Scored:
    examples = [example(png(c, 64), c, {"mask_box": HOLE}) for c in wanted]
    return Scored(examples, [read_image(png(c, 64)) for c in colours])


CASES: dict[str, tuple[Scored, Scored, float | None]] = {  # perfect, worse, the best there is
    "exact_match": (texts(("a", "a"), ("b", "b")), texts(("a", "a"), ("x", "b")), 1.0),
    "char_bigram_f1": (texts(("seven", "seven")), texts(("seventeen", "seven")), 1.0),
    "same_length": (texts(("明月", "清风。"), ("ab", "xy")), texts(("明月", "风"), ("ab", "xy")), 1.0),
    "relative_crps": (numbers([around(2, 0.3)], [2.0]), numbers([around(-2, 0.3)], [2.0]), None),
    "mae": (numbers([around(2, 0.3)], [2.0]), numbers([around(0, 0.3)], [2.0]), None),
    "coverage_80": (
        numbers([around(2, 3)] * 5, [2.0] * 4 + [-3.0]),
        numbers([around(2, 3)] * 5, [2.0] * 5),  # too wide: all of them inside
        0.8,
    ),
    "bits_per_code": (
        Scored([], [], bits_per_code=np.array([0.5, 1.5])),
        Scored([], [], bits_per_code=np.array([9.5, 1.5])),
        None,
    ),
    "knn_accuracy": (
        images(["red", "blue"], ["red", "blue"]),
        images(["red", "red"], ["red", "blue"]),
        1.0,
    ),
    "masked_psnr": (plain(["red"], ["red"]), plain(["blue"], ["red"]), 60.0),
}


def quality(name: str, value: float) -> float:
    """The value of a metric on a scale on which more is better."""
    metric = METRICS[name]
    if metric.goal is not None:
        return -abs(value - metric.goal)
    return value if metric.better == "higher" else -value


def mean(name: str, scored: Scored) -> float:
    compute = METRICS[name].values
    values = compute(scored) if compute is not None else None
    assert values is not None and values.ndim == 1
    return float(values.mean())


@pytest.mark.parametrize("name", CASES)
def test_the_perfect_answer_scores_best(name: str) -> None:
    perfect, worse, best = CASES[name]
    good, bad = mean(name, perfect), mean(name, worse)
    assert METRICS[name].name == name and quality(name, good) > quality(name, bad)
    if best is not None:
        assert good == pytest.approx(best)
    assert (good >= 0 and bad >= 0) or name == "masked_psnr"


@pytest.mark.parametrize("name", ["exact_match", "char_bigram_f1", "coverage_80", "knn_accuracy"])
def test_shares_lie_between_zero_and_one(name: str) -> None:
    for scored in CASES[name][:2]:
        assert 0 <= mean(name, scored) <= 1


def test_every_metric_has_a_case_and_is_used() -> None:
    assert set(CASES) == {name for name, metric in METRICS.items() if metric.values is not None}
    # The CRPS against a second baseline has no task of its own.
    assert {name for task in TASKS.values() for name in task.metrics} == set(METRICS) - {"relative_crps_seasonal_naive"}


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("Seven.", "seven", True),
        (" 七。", "七", True),
        ("seven", "eleven", False),
        ("", "a", False),
        ("A\n", "a", True),
    ],
)
def test_same_text(answer: str, truth: str, same: bool) -> None:
    assert same_text(answer, truth) is same


def test_bigram_f1_by_hand() -> None:
    assert bigram_f1("abcd", "abcx") == pytest.approx(2 * 2 / 6)
    assert bigram_f1("七", "七个") == pytest.approx(2 / 3)
    assert bigram_f1("", "") == 1.0 and bigram_f1("", "a") == 0.0
    assert bigram_f1("aaaa", "aa") == pytest.approx(2 * 1 / 4), "a pair counts as often as both have it"


def test_the_baseline_itself_has_a_share_of_one() -> None:
    """A point at the baseline's place has the baseline's error as its CRPS."""
    scored = numbers([around(0.0, 0.05)] * 2, [2.0, -3.0])
    assert mean("relative_crps", scored) == pytest.approx(1.0, rel=0.03)


def test_mae_by_hand() -> None:
    scored = numbers([around(1.0, 0.2), around(-1.0, 0.2)], [1.5, -3.0])
    assert mean("mae", scored) == pytest.approx((0.5 + 2.0) / 2, abs=0.05)


def test_psnr_by_hand() -> None:
    """Half a step of brightness off, all over: -10 log10(0.25)."""
    examples = [example(np.zeros((64, 64, 3), np.uint8), options={"mask_box": HOLE})]
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    found = mean("masked_psnr", Scored(examples, [grey]))
    assert found == pytest.approx(-20 * np.log10(128 / 255), abs=0.01)


def test_only_the_hole_counts() -> None:
    examples = [example(np.zeros((64, 64, 3), np.uint8), options={"mask_box": HOLE})]
    image = Image.new("RGB", (64, 64), "white")
    image.paste("black", (16, 16, 48, 48))
    assert mean("masked_psnr", Scored(examples, [image])) == pytest.approx(60)


def test_truths_are_the_observed_values() -> None:
    assert truths(example({"a": 1.5})).tolist() == [1.5]
    assert truths(example(NumberSeries("a", [1.0, None, 3.0, float("nan")]))).tolist() == [1.0, 3.0]


def test_a_metric_that_does_not_apply_is_left_out() -> None:
    scored = Scored([example("a")], [Image.new("RGB", (64, 64))], bits_per_code=np.array([2.0]))
    found = all_metrics(("bits_per_code", "knn_accuracy"), scored)
    assert list(found) == ["bits_per_code"] and found["bits_per_code"].tolist() == [2.0]


@pytest.mark.parametrize(("inside", "outside"), [(8, 2), (4, 1)])
def test_coverage_is_best_at_its_goal(inside: int, outside: int) -> None:
    """Wider intervals cover more, and are not better for it."""
    right, wide, narrow = (quality("coverage_80", value) for value in (inside / (inside + outside), 1.0, 0.5))
    assert right > wide > narrow


def test_scores_have_their_units() -> None:
    assert score("exact_match", 0.6245) == "62.5\u00a0%"
    assert score("masked_psnr", 17.345) == "17.3\u00a0dB"
    assert score("bits_per_code", 5.4444) == "5.44"
    assert score("exact_match", math.nan) == "–"


def test_every_metric_has_a_title_and_a_note() -> None:
    assert all(metric.title and metric.note for metric in METRICS.values())
    assert metric_title("relative_crps") == "relative CRPS" and metric_title("my_own") == "my own"
    assert score("text_to_image_en_chance_at_5", 0.125) == "12.5\u00a0%"
