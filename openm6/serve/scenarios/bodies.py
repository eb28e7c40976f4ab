"""A scenario's inputs as they come over HTTP, and its answer as it goes back."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from openm6.inference.load import LoadedModel
from openm6.modalities.image import hole_places, read_image
from openm6.serve.config import Limits
from openm6.serve.content import Series
from openm6.serve.distributions import Distribution, described
from openm6.serve.editing import kept_outside
from openm6.serve.errors import BadRequestError
from openm6.serve.media import (
    as_data_url,
    check_picture,
    from_base64,
    from_data_url,
    write_picture,
    write_sound,
)
from openm6.serve.requests import Answer, CodesRequest, NumbersRequest, Request
from openm6.serve.scenarios.scenario import Scenario
from openm6.serve.schemas import MAX_SEED, Energy
from openm6.serve.teaching import Teaching

MOST_TEXTS = 256
COVERAGE = 0.8

# Longest first: pydantic takes what fits, and a mapping of numbers would fit a series' form otherwise.
# The first wrong item ends a list: one error for each of many would take longer than the answer.
NumberList = Annotated[list[float], Field(fail_fast=True)]
TextList = Annotated[list[str], Field(fail_fast=True)]
Value = str | Series | dict[str, float | None] | NumberList | TextList


class ScenarioBody(BaseModel):
    """`inputs` by name. Text is text; pictures and sounds are data URLs or base64; numbers are values by column;
    a series is {name, values}; candidates are a list of texts; boxes and stretches are lists of shares."""

    inputs: dict[str, Value] = Field(min_length=1, max_length=16)
    language: Literal["en", "zh"] = "en"
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)


class RankedCandidate(BaseModel):
    """A candidate; score is its log-likelihood a token, in nats."""

    index: int
    candidate: str
    score: float


class ScenarioAnswer(Energy, Teaching):
    """One of the fields after `gives` holds the answer: image is a data URL, audio base64 of a WAV file."""

    object: Literal["scenario.answer"] = "scenario.answer"
    model: str
    scenario: str
    language: str
    seed: int
    gives: str
    text: str | None = None
    image: str | None = None
    audio: str | None = None
    numbers: dict[str, Distribution] | None = None
    ranking: list[RankedCandidate] | None = None
    embedding: list[float] | None = None


def values_of(scenario: Scenario, inputs: dict[str, Value], limits: Limits) -> dict[str, Any]:
    """The inputs as `scenario_request` takes them: files unpacked, all within the limits.

    Raises:
        BadRequestError: a file is broken or too large, or there is too much of something.
    """
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        kind = scenario.inputs[name].kind if name in scenario.inputs else "text"
        param = f"inputs.{name}"
        if kind in ("image", "sound") and isinstance(value, str):
            found[name] = _file(value, kind, limits, param)
        elif isinstance(value, Series):
            found[name] = {"name": value.name, "values": value.values}
        else:
            found[name] = value
            _check_size(value, limits, param)
    return found


def _file(value: str, kind: str, limits: Limits, param: str) -> bytes:
    data = from_data_url(value, param) if value.startswith("data:") else from_base64(value, param)
    return check_picture(data, limits.pixels, param) if kind == "image" else data


def _check_size(value: Any, limits: Limits, param: str) -> None:
    if isinstance(value, str) and len(value) > limits.characters:
        raise BadRequestError(
            f"{param} holds {len(value)} characters, over {limits.characters}: cut it", param
        )
    if isinstance(value, dict) and len(value) > limits.columns:
        raise BadRequestError(f"{param} holds {len(value)} columns, over {limits.columns}: send fewer", param)
    if isinstance(value, list) and len(value) > min(limits.candidates, MOST_TEXTS):
        raise BadRequestError(
            f"{param} holds {len(value)} items, over {limits.candidates}: send fewer", param
        )
    if isinstance(value, list) and sum(len(str(item)) for item in value) > limits.characters:
        raise BadRequestError(f"{param} holds over {limits.characters} characters: shorten it", param)


def shown(scenario: Scenario, request: Request, answer: Answer, loaded: LoadedModel) -> dict[str, Any]:
    """The field of `ScenarioAnswer` that holds the answer; pictures and sounds are unpacked here."""
    value = answer.value
    if scenario.gives == "text":
        return {"text": value}
    if scenario.gives == "image":
        return {"image": as_data_url(write_picture(picture_of(request, value, loaded), "png"), "png")}
    if scenario.gives == "sound":
        return {"audio": base64.b64encode(write_sound(loaded.sound.decode(value), "wav")).decode()}
    if scenario.gives == "numbers":
        assert isinstance(request, NumbersRequest)
        return {"numbers": {request.series or request.columns[0]: described(value, COVERAGE)}}
    if scenario.gives == "embedding":
        return {"embedding": np.asarray(value).tolist()}
    return {"ranking": ranking_of(request, value)}


def picture_of(request: Request, codes: Any, loaded: LoadedModel) -> Any:
    """The drawn picture; where only a box was filled in, the given one around it, pixel by pixel."""
    drawn = loaded.image.decode(codes)
    if not isinstance(request, CodesRequest) or request.given is None or request.hole is None:
        return drawn
    width, height = read_image(request.given).size
    hole = hole_places(request.hole, height, width).reshape(height, width)
    return kept_outside(drawn, request.given, hole, loaded.image)


def ranking_of(request: Request, value: list[tuple[float, int]]) -> list[RankedCandidate]:
    """Candidates by log-likelihood a token, the likeliest first."""
    texts = getattr(request, "candidates", ())
    found = [
        RankedCandidate(index=index, candidate=texts[index], score=-nats / length)
        for index, (nats, length) in enumerate(value)
    ]
    return sorted(found, key=lambda ranked: (-ranked.score, ranked.index))
