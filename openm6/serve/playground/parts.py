"""Inputs, answers and words of the page: a component for each input, what was typed or uploaded there, and figures."""

from __future__ import annotations

import asyncio
import io
import re
from abc import ABCMeta
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio
import jinja2
import soundfile
from PIL import Image as Pillow

from openm6.core.config import build, read_yaml
from openm6.core.errors import DataError, OpenM6Error
from openm6.evaluate.media import MediaBudget
from openm6.evaluate.report import sample_data
from openm6.modalities.audio import RATE
from openm6.modalities.dates import is_date
from openm6.modalities.histogram import Histogram
from openm6.modalities.series import NumberSeries
from openm6.serve.config import Limits
from openm6.serve.content import CHECKS, pcm
from openm6.serve.errors import BadRequestError
from openm6.serve.requests import EngineUnavailableError, QueueFullError, Request
from openm6.serve.routes.scenarios import COVERAGE, decoded
from openm6.serve.scenarios.run import MEDIA, Example, sample_of
from openm6.serve.scenarios.scenario import Bilingual, InputKind, Language, Scenario
from openm6.serve.schemas import Distribution, coverage_of, distribution_of
from openm6.serve.server import Server

_WORDS = read_yaml(Path(__file__).with_name("words.yaml"))
WORDS = {name: build(Bilingual, words, name) for name, words in _WORDS.items()}


def _path_of(_: gradio.Image, payload: Any) -> str | None:
    """The path of an image's file, unread: errors are reported in our words, not in Gradio's."""
    return None if payload is None else payload.path


# A class, since Gradio creates a component again when its label changes, and would lose a method of the object's own.
# Not by a class statement, at which it would write a stub file beside this one.
ImageInput: Any = ABCMeta.__new__(
    type(gradio.Image),
    "ImageInput",
    (gradio.Image,),
    {"is_template": True, "preprocess": _path_of, "__module__": __name__},
)


def make_inputs(scenario: Scenario, language: Language, example: Mapping[str, Any]) -> list[Any]:
    """Return a component for each input of a scenario, with what the example gives or empty."""
    found = []
    for name, declared in scenario.inputs.items():
        kind, label = declared.kind, declared.label.text(language)
        hint = WORDS.get(f"{kind}_hint")
        if hint is not None:
            label = f"{label} ({hint.text(language)})"
        # Without `interactive`, Gradio disables a component with a value that is made while the page is rendered.
        form: Any = {"label": label, "elem_id": f"input-{name}", "interactive": True}
        if kind == "image":
            image = Pillow.open(io.BytesIO(example[name])).convert("RGBA") if name in example else None
            found.append(ImageInput(image, type="filepath", format="png", height=200, **form))
        elif kind == "audio":
            # The rate first.
            audio = soundfile.read(io.BytesIO(example[name]), dtype="int16")[::-1] if name in example else None
            found.append(gradio.Audio(audio, type="filepath", **form))
        else:
            found.append(gradio.Textbox(write_typed(kind, example[name]) if name in example else "", lines=2, **form))
    return found


def values_in(
    scenario: Scenario, contents: tuple[Any, ...], limits: Limits, language: Language = "en"
) -> dict[str, Any]:
    """Return what the components of `make_inputs` hold, by name; raise DataError if something cannot be read."""
    return {
        name: uploaded(given.kind, value, limits, language) if given.kind in MEDIA else read_typed(given.kind, value)
        for (name, given), value in zip(scenario.inputs.items(), contents, strict=True)
        if value not in (None, "")
    }


def uploaded(kind: str, path: str, limits: Limits, language: Language) -> bytes:
    """Return the bytes of an upload; raise DataError, in the language of the page, if it is broken or too large."""
    data = Path(path).read_bytes()
    try:
        return CHECKS[kind](data, limits, kind)
    except BadRequestError:
        limit = limits.pixels if kind == "image" else limits.audio_seconds
        raise DataError(WORDS[f"bad_{kind}"].text(language).format(limit=limit)) from None


def read_typed(kind: InputKind, text: str) -> Any:
    """Return the value that was typed into a text box. Raise DataError if it cannot be read as this kind."""
    text = text.strip()
    if kind == "numbers":
        return dict(_column(line) for line in text.replace(";", "\n").splitlines() if line.strip())
    if kind == "series":
        name, _, values = text.replace("：", ":").rpartition(":")
        return {"name": name.strip() or "value", "values": _numbers(values)}
    if kind == "candidates":
        return [line.strip() for line in text.splitlines() if line.strip()]
    return _numbers(text) if kind in ("box", "span") else text


def _column(line: str) -> tuple[str, float | str | None]:
    name, *values = (part.strip() for part in re.split("[：:=]", line, maxsplit=1))
    if not name or not values:
        raise DataError(f"{line.strip()!r} must look like mass = 3.5")
    return name, values[0] if is_date(values[0]) else _number(values[0])


def _numbers(text: str) -> list[float | None]:
    return [_number(word) for word in text.replace("，", ",").split(",")]


def _number(word: str) -> float | None:
    try:
        return float(word) if word.strip() else None
    except ValueError:
        raise DataError(f"{word.strip()!r} is not a number: write it as 3.5") from None


def write_typed(kind: InputKind, value: Any) -> str:
    """Return a value as it would be typed."""
    if kind == "numbers":
        return "\n".join(f"{name} = {_plain(number)}" for name, number in value.items())
    if kind == "series":
        return f"{value['name']}: {', '.join(map(_plain, value['values']))}"
    if kind == "candidates":
        return "\n".join(value)
    return ", ".join(map(_plain, value)) if kind in ("box", "span") else str(value)


def _plain(number: float | str | None) -> str:
    return "" if number is None else number if isinstance(number, str) else f"{number:g}"


# As clients of the engine; the answers of the gallery do not wait before those to a visitor.
CLIENT, GALLERY = "playground", "gallery"
CARD_BYTES = 2**18  # of the images and audio of a card
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


async def make_card(server: Server, example: Example) -> str:
    """Return the answer to an example as a card of the gallery; empty if there will be none, now or later.

    Raise QueueFullError or EngineUnavailableError, after which another visitor may get it.
    """
    try:
        [handle] = await server.engine.ask_all([example.request], GALLERY, server.limits.seconds)
        answer = await handle.answer()
    except (QueueFullError, EngineUnavailableError):
        raise
    except OpenM6Error:
        return ""
    server.metrics.add(GALLERY, answer)
    sample = await asyncio.to_thread(sample_of, example.request, answer, server.loaded)
    shown = await asyncio.to_thread(sample_data, sample, MediaBudget(CARD_BYTES))
    title, figure = example.scenario.title.text(example.language), ""
    if isinstance(sample.answer, Histogram):
        past = next((part.raw.values for part in sample.inputs if isinstance(part.raw, NumberSeries)), ())
        figure = interval_chart(example.scenario.column or title, distribution_of(sample.answer, COVERAGE), past)
    return str(FIGURES.card(example.scenario.name, example.number, title, shown, figure))
