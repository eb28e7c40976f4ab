"""Keys, strict JSON, and each limit of a request, over HTTP: what is refused names its field in one sentence."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from fastapi import FastAPI
from PIL import Image

from openm6.core.errors import ConfigError
from openm6.serve.config import Limits
from openm6.serve.errors import BadRequestError
from openm6.serve.run import read_serve_config
from openm6.serve.server import read_json
from tests.data.sample_images import png, wav
from tests.load.server import Address, Reply, form
from tests.serve.running import answering, small_app

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def app() -> FastAPI:
    limits = Limits(
        body_bytes=50_000,
        pixels=10_000,
        audio_seconds=1.0,
        characters=100,
        json_depth=8,
        messages=2,
        parts=3,
        tokens=8,
        answers=2,
        columns=2,
        rows=2,
        candidates=2,
    )
    return small_app(limits=limits)


@pytest.fixture(scope="module")
def address(app: FastAPI) -> Iterator[Address]:
    with answering(app) as found:
        yield found


def chat(content: Any = "a", turns: int = 1, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}] * turns
    return {"model": "tiny", "messages": messages, "max_tokens": 2, **more}


def image(url: str) -> list[dict[str, object]]:
    return [{"type": "image_url", "image_url": {"url": url}}]


def of_size(width: int, height: int) -> str:
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def audio(data: bytes) -> list[dict[str, Any]]:
    content = {"data": base64.b64encode(data).decode(), "format": "wav"}
    return [{"type": "input_audio", "input_audio": content}]


def wav_that_claims(size: int) -> bytes:
    """A header of a WAV file that promises `size` bytes, and none of them."""
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", size, b"WAVE") + layout + struct.pack("<4sI", b"data", size)


BAD = {
    "an address within": (chat(image("http://169.254.169.254/a.png")), "must be a data URL"),
    "a file": (chat(image("file:///etc/passwd")), "must be a data URL"),
    "no base64": (chat(image("data:image/png;base64,%%%")), "is not valid base64"),
    "no image": (chat(image("data:image/png;base64,aGVsbG8=")), "is not a readable image"),
    "too many pixels": (
        chat(image(of_size(200, 200))),
        "40,000 pixels (200 x 200), over the limit of 10,000",
    ),
    "too long an audio clip": (chat(audio(wav(seconds=1.1))), "1.1 seconds, over the limit of 1.0"),
    "too long a text": (chat("a" * 101), "101 characters, over the limit of 100"),
    "nothing": (chat(""), "the messages are empty"),
    "no messages": ({"model": "tiny", "messages": []}, "messages"),
    "an unknown part": (chat([{"type": "video"}]), "content"),
    "a column nobody knows": (
        chat([{"type": "numbers", "numbers": {"nothing": 1}}]),
        "the model has no column 'nothing'",
    ),
    "a date of no column of dates": (
        chat([{"type": "numbers", "numbers": {"mass": "2024-01-31"}}]),
        "mass='2024-01-31' is not a number",
    ),
    "no column": (chat("a", modalities=["numbers"]), "the number to predict is not named"),
    "too deep": (json.loads("[" * 30 + "]" * 30), "nested deeper than 8"),
    "too many messages": (chat(turns=3), "messages"),
    "too many parts": (chat(image(of_size(8, 8)) * 4), "parts"),
    "too many tokens": (chat(max_tokens=9), "max_tokens=9"),
    "too many answers": (chat(n=3), "n"),
    "too many stop strings": (chat(stop=["a", "b", "c", "d", "e"]), "stop"),
    "too many columns": (
        chat([{"type": "numbers", "numbers": dict.fromkeys(("mass", "length", "x"), 1.0)}]),
        "columns",
    ),
    "an audio clip that lies": (chat(audio(wav_that_claims(4_000_000_000))), "the audio is empty"),
    "an audio clip of nothing": (chat(audio(wav_that_claims(0))), "audio"),
}


OTHER_ROUTES = {
    "too many rows": ("/v1/predict", {"rows": [{"mass": None, "length": 1.0}] * 3}, "rows"),
    "too many candidates": ("/v1/rank", {"query": "a", "candidates": ["a", "b", "c"]}, "candidates"),
    "too many images": ("/v1/images/generations", {"prompt": "a", "n": 3}, "n=3"),
    "images in a stream": ("/v1/images/generations", {"prompt": "a", "stream": True}, "stream is not offered"),
    "too long a prompt": ("/v1/images/generations", {"prompt": "a" * 101}, "prompt holds 101 characters"),
    "too long a speech": ("/v1/audio/speech", {"input": "a" * 101}, "input holds 101 characters"),
}
REFUSED = {name: (CHAT, *found) for name, found in BAD.items()} | OTHER_ROUTES


@pytest.mark.parametrize(("path", "body", "sentence"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_sentence_before_any_work(
    app: FastAPI, address: Address, path: str, body: dict[str, object], sentence: str
) -> None:
    reply = address.post(path, body)
    error = json.loads(reply.body)["error"]
    assert reply.status == 400 and sentence in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and reply.headers["x-request-id"]
    assert len(app.state.server.engine.queue) == 0


def test_another_model_is_not_found(address: Address) -> None:
    for reply in (address.post(CHAT, chat("a") | {"model": "gpt-4"}), address.send("GET", "/v1/models/some/other")):
        error = json.loads(reply.body)["error"]
        assert reply.status == 404 and error["code"] == "model_not_found" and "no model is called" in error["message"]
    assert json.loads(address.send("GET", "/v1/models/default").body)["id"] != "default"


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


def test_while_a_body_is_parsed_others_are_answered(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    parsing, go_on = threading.Event(), threading.Event()

    def slow(body: bytes, depth: int, most: int) -> object:
        parsing.set()
        assert go_on.wait(30)
        return read_json(body, depth, most)

    monkeypatch.setattr("openm6.serve.server.read_json", slow)
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
    with (
        answering(small_app(limits=Limits(body_seconds=0.2))) as slow,
        socket.create_connection(("127.0.0.1", slow.port), timeout=30) as line,
    ):
        line.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n{{".encode())
        answer = b"".join(iter(lambda: line.recv(4096), b""))  # to the end: the connection is closed
    assert b"408" in answer.split(b"\r\n")[0] and b"did not arrive within 0.2 seconds" in answer


def test_an_upload_that_is_no_audio(address: Address) -> None:
    body, kind = form({"model": "tiny"}, {"file": ("../../x.wav", b"RIFF")})
    reply = address.send("POST", "/v1/audio/transcriptions", body, kind)
    assert reply.status == 400 and json.loads(reply.body)["error"]["param"] == "file"
    body, kind = form({"model": "tiny", "prompt": "a" * 101}, {"file": ("x.wav", wav())})
    reply = address.send("POST", "/v1/audio/transcriptions", body, kind)
    assert reply.status == 400 and json.loads(reply.body)["error"]["param"] == "prompt"


def test_a_mask_must_fit(address: Address) -> None:
    for mask, sentence in ((png("red", 30), "make them equal"), (png("red", 40), "transparent nowhere")):
        body, kind = form({"prompt": "x"}, {"image": ("a.png", png("red", 40)), "mask": ("m.png", mask)})
        reply = address.send("POST", "/v1/images/edits", body, kind)
        assert reply.status == 400 and sentence in json.loads(reply.body)["error"]["message"]


def test_metrics_count_what_happened(address: Address) -> None:
    assert address.post(CHAT, chat("a")).status == 200
    page = address.send("GET", "/metrics").body.decode()
    assert f'openm6_requests_total{{kind="{CHAT}",status="200"}}' in page
    assert "openm6_request_joules_sum" in page and "openm6_queue_tokens" in page
    assert json.loads(address.send("GET", "/health").body)["status"] == "ok"


def test_a_failure_that_nobody_expected_is_counted_and_has_an_id(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openm6.serve.content.check_image", Mock(side_effect=RuntimeError("unexpected")))
    body, kind = form({"prompt": "x"}, {"image": ("a.png", png("red", 40))})
    reply = address.send("POST", "/v1/images/edits", body, kind)
    assert reply.status == 500 and reply.headers["x-request-id"] and b"unexpected" not in reply.body
    assert 'kind="/v1/images/edits",status="500"' in address.send("GET", "/metrics").body.decode()


@pytest.mark.parametrize(
    ("given", "status"), [("Bearer two", 200), ("bearer  two", 200), ("two", 200), ("Bearer", 401)]
)
def test_the_scheme_of_a_key_may_be_in_small_letters(given: str, status: int) -> None:
    with answering(small_app(keys=("one", "two"))) as address:
        line = http.client.HTTPConnection("127.0.0.1", address.port)
        line.request("GET", "/v1/models", headers={"Authorization": given})
        assert line.getresponse().status == status
        line.close()


def test_keys_are_asked_for_where_there_are_some() -> None:
    with answering(small_app(keys=("one", "two"))) as address:
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
    (tmp_path / "keys").write_text("secret\n", encoding="utf-8-sig")
    monkeypatch.delenv("OPENM6_API_KEYS")
    assert read_serve_config(["keys=[one]"], tmp_path / "keys").keys == ("one", "secret")
    for setting in ("keys=secret", "keys=5"):
        with pytest.raises(ConfigError, match="keys is a list: write"):
            read_serve_config([setting])
    with pytest.raises(ConfigError, match="keys"):
        read_serve_config(['keys=[""]'])
    assert read_serve_config(["keys=null"]).keys == ()
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        read_serve_config(["engine.max_num_seq=3"])


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
