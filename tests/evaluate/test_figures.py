"""How figures are said."""

from __future__ import annotations

import math

import pytest

from openm6.evaluate.figures import (
    METRIC_NOTES,
    SHARES,
    count,
    duration,
    metric_title,
    plain,
    score,
    short_count,
    signed,
    standing,
)
from openm6.evaluate.metrics import METRICS
from openm6.tasks.task import RECALLS


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"), (3750, "3,750"), (12.3456, "12.35"), (0.01234, "0.01234"), (-0.5, "−0.5"), (999.96, "1000"),
        (1e-7, "1.00e−07"), (2e20, "2.00e+20"), (math.nan, "–"), (math.inf, "–"), (100, "100"),
    ],
)  # fmt: skip
def test_plain(value, said) -> None:
    assert plain(value) == said


def test_plain_with_fewer_digits() -> None:
    assert [plain(value, 3) for value in (12.3456, 0.4817, 3750, 157.4)] == ["12.3", "0.482", "3,750", "157"]


@pytest.mark.parametrize(
    ("value", "words", "letters"),
    [
        (840, "840", "840"), (12_300, "12,300", "12.3k"), (5_123_456, "5.12 million", "5.12M"),
        (1.003e12, "1 trillion", "1T"), (103e9, "103 billion", "103B"),
    ],
)  # fmt: skip
def test_counts(value, words, letters) -> None:
    assert (count(value), short_count(value)) == (words, letters)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.26, "0.3 seconds"),
        (48, "48 seconds"),
        (391, "6.5 minutes"),
        (9000, "2.5 hours"),
        (10 * 86400, "10 days"),
    ],
)
def test_durations(seconds, said) -> None:
    assert duration(seconds) == said


def test_scores_have_their_units() -> None:
    assert score("exact_match", 0.6245) == "62.5\u00a0%"
    assert score("hole_psnr", 17.345) == "17.3\u00a0dB"
    assert score("code_bits", 5.4444) == "5.44"
    assert score("exact_match", math.nan) == "–"


def test_every_metric_has_a_title_and_a_note() -> None:
    assert set(METRIC_NOTES) == set(METRICS) | set(RECALLS) | {"crps_share_seasonal_naive"}
    assert set(SHARES) <= set(METRIC_NOTES)
    assert metric_title("crps_share") == "CRPS share" and metric_title("my_own") == "my own"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (2.314, "+2.31"),
        (-0.4, "−0.40"),
        (-0.001, "0.00"),
        (345.6, "+346"),
        (-1234.5, "−1,234"),
        (math.nan, "–"),
    ],
)
def test_signed(value, said) -> None:
    assert signed(value) == said


@pytest.mark.parametrize(
    ("interval", "kind"),
    [
        ((0.1, 2), "gain"),
        ((-1, 2), "unsure"),
        ((-2, -1), "loss"),
        ((0, 1), "unsure"),
        ((math.nan, math.nan), "unsure"),
    ],
)
def test_standing(interval, kind) -> None:
    assert standing(interval) == kind
