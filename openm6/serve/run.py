"""The HTTP API of one engine, and `openm6 serve`: a checkpoint behind an address.

A request takes this way:

1. `HTTPMiddleware` (server.py) counts it and checks size, speed and API key; `StrictRequest` parses the JSON.
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

import asyncio
import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from openm6 import __version__
from openm6.core.config import apply_overrides, build
from openm6.core.errors import ConfigError, EngineError, OpenM6Error
from openm6.core.log import get_log
from openm6.hub.find import find_model
from openm6.inference.load import load
from openm6.serve.config import Limits, ServeConfig
from openm6.serve.content import Fetcher
from openm6.serve.engine import Engine
from openm6.serve.errors import ErrorBody, answer_failure
from openm6.serve.routes import chat, media, one_pass, scenarios, status
from openm6.serve.scenarios.scenario import read_scores
from openm6.serve.server import PLAYGROUND, HTTPMiddleware, Metrics, Server

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
        fetcher=Fetcher(config.hosts, limits.parts, limits.fetch_bytes, limits.fetch_seconds),
        scores=read_scores(engine.loaded.checkpoint),
    )
    for route in ROUTES:
        app.include_router(route.router)
    for kind in (OpenM6Error, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_failure)
    app.add_middleware(HTTPMiddleware, keys=config.keys, limits=limits, metrics=metrics)
    return app


KEY_VARIABLE = "OPENM6_API_KEYS"
BACKLOG = 2048


def read_serve_config(settings: list[str], keys: Path | None = None) -> ServeConfig:
    """Return settings from `key=value` words, API keys from a file (by lines) or OPENM6_API_KEYS (by commas)."""
    values: dict[str, Any] = apply_overrides({}, settings)
    found = [key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(",") if key.strip()]
    if keys is not None:
        try:
            found = [line.strip() for line in keys.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the keys in {keys} cannot be read: {error}") from None
        if not found:
            raise ConfigError(f"{keys} holds no key: write one on each line")
    given = values.get("keys") or []
    if not isinstance(given, list):  # the letters of a text would each be a key
        raise ConfigError("keys is a list: write keys=[one,two], or use --keys FILE")
    return build(ServeConfig, {**values, "keys": [*given, *found]}, "serve")


def serve(
    trained: Path | str,
    config: ServeConfig,
    name: str | None = None,
    configure_app: Callable[[FastAPI], FastAPI] = lambda app: app,
) -> None:
    """Serve a model (a folder or name) until it is interrupted; `configure_app` may add to the app, as the playground.

    Raise CheckpointError without a model, ConfigError for an address, EngineError if the engine fails.
    """
    with bind(config.host, config.port) as listener:
        host, port = listener.getsockname()[:2]
        warn_without_keys(config)
        folder = find_model(trained)
        engine = Engine(load(folder, config.engine.device, config.engine.num_gpu_layers), config.engine)
        app = configure_app(create_app(engine, config, name or folder.resolve().name))
        server = http_server(app, config.limits)
        engine.on_failure = partial(setattr, server, "should_exit", True)
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        get_log().info(f"serving {trained} on {address}/docs")
        if getattr(app.state, "playground", False):
            get_log().info(f"playground on {address}{PLAYGROUND}")
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        except SystemExit:  # of uvicorn, if the engine cannot start
            if engine.failure is None:
                raise
    if engine.failure is not None:
        raise EngineError(engine.failure)


def warn_without_keys(config: ServeConfig) -> None:
    """Warn if an address that others may reach needs no API key."""
    number = str(_resolved(config.host, config.port)[1][0])
    if not (config.keys or ipaddress.ip_address(number.partition("%")[0]).is_loopback):
        get_log().warning(
            f"no API keys: whoever reaches {config.host} may ask the model, open the page and upload files; "
            f"set {KEY_VARIABLE} or --keys"
        )


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has this address to itself (port 0: a free one); raise ConfigError if it cannot be used."""
    family, address = _resolved(host, port)
    try:
        # At :: it answers IPv4, too.
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=dual)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        sentence = f"{host}:{port} cannot be used ({reason}): stop what uses it, or choose another --port"
        raise ConfigError(sentence) from None


def _resolved(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no name"
        sentence = f"--host {host} cannot be used ({reason}): name an address of this machine"
        raise ConfigError(sentence) from None
    return family, address


def http_server(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """Return uvicorn with limits on connections, and on the size and the slowness of headers."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            timeout_graceful_shutdown=5,
            http=HeaderTimeoutProtocol,
            limit_concurrency=limits.connections + 1,  # uvicorn counts the new one as well
            h11_max_incomplete_event_size=limits.header_bytes,
        )
    )


class HeaderTimeoutProtocol(H11Protocol):
    """Closes a connection on which the header of a request does not arrive in time; uvicorn would wait for ever."""

    header_seconds = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_deadline()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        super().connection_lost(exc)

    def _update_deadline(self) -> None:
        """Set the deadline while a header is awaited, or a body that nobody needs, and clear it otherwise."""
        # Answered before its body was there: nobody waits for the rest any more.
        is_unread = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if self.conn.their_state is not h11.IDLE and not is_unread:
            self._clear_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self.transport.close)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
