"""What stands before every route: size of the body, keys, a number for each request, and strict JSON."""

from __future__ import annotations

import asyncio
import hmac
import json
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openm6.serve.errors import BadRequestError, LateBodyError, TooLargeError, error_of, error_response
from openm6.serve.state import Server

OPEN = ("/", "/health", "/ready")  # what a browser or a load balancer asks, without a key
PLAYGROUND = "/playground"  # asks for a key by itself: a browser cannot send one in a header


class Guard:
    """Pure ASGI: a middleware that wraps responses would hide from routes that their client has gone."""

    def __init__(
        self, app: ASGIApp, keys: tuple[str, ...], body_bytes: int, body_seconds: float = 60.0
    ) -> None:
        self.app = app
        self.keys = keys
        self.body_bytes = body_bytes
        self.body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def numbered(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", uuid.uuid4().hex.encode())]
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, numbered)
            return
        try:
            await self.app(scope, self._counted(receive), numbered)
        except (TooLargeError, LateBodyError) as error:
            if started:
                raise
            status, message, _, _ = error_of(error)
            await error_response(status, message)(scope, receive, numbered)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.body_bytes:
            return error_response(413, self._too_large_words)
        page = scope["path"] == PLAYGROUND or scope["path"].startswith(PLAYGROUND + "/")
        if not self.keys or scope["path"] in OPEN or page:
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        # Every key is compared, so that time tells nothing about which came close.
        fits = [hmac.compare_digest(given, key.encode()) for key in self.keys]
        if not any(fits):
            return error_response(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
        scope["openm6.client"] = f"key {fits.index(True)}"
        return None

    def _counted(self, receive: Receive) -> Receive:
        """Hands on the body while it is not too large and does not come too slowly."""
        read, whole = 0, False
        end = asyncio.get_running_loop().time() + self.body_seconds

        async def count() -> Message:
            nonlocal read, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise LateBodyError(
                    f"the body did not arrive within {self.body_seconds:g} seconds: send it faster"
                ) from None
            whole = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self.body_bytes:
                raise TooLargeError(self._too_large_words)
            return message

        return count

    @property
    def _too_large_words(self) -> str:
        return f"the body exceeds {self.body_bytes:,} bytes: send less"


class StrictRequest(Request):
    """JSON that is not too deep, holds finite numbers only and can be written as UTF-8 again."""

    async def json(self) -> Any:
        server = self.app.state.server
        assert isinstance(server, Server)
        limits = server.config.limits
        # In a thread: the event loop serves everyone else meanwhile.
        return await asyncio.to_thread(read_json, await self.body(), limits.json_depth, limits.json_values)


def read_json(body: bytes, depth: int, most: int) -> Any:
    """The value in a JSON text; `most` bounds its commas and brackets.

    These are counted before anything is parsed: the parser lets no other thread run until it is done. Pictures and
    sounds are base64, which holds none of them.

    Raises:
        BadRequestError: it is not JSON, too deep, of too many values, not Unicode, or holds NaN or infinity.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > most:
        raise BadRequestError(f"the JSON holds over {most:,} commas and brackets: send fewer values")
    try:
        value = json.loads(body, parse_constant=_not_finite)
    except RecursionError:
        raise BadRequestError(f"the JSON is nested deeper than {depth} levels: flatten it") from None
    except ValueError as error:  # UnicodeDecodeError among them
        raise BadRequestError(f"the body is not valid JSON: {_plain(error)}") from None
    _check(value, depth)
    return value


def _plain(error: ValueError) -> str:
    return f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else "not UTF-8"


def _not_finite(name: str) -> float:
    raise BadRequestError(f"the JSON holds {name}, which is no number: leave it out, or send null")


def _check(value: Any, depth: int) -> None:
    level = [value]
    for _ in range(depth + 1):
        texts = [item for item in level if isinstance(item, str)]
        texts += [key for item in level if isinstance(item, dict) for key in item]
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise BadRequestError("the JSON holds half of a surrogate pair: mend the text") from None
        if any(isinstance(item, float) and item in (float("inf"), float("-inf")) for item in level):
            raise BadRequestError("the JSON holds a number too large: send a smaller one")
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise BadRequestError(f"the JSON is nested deeper than {depth} levels: flatten it")


class StrictRoute(APIRoute):
    """Reads bodies by `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict
