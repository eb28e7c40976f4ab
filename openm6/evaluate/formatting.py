"""Numbers and names as text for people: counts, times, differences and signs of intervals."""

import math
from typing import Literal

NO_BREAK = "\u00a0"  # a space that keeps a number and its unit on one line
_SCALES = ((10**12, "trillion", "T"), (10**9, "billion", "B"), (10**6, "million", "M"))
_TIMES = ((86400, "days"), (3600, "hours"), (60, "minutes"))


def plain(value: float, digits: int = 4) -> str:
    """About four digits: `3,750`, `12.35`, `0.0123`; a dash for what is not finite."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        return _minus(f"{value:.2e}")
    if size >= 1000:
        return _minus(f"{value:,.0f}")
    decimals = 0 if value == 0 else max(0, digits - 1 - math.floor(math.log10(size)))
    return _minus(_trimmed(f"{value:.{decimals}f}"))


def count(value: float) -> str:
    """In words: `5.12 million`, `840`, `12,300`."""
    for size, word, _ in _SCALES:
        if value >= size:
            return f"{_three_digits(value / size)} {word}"
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """For narrow columns: `5.12M`, `840`, `12.3k`."""
    for size, _, letter in (*_SCALES, (1000, "thousand", "k")):
        if value >= size:
            return f"{_three_digits(value / size)}{letter}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """`9.2 minutes`, `48 seconds`, `1.5 days`."""
    for size, word in _TIMES:
        if seconds >= 2 * size:
            return f"{_three_digits(seconds / size, max_decimals=1)} {word}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.1f} seconds"


def words(name: str) -> str:
    """An identifier as words: `image_regression` is `image regression`."""
    return name.replace("_", " ")


def signed(value: float) -> str:
    """With its sign, a true minus: `+2.31`, `−0.4`; two decimals below 100."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+.2f}"
    return _minus(text) if float(text.replace(",", "")) else "0.00"  # a zero has no sign


def significance(interval: tuple[float, float]) -> Literal["positive", "none", "negative"]:
    """Whether a whole interval is above 0, below 0, or neither (also if it is not finite)."""
    low, high = interval
    if low > 0 and high > 0:
        return "positive"
    return "negative" if high < 0 and low < 0 else "none"


def _three_digits(value: float, max_decimals: int = 2) -> str:
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return _trimmed(f"{value:,.{min(decimals, max_decimals)}f}")


def _trimmed(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def _minus(text: str) -> str:
    return text.replace("-", "−")
