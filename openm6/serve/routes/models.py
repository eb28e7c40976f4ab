"""`/v1/models`: the one model that is served."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from openm6.serve.errors import DOCUMENTED, ErrorBody
from openm6.serve.state import Server, ThisServer

router = APIRouter(prefix="/v1/models", tags=["models"], responses={401: DOCUMENTED[401]})


class Model(BaseModel):
    """A model and what it was taught."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "openm6"
    parameters: int
    tasks: list[str]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@router.get("")
async def list_models(server: ThisServer) -> ModelList:
    """All models: one."""
    return ModelList(data=[_described(server)])


@router.get("/{model}", responses={404: {"model": ErrorBody, "description": "No model is called so."}})
async def one_model(server: ThisServer, model: str) -> Model:
    """The model of this name."""
    if model != server.name:
        raise HTTPException(404, f"no model is called {model!r} here: use {server.name!r}")
    return _described(server)


def _described(server: Server) -> Model:
    loaded = server.engine.loaded
    tasks = sorted({lesson.task for lesson in loaded.description.lessons})
    return Model(
        id=server.name, created=server.created, parameters=loaded.omni.count_parameters()[0], tasks=tasks
    )
