"""Keys, limits, strict JSON, and errors in one form, over HTTP."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from openm6.base.errors import ConfigError
from openm6.bench.server import Address, form
from openm6.serve.app import create_app
from openm6.serve.config import EngineConfig, Limits, ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.errors import BadRequestError
from openm6.serve.guard import read_json
from openm6.serve.run import read_serve_config
from tests.data.pictures import png, wav
from tests.serve.running import running
from tests.small_model import loaded

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    limits = Limits(body_bytes=60_000, pixels=10_000, sound_seconds=1.0, characters=100, json_depth=8)
    config = ServeConfig(limits=limits)
    with running(create_app(Engine(loaded(3), EngineConfig(rows=2, room=256)), config, "tiny")) as found:
        yield Address(int(found.rpartition(":")[2]), os.getpid())


def chat(content: object, **more: object) -> dict[str, object]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 2, **more}


def image(url: str) -> list[dict[str, object]]:
    return [{"type": "image_url", "image_url": {"url": url}}]


def of_size(width: int, height: int) -> str:
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def long_sound() -> list[dict[str, object]]:
    data = base64.b64encode(wav(seconds=1.4)).decode()
    return [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]


BAD = {
    "another model": (chat("a") | {"model": "gpt-4"}, "no model is called 'gpt-4'"),
    "an address within": (chat(image("http://169.254.169.254/a.png")), "must be a data URL"),
    "a file": (chat(image("file:///etc/passwd")), "must be a data URL"),
    "no base64": (chat(image("data:image/png;base64,%%%")), "is not valid base64"),
    "no picture": (chat(image("data:image/png;base64,aGVsbG8=")), "is no picture that can be read"),
    "too many pixels": (chat(image(of_size(200, 200))), "200 x 200 pixels, over 10,000"),
    "too long a sound": (chat(long_sound()), "over the bound of 1 s"),
    "too long a text": (chat("a" * 101), "101 characters, over 100"),
    "nothing": (chat(""), "the messages are empty"),
    "no messages": ({"model": "tiny", "messages": []}, "messages"),
    "an unknown part": (chat([{"type": "video"}]), "content"),
    "a column nobody knows": (
        chat([{"type": "numbers", "numbers": {"nothing": 1}}]),
        "the model knows no column 'nothing'",
    ),
    "no column": (chat("a", modalities=["numbers"]), "say which number is wanted"),
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
    ],
)
def test_json_that_is_not_strict(body: bytes, sentence: str) -> None:
    with pytest.raises(BadRequestError, match=sentence):
        read_json(body, 32)


def test_an_upload_that_is_no_sound(address: Address) -> None:
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
    app = create_app(Engine(loaded(3), EngineConfig(rows=1, room=64)), ServeConfig(keys=("one", "two")))
    with running(app) as found:
        address = Address(int(found.rpartition(":")[2]), os.getpid())
        assert address.send("GET", "/health").status == 200
        refused = address.send("GET", "/v1/models")
        assert refused.status == 401 and json.loads(refused.body)["error"]["type"] == "authentication_error"


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_serve_config([], tmp_path / "keys").keys == ("one", "two")
    monkeypatch.setenv("OPENM6_API_KEYS", "three, four")
    assert read_serve_config(["engine.rows=3"]).keys == ("three", "four")
    (tmp_path / "keys").write_text("\n", encoding="utf-8")
    for bad in (tmp_path / "keys", tmp_path / "nowhere"):
        with pytest.raises(ConfigError):
            read_serve_config([], bad)
    with pytest.raises(ConfigError, match="did you mean 'rows'"):
        read_serve_config(["engine.row=3"])
