"""`/v1/scenarios`: what the model can be used for, and each use by its name."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from fastapi import Request as HTTPRequest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from openm6.serve.errors import DOCUMENTED, ErrorBody
from openm6.serve.guard import StrictRoute
from openm6.serve.replies import ask_all
from openm6.serve.scenarios.ask import scenario_request
from openm6.serve.scenarios.bodies import ScenarioAnswer, ScenarioBody, shown, values_of
from openm6.serve.scenarios.catalogue import read_catalogue, require, standing
from openm6.serve.scenarios.examples import example_fits, example_values
from openm6.serve.scenarios.scenario import LANGUAGES, Scenario
from openm6.serve.schemas import chosen_seed, joules_of
from openm6.serve.state import Server, ThisClient, ThisServer
from openm6.serve.teaching import teaching_of

CATALOGUE = read_catalogue()
MISSING: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "No scenario has this name."}
}

router = APIRouter(prefix="/v1/scenarios", tags=["scenarios"], route_class=StrictRoute)

Name = Annotated[str, Path(max_length=64)]


class Titles(BaseModel):
    """The same in English and Chinese."""

    en: str
    zh: str


class ScenarioInput(BaseModel):
    """One thing to give."""

    name: str
    kind: str
    title: Titles


class ScenarioEntry(BaseModel):
    """A scenario; where it is not `ready`, `state` says why, `needs` what the model lacks, `recipe` what teaches it."""

    id: str
    object: Literal["scenario"] = "scenario"
    domain: str
    title: Titles
    summary: Titles
    inputs: list[ScenarioInput]
    gives: str
    prompt: Titles
    tasks: list[str]
    recipe: str
    ready: bool
    needs: list[str]
    state: Titles


class OneScenario(ScenarioEntry):
    """`examples` are inputs ready to be sent, by language; without those that do not fit what the model was taught."""

    examples: dict[str, dict[str, Any]]


class ScenarioList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ScenarioEntry]


@router.get("", responses={401: DOCUMENTED[401]})
async def list_all(server: ThisServer) -> ScenarioList:
    """All scenarios, and which of them this model can do."""
    return ScenarioList(data=[_entry(server, scenario) for scenario in CATALOGUE.scenarios.values()])


@router.get("/{name}", responses={400: DOCUMENTED[400], 401: DOCUMENTED[401], **MISSING})
async def one(name: Name, server: ThisServer) -> OneScenario:
    """One scenario, with its examples."""
    scenario = _named(name)
    examples = await asyncio.to_thread(_examples, server, scenario)
    return OneScenario(**_entry(server, scenario).model_dump(), examples=examples)


@router.post("/{name}", responses={**DOCUMENTED, **MISSING})
async def answer(
    name: Name, body: ScenarioBody, server: ThisServer, client: ThisClient, http: HTTPRequest
) -> ScenarioAnswer:
    """Answers by a scenario; one whose tasks the model lacks answers 400 and says what would teach it."""
    scenario, loaded, limits = _named(name), server.engine.loaded, server.config.limits
    require(scenario, loaded.description)
    seed = chosen_seed(body.seed)
    values = values_of(scenario, body.inputs, limits)
    request = scenario_request(
        scenario, body.language, values, client=client, seconds=limits.seconds, seed=seed
    )
    answers = await ask_all(server, http, "scenarios", [request])
    field = await asyncio.to_thread(shown, scenario, request, answers[0], loaded)
    joules, source = joules_of(answers)
    taught, note = teaching_of([request], answers, loaded.description, body.language)
    return ScenarioAnswer(
        model=server.name,
        scenario=scenario.name,
        language=body.language,
        seed=seed,
        gives=scenario.gives,
        joules=joules,
        joules_source=source,
        taught=taught,
        note=note,
        **field,
    )


def _named(name: str) -> Scenario:
    found = CATALOGUE.scenarios.get(name)
    if found is None:
        raise HTTPException(404, f"no scenario is called {name!r}: GET /v1/scenarios lists them")
    return found


def _examples(server: Server, scenario: Scenario) -> dict[str, dict[str, Any]]:
    """Inputs as they are sent, pictures and sounds in base64."""
    description = server.engine.loaded.description
    return {
        language: {
            name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for name, value in example_values(scenario, language).items()
        }
        for language in LANGUAGES
        if example_fits(scenario, language, description)
    }


def _entry(server: Server, scenario: Scenario) -> ScenarioEntry:
    able = standing(scenario, server.engine.loaded.description, server.scores)
    inputs = [
        ScenarioInput(name=name, kind=given.kind, title=Titles(en=given.said("en"), zh=given.said("zh")))
        for name, given in scenario.inputs.items()
    ]
    return ScenarioEntry(
        id=scenario.name,
        domain=CATALOGUE.domain_of(scenario.name),
        title=Titles(**scenario.title.model_dump()),
        summary=Titles(**scenario.summary.model_dump()),
        inputs=inputs,
        gives=scenario.gives,
        prompt=Titles(**scenario.prompt.model_dump()),
        tasks=scenario.tasks,
        recipe=scenario.recipe,
        ready=able.ready,
        needs=list(able.missing),
        state=Titles(en=able.said("en"), zh=able.said("zh")),
    )
