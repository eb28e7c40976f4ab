"""Over HTTP: a client that leaves frees its slot, a full queue says when to come back, a deadline is kept."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from openm6.serve.config import EngineConfig, Limits, ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.requests import PreparedRequest
from openm6.serve.run import create_app
from openm6.serve.worker import RequestHandle, Worker
from tests.load.server import Address, Reply
from tests.serve.running import running
from tests.small_model import loaded

TICK = 0.02  # seconds: an answer of 200 tokens takes four
CHAT = "/v1/chat/completions"
Open = Callable[..., "Served"]


@dataclass
class Served:
    """A slow server, and what is at work in it."""

    address: Address
    engine: Engine
    workers: list[Worker] = field(default_factory=list)

    @property
    def live(self) -> list[RequestHandle]:
        return [handle for worker in self.workers[-1:] for handle in worker.active]

    def begin(self, stream: bool = False, **more: object) -> http.client.HTTPConnection:
        """Sends a request that takes seconds, and waits for nothing."""
        line = http.client.HTTPConnection("127.0.0.1", self.address.port, timeout=30)
        line.request("POST", CHAT, json.dumps(body(stream=stream, **more)), {"content-type": "application/json"})
        return line


def body(tokens: int = 200, **more: object) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": "draw the digit seven"}],
        "max_tokens": tokens,
        **more,
    }


def until(what: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens servers whose every tick takes a while."""
    open_ones = []
    workers: list[Worker] = []
    tick = Worker.tick

    def slow(worker: Worker) -> None:
        if worker not in workers:
            workers.append(worker)
        time.sleep(TICK)
        tick(worker)

    monkeypatch.setattr(Worker, "tick", slow)

    def opened(engine: EngineConfig, limits: Limits | None = None) -> Served:
        found = Engine(loaded(3), engine)
        app = create_app(found, ServeConfig(limits=limits or Limits()), "tiny")
        open_ones.append(running(app))
        port = int(open_ones[-1].__enter__().rpartition(":")[2])
        return Served(Address(port, os.getpid()), found, workers)

    yield opened
    for one in open_ones:
        one.__exit__(None, None, None)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_who_leaves_while_it_is_written_frees_the_slot(serve: Open, stream: bool) -> None:
    server = serve(EngineConfig(max_num_seqs=1, max_model_len=256))
    line = server.begin(stream)
    until(lambda: server.live)
    handle = server.live[0]
    if stream:
        assert line.getresponse().readline().startswith(b"data: {")
    line.close()
    until(lambda: not server.live, 2.0)
    assert handle.cancelled and handle.done
    assert server.address.post(CHAT, body(2)).status == 200, "the only slot is free again"
    status = f'{{kind="{CHAT}",status="{200 if stream else 499}"}}'.encode()
    until(lambda: status in server.address.send("GET", "/metrics").body)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_who_leaves_while_waiting_is_taken_out_of_the_line(serve: Open, stream: bool) -> None:
    server = serve(EngineConfig(max_num_seqs=1, max_model_len=256))
    first = server.begin()
    until(lambda: server.live)
    second = server.begin(stream)
    until(lambda: len(server.engine.queue) == 1)
    second.close()
    until(lambda: len(server.engine.queue) == 0, 2.0)
    assert len(server.live) == 1 and not server.live[0].cancelled
    first.close()


def test_who_leaves_while_an_image_is_generated_frees_the_slot(serve: Open) -> None:
    server = serve(EngineConfig(max_num_seqs=1, max_model_len=256, max_num_media=1))
    line = server.begin(stream=True, modalities=["image"], draw={"steps": 64})
    until(lambda: server.live)
    line.close()
    # The slot is free a moment after its request has left: its cache is cleared between the two.
    until(lambda: not server.live and server.workers[-1].free_slots == [0], 1.0)


def test_who_leaves_before_the_first_event_cancels_on_servers_that_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """From ASGI 2.4 on, `send` raises OSError once the client has left."""
    engine = Engine(loaded(3), EngineConfig(max_num_seqs=1, max_model_len=256))
    app, submit, handles = create_app(engine, name="tiny"), engine.submit, []

    def noted(prepared: list[PreparedRequest]) -> list[RequestHandle]:
        handles.extend(found := submit(prepared))
        return found

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body(stream=True)).encode()}

    async def send(_: Any) -> None:
        raise OSError

    monkeypatch.setattr(engine, "submit", noted)
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "POST", "path": CHAT, "query_string": b""}
    with engine, pytest.raises(ClientDisconnect):
        asyncio.run(app({**scope, "headers": [(b"content-type", b"application/json")]}, receive, send))
    assert [handle.cancelled for handle in handles] == [True]


def test_a_full_queue_says_when_to_come_back(serve: Open) -> None:
    server = serve(EngineConfig(max_num_seqs=1, max_model_len=256, max_queued_tokens=260))
    lines = [server.begin()]
    until(lambda: server.live)
    lines.append(server.begin())
    until(lambda: len(server.engine.queue) == 1)
    for more in ({}, {"stream": True}):
        refused = server.address.post(CHAT, body(**more))
        error = json.loads(refused.body)["error"]
        assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
        assert error["type"] == "rate_limit_error" and "try again" in error["message"]
    assert server.address.send("GET", "/health").status == 200
    for line in lines:
        line.close()


def test_a_deadline_is_kept_for_who_waits_and_for_who_is_written(serve: Open) -> None:
    server = serve(EngineConfig(max_num_seqs=1, max_model_len=256), Limits(seconds=0.5))
    replies: list[Reply] = []
    askers = [Thread(target=lambda: replies.append(server.address.post(CHAT, body()))) for _ in range(2)]
    began = time.monotonic()
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert time.monotonic() - began < 3
    for reply in replies:
        assert reply.status == 503 and reply.headers["retry-after"] == "1"
        assert "deadline passed" in json.loads(reply.body)["error"]["message"]
    until(lambda: not server.live and not len(server.engine.queue), 1.0)


def test_a_deadline_within_a_stream_is_an_event(serve: Open) -> None:
    server = serve(EngineConfig(max_num_seqs=1, max_model_len=256), Limits(seconds=0.5))
    reply = server.address.post(CHAT, body(stream=True))
    events = [json.loads(event[6:]) for event in reply.body.decode().split("\n\n") if event.startswith("data: {")]
    assert reply.status == 200 and events[-1]["error"]["code"] == "503"
