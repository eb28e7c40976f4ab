"""Intervals, rankings and failures as small pictures in the page: SVG and HTML made by hand, every text escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence

from openm6.serve.distributions import Distribution
from openm6.serve.scenarios.bodies import RankedCandidate

WIDTH, HEIGHT, EDGE = 560, 180, 34
BAND, LINE = "#f3c98b", "#b4571c"


def failure(title: str, sentence: str) -> str:
    """Why there is no answer, as a box that screen readers tell at once."""
    told = f"<strong>{html.escape(title)}</strong><p>{html.escape(sentence)}</p>"
    return f'<div class="failure" role="alert">{told}</div>'


def interval_chart(name: str, found: Distribution, past: Sequence[float | None] = ()) -> str:
    """One number as a bar from low to high with its median, or a forecast as a band after what was seen."""
    if isinstance(found.median, list):
        return _forecast(name, found, past)
    return _single(name, found)


def _single(name: str, found: Distribution) -> str:
    low, median, high = float(found.low), float(found.median), float(found.high)  # type: ignore[arg-type]
    span = (high - low) or abs(median) or 1.0
    start, stop = low - 0.25 * span, high + 0.25 * span

    def at(value: float) -> float:
        return EDGE + (value - start) / (stop - start) * (WIDTH - 2 * EDGE)

    middle = HEIGHT // 2 - 20
    marks = "".join(
        f'<text x="{at(value):.1f}" y="{middle + 44}" text-anchor="middle">{value:.4g}</text>'
        for value in (low, median, high)
    )
    drawing = (
        f'<rect x="{at(low):.1f}" y="{middle - 14}" width="{at(high) - at(low):.1f}" height="28" rx="6" fill="{BAND}"/>'
        f'<line x1="{at(median):.1f}" x2="{at(median):.1f}" y1="{middle - 20}" y2="{middle + 20}" '
        f'stroke="{LINE}" stroke-width="4"/>{marks}'
    )
    told = f"{median:.4g} [{low:.4g}, {high:.4g}], {found.coverage:.0%}"
    return _figure(name.replace("_", " "), told, drawing, HEIGHT - 40)


def _forecast(name: str, found: Distribution, past: Sequence[float | None]) -> str:
    lows, middles, highs = (list(values) for values in (found.low, found.median, found.high))  # type: ignore[arg-type]
    seen = [(step, value) for step, value in enumerate(past) if value is not None]
    steps = len(past) + len(middles)
    values = [value for _, value in seen] + lows + highs
    bottom, top = min(values), max(values)
    span = (top - bottom) or 1.0

    def point(step: int, value: float) -> str:
        x = EDGE + step / max(1, steps - 1) * (WIDTH - 2 * EDGE)
        y = HEIGHT - EDGE - (value - bottom) / span * (HEIGHT - 2 * EDGE)
        return f"{x:.1f},{y:.1f}"

    first = len(past)
    band = [point(first + step, value) for step, value in enumerate(lows)]
    band += [point(first + step, highs[step]) for step in reversed(range(len(highs)))]
    ahead = " ".join(point(first + step, value) for step, value in enumerate(middles))
    drawing = (
        f'<polygon points="{" ".join(band)}" fill="{BAND}"/>'
        f'<polyline points="{" ".join(point(*pair) for pair in seen)}" fill="none" stroke="currentColor" '
        f'stroke-width="2"/><polyline points="{ahead}" fill="none" stroke="{LINE}" stroke-width="3"/>'
        f'<text x="4" y="{EDGE - 10}">{top:.4g}</text><text x="4" y="{HEIGHT - 12}">{bottom:.4g}</text>'
    )
    told = ", ".join(f"{value:.4g}" for value in middles)
    return _figure(name.replace("_", " "), f"{told} ({found.coverage:.0%})", drawing, HEIGHT)


def _figure(title: str, told: str, drawing: str, height: int) -> str:
    label = html.escape(f"{title}: {told}", quote=True)
    return (
        f'<figure class="interval"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}" '
        f'font-size="15" fill="currentColor">{drawing}</svg><figcaption><b>{html.escape(title)}</b> '
        f"{html.escape(told)}</figcaption></figure>"
    )


def ranking_list(ranking: Sequence[RankedCandidate]) -> str:
    """Candidates in order, with their scores."""
    items = "".join(
        f"<li>{html.escape(ranked.candidate)} <small>{ranked.score:.2f}</small></li>" for ranked in ranking
    )
    return f'<ol class="ranking">{items}</ol>'


def vector_strip(vector: Sequence[float]) -> str:
    """An embedding as a strip of coloured bars."""
    largest = max((abs(value) for value in vector), default=0.0) or 1.0
    wide = WIDTH / max(1, len(vector))
    bars = "".join(
        f'<rect x="{number * wide:.2f}" y="0" width="{wide:.2f}" height="40" '
        f'fill="{LINE if value > 0 else "#2c6e9b"}" opacity="{abs(value) / largest:.2f}"/>'
        for number, value in enumerate(vector)
    )
    return f'<svg viewBox="0 0 {WIDTH} 40" role="img" aria-label="{len(vector)} numbers">{bars}</svg>'


def untaught(sentence: str) -> str:
    """Above an answer for which the model was not trained."""
    return f'<p class="untaught">{html.escape(sentence)}</p>'
