"""The HTTP API: one list of routers around one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI

from openm6 import __version__
from openm6.serve.config import ServeConfig
from openm6.serve.counting import Counting
from openm6.serve.engine import Engine
from openm6.serve.errors import add_error_handlers
from openm6.serve.fetching import Fetcher
from openm6.serve.guard import Guard
from openm6.serve.metrics import Metrics
from openm6.serve.routes import (
    audio,
    chat,
    embeddings,
    health,
    images,
    index,
    models,
    predict,
    rank,
    scenarios,
)
from openm6.serve.scenarios.scores import read_scores
from openm6.serve.state import Server

# A new route is a file in openm6/serve/routes and a line here.
ROUTERS: tuple[APIRouter, ...] = (
    models.router,
    chat.router,
    images.router,
    audio.router,
    embeddings.router,
    predict.router,
    rank.router,
    scenarios.router,
    health.router,
    index.router,
)


def create_app(engine: Engine, config: ServeConfig | None = None, name: str = "openm6") -> FastAPI:
    """The API of one engine, which lives as long as the app does; `name` is what clients call the model."""
    config = config or ServeConfig()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with engine:
            yield

    app = FastAPI(
        title="OpenM6",
        version=__version__,
        description="Text, pictures, sound and numbers in and out of one model, in OpenAI's forms.",
        lifespan=lifespan,
    )
    metrics = Metrics(engine)
    limits = config.limits
    fetcher = Fetcher(config.hosts, limits.fetch_bytes, limits.fetch_seconds)
    app.state.server = Server(
        engine=engine,
        config=config,
        name=name,
        metrics=metrics,
        fetcher=fetcher,
        scores=read_scores(engine.loaded.checkpoint),
    )
    for router in ROUTERS:
        app.include_router(router)
    add_error_handlers(app)
    # The last added is the outermost: what the guard refuses is counted, too.
    app.add_middleware(
        Guard, keys=config.keys, body_bytes=limits.body_bytes, body_seconds=limits.body_seconds
    )
    app.add_middleware(Counting, metrics=metrics)
    _describe_errors(app)
    return app


def _describe_errors(app: FastAPI) -> None:
    """Takes FastAPI's own form of errors (422) out of the document: ours answers 400."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = original()
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
