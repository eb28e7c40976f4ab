"""Each bound of a request, one by one: what exceeds it is refused with its field before any work is done."""

from __future__ import annotations

import base64
import http.client
import json
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from openm6.serve.app import create_app
from openm6.serve.config import EngineConfig, Limits, ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.run import read_serve_config
from tests.data.sample_images import png
from tests.load.server import Address, form
from tests.serve.running import running
from tests.small_model import loaded

CHAT = "/v1/chat/completions"
FEW = Limits(
    body_bytes=50_000,
    messages=2,
    parts=3,
    tokens=8,
    answers=2,
    columns=2,
    rows=2,
    candidates=2,
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(loaded(3), EngineConfig(max_num_seqs=2, max_model_len=256))


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[Address]:
    with running(create_app(engine, ServeConfig(limits=FEW), "tiny")) as found:
        yield Address(int(found.rpartition(":")[2]), os.getpid())


def chat(content: Any = "a", turns: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "max_tokens": 2,
        "messages": [{"role": "user", "content": content}] * turns,
        **more,
    }


def audio(data: bytes) -> list[dict[str, Any]]:
    given = {"data": base64.b64encode(data).decode(), "format": "wav"}
    return [{"type": "input_audio", "input_audio": given}]


def wav_that_claims(size: int) -> bytes:
    """A header of a WAV file that promises `size` bytes, and none of them."""
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", size, b"WAVE") + layout + struct.pack("<4sI", b"data", size)


IMAGE = {
    "type": "image_url",
    "image_url": {"url": "data:image/png;base64," + base64.b64encode(png("red", 8)).decode()},
}
OVER: dict[str, tuple[str, dict[str, Any], str]] = {
    "messages": (CHAT, chat(turns=3), "messages"),
    "parts": (CHAT, chat([IMAGE] * 4), "parts"),
    "tokens": (CHAT, chat(max_tokens=9), "max_tokens=9"),
    "answers": (CHAT, chat(n=3), "n"),
    "stops": (CHAT, chat(stop=["a", "b", "c", "d", "e"]), "stop"),
    "columns": (
        CHAT,
        chat([{"type": "numbers", "numbers": dict.fromkeys(("mass", "length", "x"), 1.0)}]),
        "columns",
    ),
    "rows": ("/v1/predict", {"rows": [{"mass": None, "length": 1.0}] * 3}, "rows"),
    "candidates": ("/v1/rank", {"query": "a", "candidates": ["a", "b", "c"]}, "candidates"),
    "images": ("/v1/images/generations", {"prompt": "a", "n": 3}, "n=3"),
    "an audio clip that lies": (CHAT, chat(audio(wav_that_claims(4_000_000_000))), "the audio is empty"),
    "an audio clip of nothing": (CHAT, chat(audio(wav_that_claims(0))), "audio"),
}


@pytest.mark.parametrize(("path", "body", "named"), OVER.values(), ids=OVER)
def test_what_exceeds_a_bound_is_one_sentence(
    address: Address, engine: Engine, path: str, body: dict[str, Any], named: str
) -> None:
    reply = address.post(path, body)
    error = json.loads(reply.body)["error"]
    assert reply.status == 400 and named in error["message"] and "\n" not in error["message"]
    assert len(engine.queue) == 0


def test_a_body_without_a_length_is_counted_as_it_comes(address: Address) -> None:
    line = http.client.HTTPConnection("127.0.0.1", address.port, timeout=30)
    line.putrequest("POST", CHAT)
    line.putheader("content-type", "application/json")
    line.putheader("transfer-encoding", "chunked")
    line.endheaders()
    # Nothing is sent after the block that exceeds the limit: the server would close the connection on it.
    for _ in range(6):
        line.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
    reply = line.getresponse()
    assert reply.status == 413 and b"exceeds 50,000 bytes" in reply.read()
    line.close()


def test_a_name_of_an_upload_reaches_no_file(address: Address) -> None:
    for name in ("../../../etc/passwd", "/etc/passwd", "\\\\host\\share", "a\x00b"):
        body, kind = form({"prompt": "x", "steps": "1"}, {"image": (name, png("red", 40))})
        reply = address.send("POST", "/v1/images/edits", body, kind)
        assert reply.status in (200, 400) and b"root:" not in reply.body and b"passwd" not in reply.body


def test_by_default_nobody_else_can_reach_it() -> None:
    config = read_serve_config([])
    assert (config.host, config.hosts) == ("127.0.0.1", ())
