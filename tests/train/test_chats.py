"""A tiny run on chats in three forms: trained, evaluated, and asked by the server and in Python."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

import openm6
from openm6.inference.load import load
from openm6.serve.config import EngineConfig
from openm6.serve.engine import Engine
from openm6.serve.run import create_app
from openm6.train.run import train_recipe
from tests.data.sample_images import png, wav
from tests.serve.running import running
from tests.train.tiny_recipe import EVAL, tiny_recipe, write_recipe

COLOURS = ("red", "blue", "green", "black")


def lines(form: str) -> list[dict[str, Any]]:
    """Twenty chats of a form: a colour is named, then drawn, said or weighed."""
    found = []
    for index in range(20):
        colour = COLOURS[index % 4]
        image = f"data:image/png;base64,{base64.b64encode(png(colour)).decode()}"
        picture = {"type": "image_url", "image_url": {"url": image}}
        weight = {"type": "numbers", "numbers": {"mass": 1.0 + index}}
        turns: list[Any] = [[picture, {"type": "text", "text": "Which colour?"}], colour, "Weigh it.", [weight]]
        if form == "marks":
            turns = ["<image>Which colour?", colour, "Draw it.", "Here: <image>"]
        if form == "ShareGPT":
            turns = ["Which colour is the sky?", colour, "Say it.", "<audio>"]
        roles = ("user", "assistant") if form != "ShareGPT" else ("human", "gpt")
        names = ("role", "content") if form != "ShareGPT" else ("from", "value")
        chat = [dict(zip(names, (roles[turn % 2], said), strict=True)) for turn, said in enumerate(turns)]
        row: dict[str, Any] = {"messages" if form != "ShareGPT" else "conversations": chat, "id": str(index)}
        row |= {"images": [image, image]} if form == "marks" else {}
        row |= {"audios": ["said.wav"]} if form == "ShareGPT" else {}
        found.append(row)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    (folder / "said.wav").write_bytes(wav())
    sources, mixture = {}, []
    for form, task in (("parts", "chat_to_numbers"), ("marks", "chat_to_image"), ("ShareGPT", "chat_to_audio")):
        path = folder / f"{form}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*lines(form), {"messages": []}]))
        sources[form] = {"kind": "chat", "path": str(path), "test_fraction": 0.3}
        mixture += [{"source": form, "task": name} for name in ("chat", task)]
    recipe = tiny_recipe(4, num_processes=1) | {"sources": sources, "mixture": mixture, "max_broken": 0.3}
    path = write_recipe(
        folder, recipe | {"eval": {**EVAL, "at_end": True}, "packing": {"batch_size": 2, "seq_len": 400}}
    )
    train_recipe(path, out=folder / "run")
    return folder / "run"


def test_each_form_is_learned_and_evaluated(run: Path) -> None:
    tasks = json.loads((run / "report.json").read_text(encoding="utf-8"))["tasks"]
    assert set(tasks) == {"chat/parts", "chat/marks", "chat/ShareGPT", "chat_to_numbers/parts", "chat_to_image/marks",
                          "chat_to_audio/ShareGPT"}  # fmt: skip
    assert all(task["n"] > 0 for task in tasks.values())
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {key for line in last for key in line if key.startswith("loss/")} >= {
        "loss/text", "loss/image_out", "loss/audio_out", "loss/numbers_out",
    }  # fmt: skip
    description = load(run).description
    assert {one.source: one.modalities for one in description.trained_tasks} == {
        "parts": ["image", "numbers"], "marks": ["image"], "ShareGPT": ["audio"],
    }  # fmt: skip
    assert "mass" in description.scales


def test_the_server_and_python_answer_a_chat(run: Path) -> None:
    loaded = load(run)
    first = lines("parts")[0]["messages"][:3]
    app = create_app(Engine(loaded, EngineConfig(max_model_len=512)), name="chats")
    with running(app) as address, httpx.Client(base_url=address, timeout=60) as client:
        body = {"model": "chats", "messages": first, "max_tokens": 4, "seed": 1}
        reply = client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"] is not None, reply.text
        asked = body | {"modalities": ["image", "numbers", "audio"], "numbers": {"column": "mass"}}
        reply = client.post("/v1/chat/completions", json=asked)
        message = reply.json()["choices"][0]["message"]
        assert message["images"] and message["audio"]["data"] and "mass" in message["numbers"], reply.text
    m6 = openm6.OpenM6(loaded)
    text = m6.chat(first, max_new_tokens=4)
    assert text == client_text(loaded, first) and "".join(m6.chat(first, max_new_tokens=4, stream=True)) == text
    assert m6.chat(first, output="image").size == (64, 64)


def client_text(loaded: Any, messages: list[Any]) -> str:
    app = create_app(Engine(loaded, EngineConfig(max_model_len=512)), name="chats")
    with running(app) as address, httpx.Client(base_url=address, timeout=60) as client:
        body = {"model": "chats", "messages": messages, "max_tokens": 4}
        return str(client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])
