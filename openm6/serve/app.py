"""The HTTP API of one engine.

A request takes this way:

1. `HTTPMiddleware` (middleware.py) counts it and checks size, speed and API key; `StrictRequest` parses the JSON.
2. A route (routes/) checks the body by its schema, turns it into plain `Request` objects (requests.py; messages and
   media by content.py, named uses by scenarios/), and passes them to the engine through its `Call` (server.py).
3. `Engine.ask_all` (engine.py) prepares the tokens in threads of its own and queues a `RequestHandle` in a
   `FairQueue`. The engine's thread pops what fits and runs one tick after the other.
4. In a tick the `Worker` (worker.py) reads prompts, generates one token of every text, and runs one decoding step of
   images and audio, by the functions of openm6/inference. It writes what is new into the handle.
5. The handle wakes the route, which builds the response from the `Answer` (schemas.py), its joules included. Any
   `OpenM6Error` on the way becomes a status and one sentence in errors.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from openm6 import __version__
from openm6.core.errors import OpenM6Error
from openm6.serve.config import ServeConfig
from openm6.serve.content import Fetcher
from openm6.serve.engine import Engine
from openm6.serve.errors import ErrorBody, answer_failure
from openm6.serve.middleware import HTTPMiddleware
from openm6.serve.routes import chat, media, one_pass, scenarios, status
from openm6.serve.scenarios.scenario import read_scores
from openm6.serve.server import Metrics, Server

# A new route is a file in openm6/serve/routes and an entry here.
ROUTES = (status, chat, media, one_pass, scenarios)


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
        # Also keeps FastAPI's own form of errors (422) out of the document.
        responses={"4XX": {"model": ErrorBody, "description": "An error in OpenAI's form."}},
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
    for route in ROUTES:
        app.include_router(route.router)
    for kind in (OpenM6Error, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_failure)
    app.add_middleware(HTTPMiddleware, keys=config.keys, limits=limits, metrics=metrics)
    return app
