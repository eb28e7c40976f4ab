"""Where a server listens: an address taken before anything is loaded, and deadlines for those who send slowly."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from openm6.base.errors import ConfigError
from openm6.serve.config import Limits

BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A socket that has this address to itself; port 0 takes a free one.

    Raises:
        ConfigError: the address is taken, not of this machine, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(
            f"--host {host} cannot be used ({error.strerror}): name an address of here"
        ) from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({error.strerror}): stop what uses it, or choose another --port"
        ) from None
    return found


def address_of(listener: socket.socket) -> str:
    """The URL of what listens there."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_public(listener: socket.socket) -> bool:
    """Whether other machines may reach it."""
    return not ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def http_server(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """uvicorn with bounds on connections, on the size of headers and on how slowly they may come."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            timeout_graceful_shutdown=5,
            http=PromptProtocol,
            limit_concurrency=limits.connections,
            h11_max_incomplete_event_size=limits.header_bytes,
        )
    )


class PromptProtocol(H11Protocol):
    """Closes a connection on which the header of a request does not arrive in time; uvicorn would wait for ever."""

    header_seconds = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Sets the clock while a header is awaited, and stops it once the header is whole."""
        if self.conn.their_state is not h11.IDLE:
            self._rest()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self.transport.close)

    def _rest(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
