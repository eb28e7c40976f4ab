"""What every route gets: the server with its counters, and the HTTP request whose answers it waits for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Annotated

from fastapi import Depends
from fastapi import Request as HTTPRequest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from openm6.inference.load import LoadedModel
from openm6.serve.config import Limits, ServeConfig
from openm6.serve.content import Fetcher
from openm6.serve.engine import Engine, cancel_all
from openm6.serve.errors import BadRequestError
from openm6.serve.requests import Answer, EngineUnavailableError, Request
from openm6.serve.scenarios.scenario import ScenarioLibrary, Scores, library_of
from openm6.serve.worker import RequestHandle

POLL_SECONDS = 0.25  # between checks whether the client is still connected
# Buckets of histograms.
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
JOULES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


class Metrics:
    """Counters for Prometheus in a registry of their own: responses, latencies, tokens, joules, and the queue."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter("openm6_requests", "Requests by kind and HTTP status", ("kind", "status"))
        self.tokens = counter("openm6_tokens", "Prompt tokens and generated tokens", ("direction",))
        self.seconds = histogram("openm6_request_seconds", "Time to the whole answer", ("kind",), buckets=SECONDS)
        self.first_token = histogram("openm6_first_token_seconds", "Time to the first token of a text", buckets=SECONDS)
        self.joules = histogram("openm6_request_joules", "Energy of a request", ("kind",), buckets=JOULES)
        gauge("openm6_queue_requests", "Requests that wait").set_function(lambda: len(engine.queue))
        gauge("openm6_queue_tokens", "Tokens of work that wait").set_function(lambda: engine.queue.work)

    def add(self, kind: str, answer: Answer) -> None:
        self.seconds.labels(kind).observe(answer.seconds)
        if answer.first_token_seconds:
            self.first_token.observe(answer.first_token_seconds)
        self.tokens.labels("prompt").inc(answer.usage.prompt)
        self.tokens.labels("generated").inc(answer.usage.generated)
        if answer.joules is not None:
            self.joules.labels(kind).observe(answer.joules)


@dataclass(frozen=True)
class Server:
    engine: Engine
    config: ServeConfig
    name: str
    metrics: Metrics
    fetcher: Fetcher
    scores: Scores = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def loaded(self) -> LoadedModel:
        return self.engine.loaded

    @cached_property
    def library(self) -> ScenarioLibrary:
        """The scenarios, those of the model's own tasks among them."""
        return library_of(self.loaded.description, self.loaded.checkpoint)

    @property
    def limits(self) -> Limits:
        return self.config.limits

    def check_model(self, name: str | None) -> None:
        """Raise BadRequestError if a request names another model than the one that is served."""
        if name not in (None, self.name, "default"):
            raise BadRequestError(f"no model is called {name!r} here: use {self.name!r}", "model")


@dataclass(frozen=True)
class Call:
    """One HTTP request to a server."""

    server: Server
    http: HTTPRequest

    async def submit(self, requests: Iterable[Request]) -> list[RequestHandle]:
        """Queue all requests, or none; raise as `Engine.ask_all`."""
        address = self.http.client.host if self.http.client else ""
        client = self.http.scope.get("openm6.client", address)  # the index of the API key if the server has keys
        return await self.server.engine.ask_all(requests, client, self.server.limits.seconds)

    async def answer(self, kind: str, requests: Sequence[Request]) -> list[Answer]:
        """Return all answers; if one fails or the client leaves, cancel what is left and raise OpenM6Error."""
        handles = await self.submit(requests)
        waiting = asyncio.gather(*(handle.answer() for handle in handles))
        try:
            while not (await asyncio.wait([waiting], timeout=POLL_SECONDS))[0]:
                if await self.http.is_disconnected():
                    raise EngineUnavailableError("the client has disconnected")
            answers = waiting.result()
        except BaseException:
            waiting.cancel()
            cancel_all(handles)
            raise
        for answer in answers:
            self.server.metrics.add(kind, answer)
        return answers


def server_of(http: HTTPRequest) -> Server:
    found = http.app.state.server
    assert isinstance(found, Server)
    return found


def _call(http: HTTPRequest) -> Call:
    return Call(server_of(http), http)


ThisServer = Annotated[Server, Depends(server_of)]
ThisCall = Annotated[Call, Depends(_call)]
