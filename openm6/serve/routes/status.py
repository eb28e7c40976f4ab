"""The server itself: `/v1/models`, `/health`, `/ready`, `/metrics`, and `/` with links to the rest."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from prometheus_client import generate_latest
from pydantic import BaseModel

from openm6.serve.errors import DOCUMENTED
from openm6.serve.server import PLAYGROUND, ThisServer

router = APIRouter()

LINKS = {"documentation": "/docs", "models": "/v1/models", "health": "/health", "ready": "/ready"}
KEYED: dict[int | str, dict[str, Any]] = {401: DOCUMENTED[401]}


class Model(BaseModel):
    """A model and the tasks that it was trained on."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "openm6"
    parameters: int
    tasks: list[str]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """`ok` while the process answers at all."""

    status: Literal["ok"] = "ok"
    waiting: int


@router.get("/v1/models", tags=["models"], responses=KEYED)
async def list_models(server: ThisServer) -> ModelList:
    """All models: one."""
    return ModelList(data=[await one_model(server, server.name)])


@router.get("/v1/models/{model:path}", tags=["models"], responses=KEYED | {404: DOCUMENTED[404]})
async def one_model(server: ThisServer, model: str) -> Model:
    """The model of this name."""
    server.check_model(model)
    return Model(
        id=server.name,
        created=server.created,
        parameters=server.loaded.omni.count_parameters()[0],
        tasks=sorted({trained_task.task for trained_task in server.loaded.description.trained_tasks}),
    )


@router.get("/health", tags=["state"])
async def health(server: ThisServer) -> Health:
    """Whether the server is alive, and how many requests wait."""
    return Health(waiting=len(server.engine.queue))


@router.get("/ready", tags=["state"], responses={503: DOCUMENTED[503]})
async def ready(server: ThisServer) -> Health:
    """Whether the engine accepts requests; 503 if it does not."""
    if not server.engine.ready:
        raise server.engine.unavailable
    return Health(waiting=len(server.engine.queue))


@router.get("/metrics", tags=["state"], response_class=PlainTextResponse, responses=KEYED)
async def metrics(server: ThisServer) -> Response:
    """Counters in Prometheus' text format."""
    page = generate_latest(server.metrics.registry)
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def index(http: Request) -> Response:
    """The playground if there is one, else a few links."""
    if getattr(http.app.state, "playground", False):
        return RedirectResponse(PLAYGROUND)
    return JSONResponse({"name": http.app.title, "version": http.app.version, **LINKS})
