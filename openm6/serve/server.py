"""What every route gets: the server, and the HTTP request whose answers it waits for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends
from fastapi import Request as HTTPRequest

from openm6.inference.load import LoadedModel
from openm6.serve.config import Limits, ServeConfig
from openm6.serve.engine import Engine, cancel_all
from openm6.serve.errors import BadRequestError
from openm6.serve.fetching import Fetcher
from openm6.serve.metrics import Metrics
from openm6.serve.requests import Answer, EngineUnavailableError, Request
from openm6.serve.scenarios.scenario import Scores
from openm6.serve.worker import RequestHandle

POLL_SECONDS = 0.25  # between checks whether the client is still connected


@dataclass(frozen=True)
class Server:
    """One model behind one address."""

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

    @property
    def client(self) -> str:
        """The index of the API key if keys are asked for, else the address."""
        key = self.http.scope.get("openm6.client")
        address = self.http.client.host if self.http.client else ""
        return key if isinstance(key, str) else address

    async def submit(self, requests: Iterable[Request]) -> list[RequestHandle]:
        """Queue all requests, or none; raise as `Engine.ask_all`."""
        return await self.server.engine.ask_all(requests, self.client, self.server.limits.seconds)

    async def answer(self, kind: str, requests: Sequence[Request]) -> list[Answer]:
        """Return the answers to requests; all are cancelled if one fails or the client leaves.

        Raises:
            OpenM6Error: one of them is refused or fails.
        """
        handles = await self.submit(requests)
        try:
            answers = await self._while_connected(handles)
        except BaseException:
            cancel_all(handles)
            raise
        for answer in answers:
            self.server.metrics.add(kind, answer)
        return answers

    async def _while_connected(self, handles: list[RequestHandle]) -> list[Answer]:
        waiting = asyncio.gather(*(handle.answer() for handle in handles))
        while True:
            done, _ = await asyncio.wait([waiting], timeout=POLL_SECONDS)
            if done:
                return waiting.result()
            if await self.http.is_disconnected():
                waiting.cancel()
                raise EngineUnavailableError("the client has disconnected")


def server_of(http: HTTPRequest) -> Server:
    """Return the server that an HTTP request reached."""
    found = http.app.state.server
    assert isinstance(found, Server)
    return found


def _call(http: HTTPRequest) -> Call:
    return Call(server_of(http), http)


ThisServer = Annotated[Server, Depends(server_of)]
ThisCall = Annotated[Call, Depends(_call)]
