"""The HTTP API of one engine.

A request takes this way:

1. `MetricsMiddleware` (metrics.py) counts it; `GuardMiddleware` (middleware.py) checks size, speed and API key;
   `StrictRequest` parses the JSON in a thread.
2. A route (routes/) checks the body by its schema and turns it into plain `Request` objects (requests.py): messages
   and media by content.py, named uses by scenarios/.
3. `Call.answer` (server.py) gives them to `Engine.ask` (engine.py), which prepares the tokens in threads of its own and
   pushes a `RequestHandle` into the `FairQueue` (queue.py).
4. The engine's thread pops what fits and lets the `Worker` (worker.py) run one tick after the other: prompts are read,
   every text gets a token, images and audio a decoding step. The decoding itself is openm6/inference.
5. The handle wakes the route, which builds the response from the `Answer` (schemas.py), its joules included. Any
   `OpenM6Error` on the way becomes a status and one sentence in errors.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI

from openm6 import __version__
from openm6.serve.config import ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.errors import add_error_handlers
from openm6.serve.fetching import Fetcher
from openm6.serve.metrics import Metrics, MetricsMiddleware
from openm6.serve.middleware import GuardMiddleware
from openm6.serve.routes import audio, chat, images, predict, retrieval, scenarios, status
from openm6.serve.scenarios.scenario import read_scores
from openm6.serve.server import Server

# A new route is a file in openm6/serve/routes and an entry here.
ROUTERS: tuple[APIRouter, ...] = (
    status.router,
    chat.router,
    images.router,
    audio.router,
    retrieval.router,
    predict.router,
    scenarios.router,
)


def create_app(engine: Engine, config: ServeConfig | None = None, name: str = "openm6") -> FastAPI:
    """Return the API of an engine, which runs as long as the app; `name` is what clients call the model."""
    config = config or ServeConfig()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with engine:
            yield

    app = FastAPI(
        title="OpenM6",
        version=__version__,
        description="Text, images, audio and numbers in and out of one model, in OpenAI's forms.",
        lifespan=lifespan,
    )
    limits = config.limits
    app.state.server = Server(
        engine=engine,
        config=config,
        name=name,
        metrics=(metrics := Metrics(engine)),
        fetcher=Fetcher(config.hosts, limits.fetch_bytes, limits.fetch_seconds),
        scores=read_scores(engine.loaded.checkpoint),
    )
    for router in ROUTERS:
        app.include_router(router)
    add_error_handlers(app)
    # The last added is the outermost: what the guard refuses is counted, too.
    app.add_middleware(GuardMiddleware, keys=config.keys, limits=limits)
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    _document_errors(app)
    return app


def _document_errors(app: FastAPI) -> None:
    """Take FastAPI's own form of errors (422) out of the OpenAPI document: ours answers 400."""
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
