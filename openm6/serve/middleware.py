"""Around every route: counts, size and speed of the body, API keys, a request id, and strict JSON."""

from __future__ import annotations

import asyncio
import hmac
import json
import uuid
from collections.abc import Callable, Coroutine
from itertools import chain
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openm6.serve.config import Limits
from openm6.serve.errors import BadRequestError, Failure
from openm6.serve.server import Metrics, server_of

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

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", uuid.uuid4().hex.encode())]
                # Paths that do not exist share a label: a scan would fill the memory with labels.
                route = getattr(scope.get("route"), "path", "unknown")
                self.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        failure = self._check(scope)
        if failure is not None:
            await failure.response()(scope, receive, send_with_id)
        else:
            await self.app(scope, self._limited(receive), send_with_id)

    def _check(self, scope: Scope) -> Failure | None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.body_bytes:
            return Failure(413, self._too_large)
        page = scope["path"] == PLAYGROUND or scope["path"].startswith(PLAYGROUND + "/")
        if not self.keys or scope["path"] in OPEN or page:
            return None
        key = match_key(headers.get("authorization", "").removeprefix("Bearer "), self.keys)
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


class StrictRequest(Request):
    """JSON that is not too deep, holds finite numbers only and can be written as UTF-8 again."""

    async def json(self) -> Any:
        limits = server_of(self).limits
        # In a thread: the event loop serves everyone else meanwhile.
        return await asyncio.to_thread(read_json, await self.body(), limits.json_depth, limits.json_values)


class StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
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
