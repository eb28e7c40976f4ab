"""Keys, limits, strict JSON, and errors in one form, over HTTP."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from openm6.core.errors import ConfigError
from openm6.serve.app import create_app
from openm6.serve.config import EngineConfig, Limits, ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.errors import BadRequestError
from openm6.serve.middleware import read_json
from openm6.serve.run import read_serve_config
from tests.data.sample_images import png, wav
from tests.load.server import Address, Reply, form
from tests.serve.running import running
from tests.small_model import loaded

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    limits = Limits(body_bytes=60_000, pixels=10_000, audio_seconds=1.0, characters=100, json_depth=8)
    config = ServeConfig(limits=limits)
    with running(
        create_app(Engine(loaded(3), EngineConfig(max_num_seqs=2, max_model_len=256)), config, "tiny")
    ) as found:
        yield Address(int(found.rpartition(":")[2]), os.getpid())


def chat(content: object, **more: object) -> dict[str, object]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 2, **more}


def image(url: str) -> list[dict[str, object]]:
    return [{"type": "image_url", "image_url": {"url": url}}]


def of_size(width: int, height: int) -> str:
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def long_audio() -> list[dict[str, object]]:
    data = base64.b64encode(wav(seconds=1.4)).decode()
    return [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]


BAD = {
    "another model": (chat("a") | {"model": "gpt-4"}, "no model is called 'gpt-4'"),
    "an address within": (chat(image("http://169.254.169.254/a.png")), "must be a data URL"),
    "a file": (chat(image("file:///etc/passwd")), "must be a data URL"),
    "no base64": (chat(image("data:image/png;base64,%%%")), "is not valid base64"),
    "no image": (chat(image("data:image/png;base64,aGVsbG8=")), "is not a readable image"),
    "too many pixels": (
        chat(image(of_size(200, 200))),
        "40,000 pixels (200 x 200), over the limit of 10,000",
    ),
    "too long an audio clip": (chat(long_audio()), "1.4 seconds, over the limit of 1.0"),
    "too long a text": (chat("a" * 101), "101 characters, over the limit of 100"),
    "nothing": (chat(""), "the messages are empty"),
    "no messages": ({"model": "tiny", "messages": []}, "messages"),
    "an unknown part": (chat([{"type": "video"}]), "content"),
    "a column nobody knows": (
        chat([{"type": "numbers", "numbers": {"nothing": 1}}]),
        "the model has no column 'nothing'",
    ),
    "no column": (chat("a", modalities=["numbers"]), "the number to predict is not named"),
    "too deep": (json.loads("[" * 30 + "]" * 30), "nested deeper than 8"),
}


@pytest.mark.parametrize(("body", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(address: Address, body: dict[str, object], sentence: str) -> None:
    reply = address.post(CHAT, body)
    error = json.loads(reply.body)["error"]
    assert reply.status == 400 and sentence in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and reply.headers["x-request-id"]


def test_a_body_that_is_too_large(address: Address) -> None:
    reply = address.post(CHAT, chat("a" * 70_000))
    assert reply.status == 413 and json.loads(reply.body)["error"]["message"]


def test_paths_and_methods_that_do_not_exist(address: Address) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("DELETE", CHAT, 405)):
        reply = address.send(method, path)
        assert reply.status == status and json.loads(reply.body)["error"]["message"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "nested deeper"),
        (b"[" + b"[]," * 200_000 + b"[]]", "over 100,000 commas and brackets"),
    ],
)
def test_json_that_is_not_strict(body: bytes, sentence: str) -> None:
    with pytest.raises(BadRequestError, match=sentence):
        read_json(body, 32, 100_000)


def test_too_many_values_are_refused_before_they_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser holds the interpreter's lock until it is done."""
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(BadRequestError, match="send fewer values"):
        read_json(b"[" + b"[]," * 100 + b"[]]", 32, 100)


def test_while_a_body_is_parsed_others_are_answered(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsing, go_on = threading.Event(), threading.Event()

    def slow(body: bytes, depth: int, most: int) -> object:
        parsing.set()
        assert go_on.wait(30)
        return read_json(body, depth, most)

    monkeypatch.setattr("openm6.serve.middleware.read_json", slow)
    replies: list[Reply] = []
    hostile = threading.Thread(target=lambda: replies.append(address.post(CHAT, [[]] * 10)))
    hostile.start()
    try:
        assert parsing.wait(30)
        assert address.send("GET", "/health").status == 200
    finally:
        go_on.set()
        hostile.join()
    assert replies[0].status == 400


def test_a_body_that_comes_too_slowly_is_given_up() -> None:
    config = ServeConfig(limits=Limits(body_seconds=0.2))
    app = create_app(Engine(loaded(3), EngineConfig(max_num_seqs=1, max_model_len=64)), config)
    with (
        running(app) as found,
        socket.create_connection(("127.0.0.1", int(found.rpartition(":")[2])), timeout=30) as line,
    ):
        line.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n{{".encode())
        answer = b"".join(iter(lambda: line.recv(4096), b""))  # to the end: the connection is closed
    assert b"408" in answer.split(b"\r\n")[0] and b"did not arrive within 0.2 seconds" in answer


def test_an_upload_that_is_no_audio(address: Address) -> None:
    body, kind = form({"model": "tiny"}, {"file": ("../../x.wav", b"RIFF")})
    reply = address.send("POST", "/v1/audio/transcriptions", body, kind)
    assert reply.status == 400 and json.loads(reply.body)["error"]["param"] == "file"


def test_a_mask_must_fit(address: Address) -> None:
    for mask, sentence in ((png("red", 30), "make them equal"), (png("red", 40), "transparent nowhere")):
        body, kind = form({"prompt": "x"}, {"image": ("a.png", png("red", 40)), "mask": ("m.png", mask)})
        reply = address.send("POST", "/v1/images/edits", body, kind)
        assert reply.status == 400 and sentence in json.loads(reply.body)["error"]["message"]


def test_metrics_tell_what_happened(address: Address) -> None:
    assert address.post(CHAT, chat("a")).status == 200
    page = address.send("GET", "/metrics").body.decode()
    assert f'openm6_requests_total{{kind="{CHAT}",status="200"}}' in page
    assert "openm6_request_joules_sum" in page and "openm6_queue_tokens" in page
    assert json.loads(address.send("GET", "/health").body)["status"] == "ok"


def test_keys_are_asked_for_where_there_are_some() -> None:
    app = create_app(
        Engine(loaded(3), EngineConfig(max_num_seqs=1, max_model_len=64)), ServeConfig(keys=("one", "two"))
    )
    with running(app) as found:
        address = Address(int(found.rpartition(":")[2]), os.getpid())
        assert address.send("GET", "/health").status == 200
        refused = address.send("GET", "/v1/models")
        assert refused.status == 401 and json.loads(refused.body)["error"]["type"] == "authentication_error"


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_serve_config([], tmp_path / "keys").keys == ("one", "two")
    monkeypatch.setenv("OPENM6_API_KEYS", "three, four")
    assert read_serve_config(["engine.max_num_seqs=3"]).keys == ("three", "four")
    (tmp_path / "keys").write_text("\n", encoding="utf-8")
    for bad in (tmp_path / "keys", tmp_path / "nowhere"):
        with pytest.raises(ConfigError):
            read_serve_config([], bad)
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        read_serve_config(["engine.max_num_seq=3"])
