"""Every body that is not of the right form gets our own sentence, with the path in its JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError

from openm6.serve.errors import KINDS, SENTENCES, describe_invalid
from openm6.serve.routes.chat import UNSUPPORTED, ChatBody
from openm6.serve.routes.media import GenerationBody, SpeechBody
from openm6.serve.routes.one_pass import EmbeddingBody, PredictionBody, RankingBody
from openm6.serve.routes.scenarios import ScenarioBody
from tests.load.server import Address, Reply, form
from tests.serve.running import answering, small_app

FORBIDDEN = (
    "Input should be",
    "after validation",
    ".str",
    "union",
    "pydantic",
    "valid integer",
    "[",
    "tagged",
)
CHAT = "/v1/chat/completions"
TURN = {"role": "user", "content": "a"}


def of_parts(*parts: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}]}


# Body, the path that is named, and words of the sentence.
CHATS: dict[str, tuple[Any, str, str]] = {
    "no messages": ({"model": "m", "messages": []}, "messages", "at least 1 item"),
    "no model": ({"messages": [TURN]}, "model", "is missing: add it"),
    "a list": ([], "", "must be an object"),
    "null": (None, "", ""),
    "content of a number": ({"model": "m", "messages": [{"role": "user", "content": 5}]}, "messages.0.content",
                            "must be a string or a list"),
    "a role": ({"model": "m", "messages": [{"role": "tool", "content": "a"}]}, "messages.0.role",
               "system, developer, user or assistant"),
    "a video": (of_parts({"type": "video_url", "video_url": {"url": "x"}}), "messages.0.content.0.type",
                "'video_url' is not supported: use text, image_url, input_audio or numbers"),
    "no type": (of_parts({"text": "x"}), "messages.0.content.0.type", "has no type"),
    "no url": (of_parts({"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}),
               "messages.0.content.1.image_url.url", "is missing"),
    "text of a number": (of_parts({"type": "text", "text": 3}), "messages.0.content.0.text", "must be a string"),
    "a part of text": (of_parts("a"), "messages.0.content.0", "must be an object"),
    "hot": ({"model": "m", "messages": [TURN], "temperature": 9}, "temperature", "at most 2"),
    "half a token": ({"model": "m", "messages": [TURN], "max_tokens": 1.5}, "max_tokens", "an integer"),
    "no token": ({"model": "m", "messages": [TURN], "max_tokens": 0}, "max_tokens", "at least 1"),
    "a modality": ({"model": "m", "messages": [TURN], "modalities": ["video"]}, "modalities.0",
                   "text, image, audio or numbers"),
    "stream": ({"model": "m", "messages": [TURN], "stream": "often"}, "stream", "true or false"),
    "stop": ({"model": "m", "messages": [TURN], "stop": [""]}, "stop.0", "at least 1 character"),
    "a series": (of_parts({"type": "numbers", "series": {"name": "a", "values": ["x"]}}),
                 "messages.0.content.0.series.values.0", "must be a number"),
}  # fmt: skip

BODIES: dict[type[BaseModel], list[Any]] = {
    ChatBody: [body for body, _, _ in CHATS.values()],
    GenerationBody: [{}, {"prompt": ""}, {"prompt": "a", "size": 3}, {"prompt": "a", "n": 99},
                 {"prompt": "a", "response_format": "url"}, {"prompt": ["a"]}, {"prompt": "a", "guidance": "x"}],
    SpeechBody: [{"input": ""}, {"input": "a", "response_format": "midi"}, {"input": "a", "speed": 9}, {"input": {}}],
    EmbeddingBody: [{}, {"input": 3}, {"input": [3]}, {"input": {"type": "video_url"}}, {"input": [[1, 2]]},
                {"input": "a", "encoding_format": "x"}, {"input": [{"type": "image_url"}]}],
    PredictionBody: [{"rows": []}, {"rows": [{"a": ["x"]}]}, {"rows": {}}, {"series": {"name": "a", "values": []}},
                 {"series": {"values": [1]}}, {"rows": [{"a": 1}], "coverage": 1}, {"rows": [[]]}],
    RankingBody: [{"query": "a", "candidates": []}, {"query": "a", "candidates": [""]}, {"candidates": ["a"]},
              {"query": 3, "candidates": ["a"]}, {"query": "a", "candidates": [["a"]]}],
    ScenarioBody: [{}, {"inputs": {}}, {"inputs": {"x": 3}}, {"inputs": {"x": {"name": ["a"]}}},
                   {"inputs": {"x": [[]]}}, {"inputs": {"x": "a"}, "language": "fr"}, {"inputs": []},
                   {"inputs": {"x": "a"}, "seed": -1}, {"inputs": {"x": {"a": {"b": "c"}}}}],
}  # fmt: skip


def sentence(model: type[BaseModel], body: Any) -> tuple[str, str | None]:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(model).validate_python(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return describe_invalid(RequestValidationError(errors).errors(), body)


@pytest.mark.parametrize(("body", "path", "words"), CHATS.values(), ids=CHATS)
def test_the_path_and_the_remedy_are_named(body: Any, path: str, words: str) -> None:
    message, found = sentence(ChatBody, body)
    assert (found or "") == path and words in message and message.startswith(path or "the body")


@pytest.mark.parametrize(
    ("model", "number"), [(model, number) for model, found in BODIES.items() for number in range(len(found))]
)
def test_no_word_of_the_library_shows_through(model: type[BaseModel], number: int) -> None:
    message, path = sentence(model, BODIES[model][number])
    assert not [word for word in FORBIDDEN if word in message], message
    assert "\n" not in message and len(message) < 200 and (path is None or message.startswith(path))


def test_any_field_of_any_wrong_kind_gets_a_sentence() -> None:
    """Each field of each body, with values of all kinds."""
    values: list[Any] = [None, True, -1, 1.5, 1e9, "", "x" * 30_000, [], [[]], [None], {}, {"a": []}]
    for model, value in product(BODIES, values):
        for name in model.model_fields:
            try:
                TypeAdapter(model).validate_python({name: value})
            except ValidationError as error:
                errors = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
                for kind in {one["type"] for one in errors} - set(SENTENCES):
                    assert kind.partition("_")[0] in KINDS
                message, _ = describe_invalid(errors, {name: value})
                assert not [word for word in FORBIDDEN if word in message], message


@pytest.mark.parametrize("key", ["a" * 100_000, "a"])
def test_long_keys_and_types_are_cut(key: str) -> None:
    message, name = sentence(PredictionBody, {"rows": [{key: []}]})
    assert len(message) < 300 and name is not None and len(name) < 100
    message, _ = sentence(ChatBody, of_parts({"type": key}))
    assert len(message) < 300 and "is not supported" in message


def test_one_wrong_item_of_many_is_enough() -> None:
    series = {"type": "numbers", "series": {"name": "a", "values": ["x"] * 4000}}
    for body in ({"input": [0] * 50_000}, {"input": [series]}):
        with pytest.raises(ValidationError) as caught:
            TypeAdapter(EmbeddingBody).validate_python(body)
        assert caught.value.error_count() < 20


def test_what_is_not_known_has_a_sentence_too() -> None:
    message, path = describe_invalid([{"type": "brand_new", "loc": ("body", "a"), "msg": "Input should be"}], {"a": 1})
    assert (message, path) == ("a cannot be used as it is: see /docs", "a")


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    with answering(small_app("m")) as found:
        yield found


def error_of(reply: Reply) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(reply.body)["error"]
    return found


ASKED = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "parallel_tool_calls": None,
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "logit_bias": {"5": 3},
    "prediction": {"type": "content", "content": "a"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "web_search_options": {"search_context_size": "low"},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_not_offered_is_refused_unless_it_asks_for_nothing(address: Address, field: str) -> None:
    body = {"model": "m", "messages": [TURN], "max_tokens": 1}
    if ASKED[field] is not None:
        refused = address.post(CHAT, body | {field: ASKED[field]})
        error = error_of(refused)
        assert refused.status == 400 and error["param"] == field
        assert f"{field} is not supported" in error["message"]
    for value in (None, *UNSUPPORTED[field]):
        assert address.post(CHAT, body | {field: value}).status == 200


def test_over_http_the_sentence_and_the_field_arrive(address: Address) -> None:
    error = error_of(address.post(CHAT, of_parts({"type": "video_url"})))
    assert error["param"] == "messages.0.content.0.type" and "'video_url' is not supported" in error["message"]
    body, kind = form({"n": "many", "prompt": "x"}, {"image": ("a.png", b"x")})
    reply = address.send("POST", "/v1/images/edits", body, kind)
    assert reply.status == 400 and error_of(reply)["message"] == "n must be an integer"
    body, kind = form({"prompt": "x"}, {})
    reply = address.send("POST", "/v1/images/edits", body, kind)
    assert reply.status == 400 and error_of(reply)["message"] == "image is missing: add it"
    body, kind = form({"prompt": "x", "image": "a.png"}, {})
    reply = address.send("POST", "/v1/images/edits", body, kind)
    assert reply.status == 400 and error_of(reply)["message"] == "image must be a file"
    body, kind = form({"prompt": "x"}, {"image": ("a.png", b"x"), "image[]": ("b.png", b"x")})
    reply = address.send("POST", "/v1/images/edits", body, kind)
    assert reply.status == 400 and error_of(reply)["message"] == "image is a list: send one image"
