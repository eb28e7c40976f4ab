"""Numbers as text."""

from __future__ import annotations

import math

import pytest

from openm6.evaluate.formatting import count, duration, plain, short_count, signed, significance


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
        ((0.1, 2), "positive"),
        ((-1, 2), "none"),
        ((-2, -1), "negative"),
        ((0, 1), "none"),
        ((math.nan, math.nan), "none"),
    ],
)
def test_significance(interval, kind) -> None:
    assert significance(interval) == kind
