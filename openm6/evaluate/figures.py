"""How figures are said to a person: counts, times, scores and differences in few digits."""

from __future__ import annotations

import math
from typing import Literal

NO_BREAK = "\u00a0"  # a space that keeps a number and its unit on one line
# Metrics to be said in per cent; a CRPS share may be above 100 %.
SHARES = (
    "exact_match",
    "character_f1",
    "recognised",
    "coverage_80",
    "crps_share",
    "crps_share_seasonal_naive",
)
UNITS = {"psnr": "dB"}  # by the last word of a metric's name; `code_bits` has its unit in its title
METRIC_NOTES = {  # name: title, and what it tells
    "exact_match": ("exact match", "answers equal to the truth, but for case and full stops"),
    "character_f1": ("character F1", "overlap of character pairs with the truth; 100 % is equal"),
    "code_bits": (
        "bits a code",
        "negative log-likelihood of a code of the true picture or sound, of the masked part where one is filled in: "
        "lower is better",
    ),
    "recognised": (
        "recognised",
        "drawings or utterances that a plain classifier of real ones takes for the right thing",
    ),
    "hole_psnr": ("PSNR in the hole", "likeness of what was filled in to the truth, in decibels"),
    "crps_share": (
        "CRPS share",
        "error of the whole predicted distribution (CRPS), as a part of the baseline’s error",
    ),
    "mae": ("median’s error", "mean absolute error of the predicted median, in spreads of the column"),
    "recall_at_1": (
        "recall at 1",
        "queries whose partner is nearest of all test records, both ways and languages",
    ),
    "recall_at_5": ("recall at 5", "queries whose partner is among the nearest five"),
    "crps_share_seasonal_naive": (
        "CRPS share of seasonal naive",
        "the same as a part of the error of repeating the last season of the series",
    ),
    "coverage_80": (
        "80 % coverage",
        "truths inside the 80 % interval: right at 80 %; more means too wide, less too narrow",
    ),
}
_SCALES = ((10**12, "trillion", "T"), (10**9, "billion", "B"), (10**6, "million", "M"))
_TIMES = ((86400, "days"), (3600, "hours"), (60, "minutes"))

Standing = Literal["gain", "unsure", "loss"]


def plain(value: float, digits: int = 4) -> str:
    """About four digits: `3,750`, `12.35`, `0.0123`; a dash for what is not a number."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        return f"{value:.2e}".replace("-", "−")
    if size >= 1000:
        return _minus(f"{value:,.0f}")
    after = 0 if value == 0 else max(0, digits - 1 - math.floor(math.log10(size)))
    return _minus(_trimmed(f"{value:.{after}f}"))


def count(value: float) -> str:
    """In words: `5.12 million`, `840`, `12,300`."""
    for size, word, _ in _SCALES:
        if value >= size:
            return f"{_three_digits(value / size)} {word}"
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """For narrow places: `5.12M`, `840`, `12.3k`."""
    for size, _, letter in (*_SCALES, (1000, "thousand", "k")):
        if value >= size:
            return f"{_three_digits(value / size)}{letter}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """`9.2 minutes`, `48 seconds`, `1.5 days`."""
    for size, word in _TIMES:
        if seconds >= 2 * size:
            return f"{_three_digits(seconds / size, most=1)} {word}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.1f} seconds"


def score(metric: str, value: float) -> str:
    """A metric's value with its unit, where the name tells one: `62.4 %`, `24.1 dB`."""
    if not math.isfinite(value):
        return "–"
    if is_share(metric):
        return f"{100 * value:.1f}{NO_BREAK}%"
    unit = UNITS.get(metric.rsplit("_", 1)[-1], "")
    return f"{plain(value, digits=3)}{NO_BREAK}{unit}".rstrip()


def is_share(metric: str) -> bool:
    """Whether a metric is to be said in per cent."""
    return metric in SHARES or "recall_at_" in metric or "chance_at_" in metric


def metric_title(metric: str) -> str:
    """A metric's name for a person."""
    return METRIC_NOTES[metric][0] if metric in METRIC_NOTES else words(metric)


def words(name: str) -> str:
    """An identifier as words: `number_from_picture` is `number from picture`."""
    return name.replace("_", " ")


def signed(value: float) -> str:
    """With its sign, a true minus: `+2.31`, `−0.4`; two digits after the point below 100."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+.2f}"
    return _minus(text) if float(text.replace(",", "")) else "0.00"  # a zero has no sign


def standing(interval: tuple[float, float]) -> Standing:
    """Where an interval lies: wholly above 0, wholly below, or neither (also when it is not finite)."""
    low, high = interval
    if low > 0 and high > 0:
        return "gain"
    return "loss" if high < 0 and low < 0 else "unsure"


def _three_digits(value: float, most: int = 2) -> str:
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return _trimmed(f"{value:,.{min(digits, most)}f}")


def _trimmed(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def _minus(text: str) -> str:
    return text.replace("-", "−")
