"""Responses say when a question is of a kind that the model was never trained for."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Iterator

import pytest

from openm6.serve.config import EngineConfig, ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.run import create_app
from tests.data.sample_images import png
from tests.load.server import Address, Reply
from tests.serve.running import answering
from tests.small_model import loaded

TRAINED_TASKS = (("image_classification", "digits"), ("text_to_image", "digits"))


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    app = create_app(
        Engine(loaded(3, TRAINED_TASKS), EngineConfig(max_num_seqs=2, max_model_len=256)), ServeConfig(), "m"
    )
    with answering(app) as found:
        yield found


def ask(address: Address, words: str, **more: object) -> Reply:
    body = {"model": "m", "messages": [{"role": "user", "content": words}], "max_tokens": 2, **more}
    return address.post("/v1/chat/completions", body)


def test_a_chat_says_so(address: Address) -> None:
    found = json.loads(ask(address, "What is the capital of France?").body)
    assert found["trained"] is False and "text from text, only text from image; image from text" in found["note"]
    drawn = json.loads(ask(address, "draw seven", modalities=["image"], draw={"steps": 1}).body)
    assert drawn["trained"] is True and drawn["note"] is None
    other = json.loads(ask(address, "a red cat", modalities=["image"], draw={"steps": 1}).body)
    assert other["trained"] is False and "trained on 'draw …'" in other["note"]


def test_a_stream_says_so_in_the_event_with_the_joules(address: Address) -> None:
    events = [
        json.loads(line[6:])
        for line in ask(address, "Hello?", stream=True).body.decode().split("\n\n")
        if line.startswith("data: {")
    ]
    last = [event for event in events if "joules" in event]
    assert len(last) == 1 and last[0]["trained"] is False and "never trained" in last[0]["note"]


def test_a_classifier_that_is_to_draw_says_so() -> None:
    model = loaded(3, (("image_classification", "digits"),))
    with answering(
        create_app(Engine(model, EngineConfig(max_num_seqs=1, max_model_len=128)), ServeConfig(), "m")
    ) as found:
        reply = found.post("/v1/images/generations", {"prompt": "a cat", "steps": 1, "n": None})
    assert reply.status == 200 and "never trained to generate image from text" in json.loads(reply.body)["note"]


def test_the_playground_shows_it_in_its_language(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("gradio", reason="the extra [serve] is not installed")
    page = importlib.import_module("openm6.serve.playground.page")
    image = tmp_path / "a.png"
    image.write_bytes(png())
    app = create_app(
        Engine(loaded(3, TRAINED_TASKS), EngineConfig(max_num_seqs=1, max_model_len=128)), ServeConfig(), "m"
    )
    server = app.state.server
    with server.engine:
        for language, word in (("en", "never trained"), ("zh", "未学过")):
            *_, note, _, _ = asyncio.run(page.Page(server).on_ask(language, "Hello <b>", None, None, "text", 0, []))
            assert word in note and 'class="untrained"' in note and " s" in note
        *_, note, _, _ = asyncio.run(page.Page(server).on_ask("en", "What is this?", str(image), None, "text", 0, []))
        assert "untrained" not in note
