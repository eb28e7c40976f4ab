"""Answers as the page shows them: what the engine returns, and charts in SVG and HTML with every text escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as Pillow

from openm6.core.errors import DataError
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.audio import RATE
from openm6.modalities.interface import Part
from openm6.serve.content import join_texts, pcm
from openm6.serve.playground.inputs import WORDS, uploaded
from openm6.serve.requests import Answer, CodesRequest, NumbersRequest, RankRequest, Request, TextRequest
from openm6.serve.routes.scenarios import COVERAGE, drawn_image
from openm6.serve.scenarios.ask import scenario_request
from openm6.serve.scenarios.scenario import Language, Output, Scenario, require
from openm6.serve.schemas import (
    Distribution,
    RankedCandidate,
    coverage_of,
    distribution_of,
    rank_candidates,
)
from openm6.serve.server import Server

CLIENT = "playground"
WIDTH, HEIGHT, EDGE = 560, 180, 34
BAND, LINE, NEGATIVE = "#f3c98b", "#b4571c", "#2c6e9b"


@dataclass(frozen=True)
class Shown:
    """The content of the answer panel; what is None is hidden."""

    text: str | None = None
    image: Pillow.Image | None = None
    audio: tuple[int, np.ndarray] | None = None
    figure: str | None = None
    note: str = ""


async def answer_scenario(
    server: Server, scenario: Scenario, language: Language, values: dict[str, Any], seed: int
) -> Shown:
    """Answer a scenario.

    Raises:
        OpenM6Error: the model was not trained for it, an input is broken, or too much is waiting.
    """
    require(scenario, server.loaded.description)
    request = scenario_request(scenario, language, values, seed)
    series = scenario.kind_of("series")
    past = values[series]["values"] if series else ()
    return await _answer(server, request, scenario.output, language, past)


async def answer_freely(
    server: Server,
    language: Language,
    text: str,
    image: str | None,
    audio: str | None,
    output: Output,
    seed: int,
) -> Shown:
    """Answer to any text, image and audio; raise as `answer_scenario`."""
    parts = [
        Part(kind, uploaded(kind, path, server.limits, language))
        for kind, path in (("image", image), ("audio", audio))
        if path
    ]
    if text.strip():
        parts = join_texts([*parts, Part("text", text.strip())])
    if not parts:
        raise DataError(WORDS["empty"].text(language))
    request: Request = TextRequest(parts=tuple(parts), sampling=Sampling(seed=seed))
    if output == "image" or output == "audio":
        sampling = MaskedSampling(seed=seed)
        request = CodesRequest(parts=tuple(parts), modality=output, sampling=sampling)
    return await _answer(server, request, output, language)


async def _answer(
    server: Server, request: Request, output: Output, language: Language, past: Any = ()
) -> Shown:
    [handle] = await server.engine.ask_all([request], CLIENT, server.limits.seconds)
    answer = await handle.answer()
    server.metrics.add(CLIENT, answer)
    loaded, value = server.loaded, answer.value
    note = energy_note(answer, language)
    coverage = coverage_of(request, answer, loaded.description)
    if not coverage.trained:
        note = f'<p class="untrained">{html.escape(coverage.message(language))}</p>' + note
    if output == "text":
        return Shown(text=value, note=note)
    if output == "image":
        return Shown(image=drawn_image(request, value, loaded), note=note)
    if output == "audio":
        return Shown(audio=(RATE, pcm(loaded.audio.decode(value))), note=note)
    if isinstance(request, NumbersRequest):
        return Shown(figure=interval_chart(request.name, distribution_of(value, COVERAGE), past), note=note)
    if isinstance(request, RankRequest):
        return Shown(figure=ranking_list(rank_candidates(request.candidates, value)), note=note)
    return Shown(figure=vector_strip(np.asarray(value).tolist()), note=note)


def energy_note(answer: Answer, language: Language) -> str:
    """Return the joules and the time of an answer."""
    energy = WORDS["unmeasured"].text(language)
    if answer.joules is not None:
        source = (
            WORDS["estimate"].text(language) if answer.energy_source == "estimate" else answer.energy_source
        )
        energy = f"{answer.joules:.3g} J ({source})"
    return f"{energy} · {answer.seconds:.2f} s"


def failure_box(title: str, sentence: str) -> str:
    """Return why there is no answer, as a box that screen readers read at once."""
    content = f"<strong>{html.escape(title)}</strong><p>{html.escape(sentence)}</p>"
    return f'<div class="failure" role="alert">{content}</div>'


def interval_chart(name: str, found: Distribution, past: Sequence[float | None] = ()) -> str:
    """Return one number as a bar from low to high with its median, or a forecast as a band after what was observed."""
    if isinstance(found.median, list):
        return _forecast(name, found, past)
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
    caption = f"{median:.4g} [{low:.4g}, {high:.4g}], {found.coverage:.0%}"
    return _figure(name.replace("_", " "), caption, drawing, HEIGHT - 40)


def _forecast(name: str, found: Distribution, past: Sequence[float | None]) -> str:
    lows, middles, highs = (list(values) for values in (found.low, found.median, found.high))  # type: ignore[arg-type]
    observed = [(step, value) for step, value in enumerate(past) if value is not None]
    steps = len(past) + len(middles)
    values = [value for _, value in observed] + lows + highs
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
        f'<polyline points="{" ".join(point(*pair) for pair in observed)}" fill="none" stroke="currentColor" '
        f'stroke-width="2"/><polyline points="{ahead}" fill="none" stroke="{LINE}" stroke-width="3"/>'
        f'<text x="4" y="{EDGE - 10}">{top:.4g}</text><text x="4" y="{HEIGHT - 12}">{bottom:.4g}</text>'
    )
    caption = f"{', '.join(f'{value:.4g}' for value in middles)} ({found.coverage:.0%})"
    return _figure(name.replace("_", " "), caption, drawing, HEIGHT)


def _figure(title: str, caption: str, drawing: str, height: int) -> str:
    label = html.escape(f"{title}: {caption}", quote=True)
    return (
        f'<figure class="interval"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}" '
        f'font-size="15" fill="currentColor">{drawing}</svg><figcaption><b>{html.escape(title)}</b> '
        f"{html.escape(caption)}</figcaption></figure>"
    )


def ranking_list(ranking: Sequence[RankedCandidate]) -> str:
    """Return candidates in order, with their scores."""
    items = "".join(
        f"<li>{html.escape(ranked.candidate)} <small>{ranked.score:.2f}</small></li>" for ranked in ranking
    )
    return f'<ol class="ranking">{items}</ol>'


def vector_strip(vector: Sequence[float]) -> str:
    """Return an embedding as a strip of coloured bars."""
    largest = max((abs(value) for value in vector), default=0.0) or 1.0
    width = WIDTH / max(1, len(vector))
    bars = "".join(
        f'<rect x="{index * width:.2f}" y="0" width="{width:.2f}" height="40" '
        f'fill="{LINE if value > 0 else NEGATIVE}" opacity="{abs(value) / largest:.2f}"/>'
        for index, value in enumerate(vector)
    )
    return f'<svg viewBox="0 0 {WIDTH} 40" role="img" aria-label="{len(vector)} numbers">{bars}</svg>'
