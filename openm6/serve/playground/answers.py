"""Asking the engine from the page, and its answers as the page shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as Pillow

from openm6.base.errors import DataError
from openm6.modalities.audio import RATE
from openm6.modalities.interface import Part
from openm6.serve.distributions import described
from openm6.serve.playground.charts import interval_chart, ranking_list, untaught, vector_strip
from openm6.serve.playground.inputs import uploaded
from openm6.serve.playground.words import ESTIMATE, NOTHING, UNCOUNTED
from openm6.serve.requests import Answer, CodesRequest, NumbersRequest, Request, TextRequest
from openm6.serve.scenarios.ask import scenario_request
from openm6.serve.scenarios.bodies import COVERAGE, picture_of, ranking_of
from openm6.serve.scenarios.catalogue import require
from openm6.serve.scenarios.scenario import Language, Output, Scenario
from openm6.serve.state import Server
from openm6.serve.teaching import taught_of

CLIENT = "playground"


@dataclass(frozen=True)
class Shown:
    """What the answer panel holds; None hides a part of it."""

    text: str | None = None
    picture: Pillow.Image | None = None
    sound: tuple[int, np.ndarray] | None = None
    figure: str | None = None
    note: str = ""


async def answer_scenario(
    server: Server, scenario: Scenario, language: Language, values: dict[str, Any], seed: int
) -> Shown:
    """A scenario's answer.

    Raises:
        OpenM6Error: the model was not taught it, an input is broken, or too much is waiting.
    """
    require(scenario, server.engine.loaded.description)
    request = scenario_request(
        scenario, language, values, client=CLIENT, seconds=server.config.limits.seconds, seed=seed
    )
    series = scenario.kind_of("series")
    past = values[series]["values"] if series else ()
    return await _answered(server, request, scenario.gives, language, past)


async def answer_freely(
    server: Server,
    language: Language,
    text: str,
    picture: str | None,
    sound: str | None,
    want: Output,
    seed: int,
) -> Shown:
    """An answer to whatever is given; raises as `answer_scenario`."""
    limits = server.config.limits
    parts = [
        Part(kind, uploaded(kind, path, limits, language))
        for kind, path in (("image", picture), ("sound", sound))
        if path
    ]
    if text.strip():
        parts.append(Part("text", (" " if parts else "") + text.strip()))
    if not parts:
        raise DataError(NOTHING.said(language))
    seconds, given = limits.seconds, tuple(parts)
    request: Request
    if want == "text":
        sampling = TextRequest(parts=given).sampling.model_copy(update={"seed": seed})
        request = TextRequest(parts=given, client=CLIENT, seconds=seconds, sampling=sampling)
    else:
        kind = "image" if want == "image" else "sound"
        masked = CodesRequest(parts=given, want="image").sampling.model_copy(update={"seed": seed})
        request = CodesRequest(parts=given, client=CLIENT, seconds=seconds, want=kind, sampling=masked)  # type: ignore[arg-type]
    return await _answered(server, request, want, language)


async def _answered(
    server: Server, request: Request, gives: Output, language: Language, past: Any = ()
) -> Shown:
    ticket = await server.engine.ask(request)
    answer = await ticket.answer()
    server.metrics.add(CLIENT, answer)
    loaded, value = server.engine.loaded, answer.value
    note = energy_note(answer, language)
    taught = taught_of(request, answer, loaded.description)
    if not taught.taught:
        note = untaught(taught.said(language)) + note
    if gives == "text":
        return Shown(text=value, note=note)
    if gives == "image":
        return Shown(picture=picture_of(request, value, loaded), note=note)
    if gives == "sound":
        samples = np.clip(loaded.sound.decode(value), -1, 1)
        return Shown(sound=(RATE, (samples * 32767).astype(np.int16)), note=note)
    if gives == "numbers":
        assert isinstance(request, NumbersRequest)
        name = request.series or request.columns[0]
        return Shown(figure=interval_chart(name, described(value, COVERAGE), past), note=note)
    if gives == "embedding":
        return Shown(figure=vector_strip(np.asarray(value).tolist()), note=note)
    return Shown(figure=ranking_list(ranking_of(request, value)), note=note)


def energy_note(answer: Answer, language: Language) -> str:
    """The joules and the time of an answer."""
    energy = UNCOUNTED.said(language)
    if answer.joules is not None:
        source = ESTIMATE.said(language) if answer.source == "estimate" else answer.source
        energy = f"{answer.joules:.3g} J ({source})"
    return f"{energy} · {answer.seconds:.2f} s"
