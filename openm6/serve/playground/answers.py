"""Answers as the page shows them: what the engine returns, and figures by the macros of figures.html."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from openm6.modalities.audio import RATE
from openm6.serve.content import pcm
from openm6.serve.playground.inputs import WORDS
from openm6.serve.requests import Request
from openm6.serve.routes.scenarios import decoded
from openm6.serve.scenarios.scenario import Language
from openm6.serve.schemas import Distribution, coverage_of
from openm6.serve.server import Server

CLIENT = "playground"
WIDTH, HEIGHT, EDGE = 560, 180, 34
FIGURES: Any = (
    jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    .from_string(Path(__file__).with_name("figures.html").read_text(encoding="utf-8"))
    .make_module({"WIDTH": WIDTH, "HEIGHT": HEIGHT, "EDGE": EDGE})
)


async def show_answer(
    server: Server, request: Request, language: Language, past: Sequence[float | None] = ()
) -> dict[str, Any]:
    """Return the parts of the answer panel for a request that continues `past`, if a series; raise as `Engine.ask`."""
    [handle] = await server.engine.ask_all([request], CLIENT, server.limits.seconds)
    answer = await handle.answer()
    server.metrics.add(CLIENT, answer)
    energy = WORDS["unmeasured"].text(language)
    if answer.joules is not None:
        estimated = answer.energy_source == "estimate"
        energy = f"{answer.joules:.3g} J ({WORDS['estimate'].text(language) if estimated else answer.energy_source})"
    coverage = coverage_of(request, answer, server.loaded.description)
    note = str(FIGURES.note(coverage.message(language), f"{energy} · {answer.seconds:.2f} s"))
    found = await asyncio.to_thread(decoded, request, answer, server.loaded)
    match found:
        case {"audio": samples}:
            found = {"audio": (RATE, pcm(samples))}
        case {"numbers": numbers}:
            [(name, distribution)] = numbers.items()
            found = {"figure": interval_chart(name, distribution, past)}
        case {"ranking": ranking}:
            found = {"figure": str(FIGURES.ranking(ranking))}
        case {"embedding": vector}:
            found = {"figure": vector_strip(vector)}
    return {**found, "note": note}


def interval_chart(name: str, found: Distribution, past: Sequence[float | None] = ()) -> str:
    """Return one number as a bar from low to high with its median, or a forecast as a band after what was observed."""
    title = name.replace("_", " ")
    if isinstance(found.median, list):
        return _forecast(title, found, past)
    low, median, high = float(found.low), float(found.median), float(found.high)  # type: ignore[arg-type]
    span = (high - low) or abs(median) or 1.0
    scale = (WIDTH - 2 * EDGE) / (high - low + span / 2)
    marks = [(round(EDGE + (x - low + span / 4) * scale, 1), f"{x:.4g}") for x in (low, median, high)]
    caption = f"{median:.4g} [{low:.4g}, {high:.4g}], {found.coverage:.0%}"
    return str(FIGURES.interval(title, caption, marks))


def _forecast(title: str, found: Distribution, past: Sequence[float | None]) -> str:
    lows, medians, highs = (list(values) for values in (found.low, found.median, found.high))  # type: ignore[arg-type]
    observed = [(step, value) for step, value in enumerate(past) if value is not None]
    values = [value for _, value in observed] + lows + highs
    bottom, top, last = min(values), max(values), max(1, len(past) + len(medians) - 1)
    span = (top - bottom) or 1.0

    def points(steps: Iterable[tuple[int, float]]) -> str:
        return " ".join(
            f"{EDGE + step / last * (WIDTH - 2 * EDGE):.1f},"
            f"{HEIGHT - EDGE - (value - bottom) / span * (HEIGHT - 2 * EDGE):.1f}"
            for step, value in steps
        )

    band = [*enumerate(lows, len(past)), *reversed(list(enumerate(highs, len(past))))]
    caption = f"{', '.join(f'{value:.4g}' for value in medians)} ({found.coverage:.0%})"
    lines = (points(band), points(observed), points(enumerate(medians, len(past))))
    return str(FIGURES.forecast(title, caption, *lines, f"{top:.4g}", f"{bottom:.4g}"))


def vector_strip(vector: Sequence[float]) -> str:
    """Return an embedding as a strip of coloured bars."""
    largest = max((abs(value) for value in vector), default=0.0) or 1.0
    width = WIDTH / max(1, len(vector))
    bars = [(round(index * width, 2), value > 0, round(abs(value) / largest, 2)) for index, value in enumerate(vector)]
    return str(FIGURES.vector(bars, round(width, 2)))
