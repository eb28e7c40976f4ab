"""`/v1/scenarios`: what the model can be used for, and each use by its name."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Path
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from openm6.core.errors import ConfigError
from openm6.inference.engine import RankedText
from openm6.inference.load import LoadedModel
from openm6.serve import content, schemas
from openm6.serve.config import Limits
from openm6.serve.errors import DOCUMENTED, ErrorBody, check_limit
from openm6.serve.requests import Answer, CodesRequest, EmbedRequest, NumbersRequest, RankRequest, Request, decode_codes
from openm6.serve.scenarios.run import example_fits, example_values, scenario_request
from openm6.serve.scenarios.scenario import LANGUAGES, Bilingual, Language, Scenario, readiness
from openm6.serve.server import Server, StrictRoute, ThisCall, ThisServer

COVERAGE = 0.8
MISSING: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "No scenario has this name."}}

router = APIRouter(prefix="/v1/scenarios", tags=["scenarios"], route_class=StrictRoute)

Name = Annotated[str, Path(max_length=64)]
# Longest first: pydantic takes what fits, and a mapping of numbers would fit a series' form otherwise.
# The first wrong item ends a list: one error for each of many would take longer than the answer.
NumberList = Annotated[list[float], Field(fail_fast=True)]
TextList = Annotated[list[str], Field(fail_fast=True)]
Value = str | content.Series | dict[content.ColumnName, content.Cell] | NumberList | TextList


class ScenarioInput(BaseModel):
    """One input."""

    name: str
    kind: str
    title: Bilingual


class ScenarioEntry(BaseModel):
    """A scenario; if it is not `ready`, `state` is the reason, `needs` what it lacks, and `recipe` trains it."""

    id: str
    object: Literal["scenario"] = "scenario"
    domain: str
    title: Bilingual
    summary: Bilingual
    inputs: list[ScenarioInput]
    output: str
    prompt: Bilingual
    tasks: list[str]
    recipe: str
    ready: bool
    needs: list[str]
    state: Bilingual


class OneScenario(ScenarioEntry):
    """`examples` are inputs to send, by language; without those that do not fit the model's training data."""

    examples: dict[str, dict[str, Any]]


class ScenarioList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ScenarioEntry]


class ScenarioBody(BaseModel):
    """`inputs` by name. Text is text; images and audio are data URLs or base64; numbers are values by column;
    a series is {name, values}; candidates are a list of texts; boxes and spans are lists of fractions."""

    inputs: dict[Annotated[str, Field(max_length=64)], Value] = Field(min_length=1, max_length=16)
    language: Language = "en"
    seed: schemas.Seed = None


class ScenarioAnswer(schemas.CoveredReply):
    """One of the fields after `output` holds the answer: image is a data URL, audio base64 of a WAV file."""

    object: Literal["scenario.answer"] = "scenario.answer"
    model: str
    scenario: str
    language: str
    seed: int
    output: str
    text: str | None = None
    image: str | None = None
    audio: str | None = None
    numbers: dict[str, schemas.Distribution] | None = None
    ranking: list[RankedText] | None = None
    embedding: list[float] | None = None


@router.get("", responses={401: DOCUMENTED[401]})
async def list_all(server: ThisServer) -> ScenarioList:
    """All scenarios, and which of them this model can do."""
    return ScenarioList(data=[ScenarioEntry(**_entry(server, one)) for one in server.library.scenarios.values()])


@router.get("/{name}", responses={400: DOCUMENTED[400], 401: DOCUMENTED[401], **MISSING})
async def one(name: Name, server: ThisServer) -> OneScenario:
    """One scenario, with its examples."""
    scenario = _named(server, name)
    examples = await asyncio.to_thread(_examples, server, scenario)
    return OneScenario(**_entry(server, scenario), examples=examples)


@router.post("/{name}", responses={**DOCUMENTED, **MISSING})
async def answer(name: Name, body: ScenarioBody, call: ThisCall) -> ScenarioAnswer:
    """Answers by a scenario; one whose tasks the model lacks returns 400 and names the recipe that trains them."""
    scenario, loaded = _named(call.server, name), call.server.loaded
    able = readiness(scenario, loaded.description)
    if not able.trained:
        raise ConfigError(f"scenario {scenario.name} {able.text()}: train it, or choose another scenario")
    seed = schemas.chosen_seed(body.seed)
    limits = call.server.limits
    values = await asyncio.to_thread(input_values, scenario, body.inputs, limits)
    request = scenario_request(scenario, body.language, values, seed, limits.tokens)
    answers = await call.answer("scenarios", [request])
    found = await asyncio.to_thread(decoded, request, answers[0], loaded)
    if "image" in found:
        found["image"] = await asyncio.to_thread(content.image_data_url, found["image"])
    if "audio" in found:
        found["audio"] = base64.b64encode(await asyncio.to_thread(content.audio_file, found["audio"], "wav")).decode()
    reply = ScenarioAnswer(
        model=call.server.name,
        scenario=scenario.name,
        language=body.language,
        seed=seed,
        output=scenario.output,
        **found,
    )
    return reply.with_coverage([request], answers, loaded.description, body.language)


def _named(server: Server, name: str) -> Scenario:
    found = server.library.scenarios.get(name)
    if found is None:
        raise HTTPException(404, f"no scenario is called {name!r}: GET /v1/scenarios lists them")
    return found


def _entry(server: Server, scenario: Scenario) -> dict[str, Any]:
    found = readiness(scenario, server.loaded.description, server.scores)
    return {
        **scenario.model_dump(include={"title", "summary", "output", "prompt", "tasks", "recipe"}),
        "id": scenario.name,
        "domain": server.library.domain_of[scenario.name],
        "inputs": [
            ScenarioInput(name=name, kind=given.kind, title=given.label) for name, given in scenario.inputs.items()
        ],
        "ready": found.ready,
        "needs": list(found.missing),
        "state": Bilingual(en=found.text("en"), zh=found.text("zh")),
    }


def _examples(server: Server, scenario: Scenario) -> dict[str, dict[str, Any]]:
    """Inputs as they are sent, images and audio in base64."""
    return {
        language: {
            name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for name, value in example_values(scenario, language).items()
        }
        for language in LANGUAGES
        if example_fits(scenario, language, server.loaded.description)
    }


def input_values(scenario: Scenario, inputs: dict[str, Value], limits: Limits) -> dict[str, Any]:
    """Return the inputs with files decoded; raise BadRequestError if one is broken, or exceeds its limit."""
    found: dict[str, Any] = dict(inputs)
    for name, value in inputs.items():
        kind = scenario.inputs[name].kind if name in scenario.inputs else "text"
        param = f"inputs.{name}"
        if isinstance(value, content.Series):
            found[name] = value.model_dump()
        elif kind in content.CHECKS and isinstance(value, str):
            decode = content.decode_data_url if value.startswith("data:") else content.decode_base64
            found[name] = content.CHECKS[kind](decode(value, param), limits, param)
        else:
            check_size(param, value, limits)
    return found


def check_size(param: str, value: Any, limits: Limits) -> None:
    """Raise BadRequestError if a text, a list or columns exceed their limit."""
    if isinstance(value, dict):
        check_limit(param, len(value), limits.columns, "columns")
    elif isinstance(value, list):
        check_limit(param, len(value), limits.candidates, "items")
        check_limit(param, sum(len(str(item)) for item in value), limits.characters, "characters")
    else:
        check_limit(param, len(value), limits.characters, "characters")


def decoded(request: Request, answer: Answer, loaded: LoadedModel) -> dict[str, Any]:
    """Return an answer under the name of its field in `ScenarioAnswer`, images and audio as pixels and samples."""
    value = answer.value
    match request:
        case CodesRequest():
            return {request.modality: decode_codes(request, value, loaded)}
        case NumbersRequest():
            return {"numbers": {request.name: schemas.distribution_of(value, COVERAGE)}}
        case RankRequest():
            return {"ranking": schemas.rank_candidates(request.candidates, value)}
        case EmbedRequest():
            return {"embedding": np.asarray(value).tolist()}
    return {"text": value}
