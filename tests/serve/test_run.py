"""`openm6 serve` as a whole: what it prints, what it refuses, and how it ends when its engine does."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fastapi import FastAPI

from openm6.core.errors import ConfigError, EngineError
from openm6.serve.config import EngineConfig, Limits, ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.run import HeaderTimeoutProtocol, bind, create_app, http_server, serve
from openm6.serve.worker import Worker
from tests.serve.running import running
from tests.small_model import loaded

BODY = json.dumps({"model": "x", "messages": [{"role": "user", "content": "draw"}], "max_tokens": 3})
JSON = {"content-type": "application/json"}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("openm6"), "propagate", True)
    caplog.set_level(logging.INFO, "openm6")
    monkeypatch.setattr("openm6.serve.run.load", lambda *_, **__: loaded(3))
    return caplog


class Asker(threading.Thread):
    """Asks a server as soon as it answers, and keeps what it said."""

    def __init__(self, log: pytest.LogCaptureFixture, ask: Callable[[http.client.HTTPConnection], None]):
        super().__init__()
        self.log, self.ask = log, ask
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not (found := re.search(r"serving .* on http://127.0.0.1:(\d+)", self.log.text)):
                time.sleep(0.01)
            self.ask(http.client.HTTPConnection("127.0.0.1", int(found.group(1)), timeout=30))
        except BaseException as error:
            self.error = error


def failing(error: Exception) -> Callable[[Worker], None]:
    def tick(worker: Worker) -> None:
        if worker.active:
            raise error

    return tick


def config(**more: object) -> ServeConfig:
    return ServeConfig(port=0, engine=EngineConfig(max_num_seqs=2, max_model_len=64), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["a step", "the thread"])
def test_a_lost_device_ends_the_server_with_a_sentence(
    place: str, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "a step":
        lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

        def lose(*_: object) -> None:
            raise lost

        monkeypatch.setattr("openm6.serve.worker.prefill", lose)
    else:
        monkeypatch.setattr(Worker, "tick", failing(ValueError("out of luck")))
    said: list[tuple[int, str]] = []

    def ask(line: http.client.HTTPConnection) -> None:
        line.request("POST", "/v1/chat/completions", BODY.replace('"x"', '"default"'), JSON)
        reply = line.getresponse()
        said.append((reply.status, json.loads(reply.read())["error"]["message"]))

    asker = Asker(log, ask)
    asker.start()
    with pytest.raises(EngineError, match=r"the engine stopped \(.*: .*\): start the server again") as caught:
        serve(Path("runs/x"), config())
    asker.join()
    assert asker.error is None and "\n" not in str(caught.value)
    assert said[0][0] == 503 and "the engine stopped" in said[0][1]


def test_an_engine_that_cannot_start_is_an_error(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HTTP server ends by itself then, and would leave an exit code of 0."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nmore")

    monkeypatch.setattr("openm6.serve.engine.Worker", full)
    with pytest.raises(EngineError, match=r"the engine cannot start \(OutOfMemoryError: .*80 GiB\)$"):
        serve(Path("runs/x"), config())


def test_a_taken_port_is_said_before_anything_is_loaded(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openm6.serve.run.load", lambda *_, **__: pytest.fail("loaded"))
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="another --port"):
        serve(Path("runs/x"), ServeConfig(port=taken.getsockname()[1]))
    assert "serving" not in log.text


class NeverRun:
    """A server that is left at once: what is printed before is what counts."""

    def __init__(self, *_: object) -> None: ...

    def run(self, sockets: object) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [
        ("0.0.0.0", (), True),
        ("0.0.0.0", ("k",), False),
        ("127.0.0.1", (), False),
        ("localhost", (), False),
    ],
)
def test_an_open_server_is_warned_about(
    host: str,
    keys: tuple[str, ...],
    warned: bool,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("openm6.serve.run.http_server", NeverRun)
    serve(Path("runs/x"), config(host=host, keys=keys))
    lines = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    assert len(lines) == warned and all("upload files" in line and "--keys" in line for line in lines)


def with_playground(app: FastAPI) -> FastAPI:
    app.state.playground = True
    return app


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", r"127\.0\.0\.1"), ("::1", r"\[::1\]")])
def test_the_address_of_the_playground_is_printed(
    host: str, shown: str, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        bind(host, 0).close()
    except ConfigError:
        pytest.skip("this machine has no such address")
    monkeypatch.setattr("openm6.serve.run.http_server", NeverRun)
    serve(Path("runs/x"), config(host=host), configure_app=with_playground)
    assert re.search(rf"playground on http://{shown}:[1-9]\d*/playground", log.text)
    assert "no API keys" not in log.text


@pytest.mark.parametrize("playground", [True, False])
def test_the_bare_address_leads_on(playground: bool) -> None:
    """To the playground if there is one, else to links; no key is needed."""
    app = create_app(Engine(loaded(3), EngineConfig(max_num_seqs=1, max_model_len=64)), ServeConfig(keys=("k",)))
    with running(with_playground(app) if playground else app) as found:
        line = http.client.HTTPConnection("127.0.0.1", int(found.rpartition(":")[2]), timeout=30)
        line.request("GET", "/")
        reply = line.getresponse()
        content = reply.read()
        line.close()
    if playground:
        assert (reply.status, reply.getheader("location")) == (307, "/playground")
    else:
        assert reply.status == 200 and json.loads(content)["documentation"] == "/docs"


def test_an_address_that_is_taken_is_one_sentence() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be used .* another --port"):
            bind("127.0.0.1", port)


def test_an_address_of_another_machine_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="192.0.2.1:0 cannot be used"):
        bind("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="--host no.such.host.invalid cannot be used"):
        bind("no.such.host.invalid", 0)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_address_of_all_machines_in_ipv6_answers_ipv4_too() -> None:
    with bind("::", 0) as listener:
        socket.create_connection(("127.0.0.1", listener.getsockname()[1]), timeout=5).close()


def closed_after(first: bytes, rest: bytes) -> bytes:
    """What a server answers to the first bytes; it must close the connection although the rest begins something."""

    async def send() -> bytes:
        with bind("127.0.0.1", 0) as listener:
            server = http_server(FastAPI(), Limits())
            running = asyncio.create_task(server._serve([listener]))
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(first)
            found = await asyncio.wait_for(reader.readuntil(b"}"), 20)
            writer.write(rest)
            await asyncio.wait_for(reader.read(), 20)
            writer.close()
            server.should_exit = server.force_exit = True
            await running
            return found

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("length", "rest"),
    [(b"", b""), (b"", b"GET /x HTTP/1.1\r\nhost: "), (b"content-length: 2\r\n", b"x")],
    ids=["nothing", "half a header", "half a body that nobody waits for"],
)
def test_what_does_not_come_closes_the_connection(length: bytes, rest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeaderTimeoutProtocol, "header_seconds", 0.3)
    # A whole request first: the connection stays open for the next one.
    assert b"404" in closed_after(b"GET /nothing HTTP/1.1\r\nhost: x\r\n" + length + b"\r\n", rest)


def test_bounds_are_handed_on() -> None:
    config = http_server(FastAPI(), Limits(connections=7, header_bytes=2048)).config
    assert (config.limit_concurrency, config.h11_max_incomplete_event_size) == (
        8,
        2048,
    )  # uvicorn counts a new connection before it asks


def test_a_free_port_is_told() -> None:
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        assert listener.getsockname()[1] > 0
