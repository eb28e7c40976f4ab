"""Where a server listens: taken addresses, public ones, and who sends its header too slowly."""

from __future__ import annotations

import asyncio
import socket

import pytest
from fastapi import FastAPI

from openm6.base.errors import ConfigError
from openm6.serve.config import Limits
from openm6.serve.run import HeaderTimeoutProtocol, address_of, bind, http_server, is_public


def test_an_address_that_is_taken_is_one_sentence() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert address_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be used .* another --port"):
            bind("127.0.0.1", port)


def test_an_address_of_another_machine_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="192.0.2.1:0 cannot be used"):
        bind("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="--host no.such.host.invalid cannot be used"):
        bind("no.such.host.invalid", 0)


def test_who_may_reach_it() -> None:
    for host, public in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        with bind(host, 0) as listener:
            assert is_public(listener) is public


@pytest.mark.parametrize("begun", [b"", b"GET /x HTTP/1.1\r\nhost: "])
def test_a_header_that_does_not_come_closes_the_connection(
    begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeaderTimeoutProtocol, "header_seconds", 0.05)

    async def send() -> bytes:
        with bind("127.0.0.1", 0) as listener:
            server = http_server(FastAPI(), Limits())
            running = asyncio.create_task(server._serve([listener]))
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            # A whole request first: the connection stays open for the next one.
            writer.write(b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n" + begun)
            found = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            server.should_exit = True
            await running
            return found

    assert b"404" in asyncio.run(send())


def test_bounds_are_handed_on() -> None:
    config = http_server(FastAPI(), Limits(connections=7, header_bytes=2048)).config
    assert (config.limit_concurrency, config.h11_max_incomplete_event_size) == (7, 2048)


def test_a_free_port_is_told() -> None:
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        assert listener.getsockname()[1] > 0
