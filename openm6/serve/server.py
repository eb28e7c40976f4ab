"""What every route gets: the server with its counters, and the HTTP request whose answers it waits for.

Around every route: counts, size and speed of the body, API keys, a request id, and strict JSON.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Annotated, Any

from fastapi import Depends, Response
from fastapi import Request as HTTPRequest
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openm6.inference.load import LoadedModel
from openm6.serve.config import Limits, ServeConfig
from openm6.serve.content import Fetcher
from openm6.serve.engine import Engine, cancel_all
from openm6.serve.errors import BadRequestError, Failure, NoModelError, failure_of
from openm6.serve.requests import Answer, Request
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
        """Raise NoModelError if a request names another model than the one that is served."""
        if name not in (None, self.name, "default"):
            raise NoModelError(f"no model is called {name!r} here: use {self.name!r}", "model")


@dataclass(frozen=True)
class Call:
    server: Server
    http: HTTPRequest

    async def submit(self, requests: Iterable[Request]) -> list[RequestHandle]:
        """Queue all requests, or none; raise as `Engine.ask_all`."""
        address = self.http.client.host if self.http.client else ""
        client = self.http.scope.get("openm6.client", address)  # the index of the API key if the server has keys
        return await self.server.engine.ask_all(requests, client, self.server.limits.seconds)

    async def answer(self, kind: str, requests: Sequence[Request]) -> list[Answer]:
        """Return all answers; if one fails (OpenM6Error) or the client leaves (HTTPException), cancel what is left."""
        handles = await self.submit(requests)
        waiting = asyncio.gather(*(handle.answer() for handle in handles))
        try:
            while not (await asyncio.wait([waiting], timeout=POLL_SECONDS))[0]:
                if await self.http.is_disconnected():
                    raise HTTPException(499, "the client has disconnected")  # a status for the metrics alone
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


OPEN = ("/", "/health", "/ready")  # requested by a browser or a load balancer, without a key
PLAYGROUND = "/playground"  # has a login of its own: a browser cannot send a key in a header


def match_key(candidate: str, keys: tuple[str, ...]) -> int | None:
    """Return the index of an API key; all are compared, so that the time does not depend on which came close."""
    matches = [hmac.compare_digest(candidate.encode(), key.encode()) for key in keys]
    return matches.index(True) if any(matches) else None


class HTTPMiddleware:
    """Counts and checks requests. Pure ASGI, so that routes notice when their client has disconnected."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], limits: Limits, metrics: Metrics) -> None:
        self.app, self.keys, self.limits, self.metrics = app, keys, limits, metrics
        self._too_large = f"the body exceeds {limits.body_bytes:,} bytes: send less"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", uuid.uuid4().hex.encode())]
                # Paths that do not exist share a label: a scan would fill the memory with labels.
                route = getattr(scope.get("route"), "path", "unknown")
                self.metrics.requests.labels(route, str(message["status"])).inc()
                started = True
            await send(message)

        failure = self._check(scope)
        if failure is not None:
            await failure.response()(scope, receive, send_with_id)
            return
        try:
            await self.app(scope, self._limited(receive), send_with_id)
        except Exception as error:
            if started:
                raise
            await failure_of(error).response()(scope, receive, send_with_id)

    def _check(self, scope: Scope) -> Failure | None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.body_bytes:
            return Failure(413, self._too_large)
        page = scope["path"] == PLAYGROUND or scope["path"].startswith(PLAYGROUND + "/")
        if page and "/file=http" in scope["path"].lower():
            return Failure(404, "addresses are not fetched: upload the file")
        if not self.keys or scope["path"] in OPEN or page:
            return None
        given = headers.get("authorization", "")
        scheme, _, rest = given.partition(" ")
        key = match_key(rest.strip() if scheme.lower() == "bearer" else given, self.keys)
        if key is None:
            return Failure(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
        scope["openm6.client"] = f"key {key}"
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Pass the body on while it is not too large and not too slow."""
        size, complete = 0, False
        end = asyncio.get_running_loop().time() + self.limits.body_seconds

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                sentence = f"the body did not arrive within {self.limits.body_seconds:g} seconds: send it faster"
                raise HTTPException(408, sentence) from None
            complete = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self.limits.body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return limited


class StrictRequest(HTTPRequest):
    """JSON that is not too deep, holds finite numbers only and can be written as UTF-8 again."""

    async def json(self) -> Any:
        limits = server_of(self).limits
        # In a thread: the event loop serves everyone else meanwhile.
        return await asyncio.to_thread(read_json, await self.body(), limits.json_depth, limits.json_values)


class StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[HTTPRequest], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: HTTPRequest) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def read_json(body: bytes, max_depth: int, max_values: int) -> Any:
    """Return the value in a JSON text; raise BadRequestError if it is broken, too deep, or not finite or Unicode.

    `max_values` bounds its commas and brackets, which are counted before anything is parsed: the parser lets no other
    thread run until it is done. Images and audio are base64, which holds none of them.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > max_values:
        raise BadRequestError(f"the JSON holds over {max_values:,} commas and brackets: send fewer values")
    try:
        value = json.loads(body, parse_constant=_not_finite)
        level = [value]  # the values at one depth
        for _ in range(max_depth + 1):
            inner = [list(x.values()) if isinstance(x, dict) else x for x in level if isinstance(x, (dict, list))]
            level = list(chain.from_iterable(inner))
        if level:
            raise RecursionError  # as the parser does
    except RecursionError:
        raise BadRequestError(f"the JSON is nested deeper than {max_depth} levels: flatten it") from None
    except json.JSONDecodeError as error:
        raise BadRequestError(f"the body is not valid JSON: {error.msg} at character {error.pos}") from None
    except ValueError:
        raise BadRequestError("the body is not valid JSON: not UTF-8, or an integer too long") from None
    # It must be possible to write it as JSON again: answers and errors quote it.
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise BadRequestError("the JSON holds half of a surrogate pair: fix the text") from None
    except ValueError:
        raise BadRequestError("the JSON holds a number too large: send a smaller one") from None
    return value


def _not_finite(name: str) -> float:
    raise BadRequestError(f"the JSON holds {name}, which is no number: leave it out, or send null")
