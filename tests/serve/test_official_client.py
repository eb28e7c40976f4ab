"""Every route through the official `openai` client, without retries, as a user would call it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import openai
import pytest
import soundfile
from PIL import Image

from openm6.serve.config import EngineConfig, Limits, ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.run import create_app
from tests.data.sample_images import png, wav
from tests.serve.running import running
from tests.small_model import embedding_model, loaded

IMAGE = {
    "type": "image_url",
    "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png()).decode()}"},
}
AUDIO = {
    "type": "input_audio",
    "input_audio": {"data": base64.b64encode(wav()).decode(), "format": "wav"},
}
NUMBERS = {"type": "numbers", "numbers": {"mass": 3.5, "length": 2.0}}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(
        create_app(Engine(embedding_model(), EngineConfig(max_num_seqs=4, max_model_len=512)), name="tiny")
    ) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def ask(client: openai.OpenAI, content: object, **more: object) -> object:
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], max_tokens=8, **more
    )


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    "content",
    [
        "draw the digit seven",
        [IMAGE, {"type": "text", "text": "What is this?"}],
        [AUDIO, {"type": "text", "text": "What is said?"}],
        [NUMBERS, {"type": "text", "text": "What is this?"}],
    ],
    ids=["text", "image", "audio", "numbers"],
)
def test_chat_reads_every_modality(client: openai.OpenAI, content: object) -> None:
    found = ask(client, content)
    assert found.choices[0].message.role == "assistant" and isinstance(found.choices[0].message.content, str)
    assert found.usage.prompt_tokens > 0
    assert found.choices[0].finish_reason in ("stop", "length")


def test_chat_outputs_every_modality(client: openai.OpenAI) -> None:
    more = {"numbers": {"column": "mass"}, "draw": {"steps": 2}, "seed": 4}
    found = ask(client, "a small apple", extra_body={**more, "modalities": ["text", "image", "audio", "numbers"]})
    message = found.choices[0].message
    head, _, body = message.images[0]["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).size == (64, 64)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(message.audio.data)))
    assert rate == 16_000 and len(samples) == 19_200
    assert message.numbers["mass"]["low"] < message.numbers["mass"]["median"] < message.numbers["mass"]["high"]


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    more = {"temperature": 1.0, "seed": 5}
    whole = ask(client, "draw", **more).choices[0].message.content
    chunks = list(ask(client, "draw", stream=True, stream_options={"include_usage": True}, **more))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({(chunk.id, chunk.model, chunk.created) for chunk in chunks}) == 1
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens > 0


def test_scores_of_tokens_are_those_of_the_text_streamed_or_whole(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "draw"}], "seed": 3}
    asked |= {"temperature": 1.5, "max_tokens": 40, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0]
    data = b"".join(bytes(one.bytes) for one in whole.logprobs.content)
    assert data.decode("utf-8", "replace").startswith(whole.message.content.rstrip("\ufffd"))
    word = whole.message.content[5:7]
    for stop in ([], [word]):
        cut = client.chat.completions.create(**asked, stop=stop).choices[0]
        chunks = list(client.chat.completions.create(**asked, stop=stop, stream=True))
        choices = [choice for chunk in chunks for choice in chunk.choices]
        streamed = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
        assert [one.bytes for one in streamed] == [one.bytes for one in cut.logprobs.content]
        assert "".join(choice.delta.content or "" for choice in choices) == cut.message.content
        assert all(choice.finish_reason is None for choice in choices[:-1]) and choices[-1].finish_reason
        assert not stop or len(cut.logprobs.content) < len(whole.logprobs.content)


def test_images(client: openai.OpenAI) -> None:
    more = {"steps": 2, "seed": 3}
    found = client.images.generate(prompt="the digit seven", n=2, extra_body=more)
    again = client.images.generate(prompt="the digit seven", n=1, extra_body=more)
    first, second = (base64.b64decode(image.b64_json) for image in found.data)
    assert Image.open(io.BytesIO(first)).size == (64, 64)
    assert first == base64.b64decode(again.data[0].b64_json) != second
    assert found.usage.input_tokens_details.text_tokens > 0


def test_an_edit_keeps_what_the_mask_keeps(client: openai.OpenAI) -> None:
    mask = np.full((40, 40, 4), 255, np.uint8)
    mask[10:30, 10:30, 3] = 0
    cover = io.BytesIO()
    Image.fromarray(mask).save(cover, "PNG")
    found = client.images.edit(
        image=("a.png", png("red", 40)),
        mask=("m.png", cover.getvalue()),
        prompt="fill in",
        extra_body={"steps": 2},
    )
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found.data[0].b64_json))).convert("RGB"))
    given = np.asarray(Image.open(io.BytesIO(png("red", 40))).convert("RGB").resize((64, 64), 3))
    listed = client.images.edit(image=[("a.png", png("red", 40))], prompt="fill in", extra_body={"steps": 2})
    assert listed.data[0].b64_json
    assert np.array_equal(pixels[:12], given[:12]) and not np.array_equal(pixels[20:44, 20:44], given[20:44, 20:44])


@pytest.mark.parametrize("form", ["wav", "flac", "mp3", "opus"])
def test_speech(client: openai.OpenAI, form: str) -> None:
    found = client.audio.speech.create(
        model="tiny", voice="alloy", input="zero", response_format=form, extra_body={"steps": 2}
    )
    samples, _ = soundfile.read(io.BytesIO(found.content))
    assert len(samples) > 10_000 and np.isfinite(samples).all()


def test_transcription(client: openai.OpenAI) -> None:
    found = client.audio.transcriptions.create(model="tiny", file=("a.wav", wav()))
    assert isinstance(found.text, str) and found.usage.input_tokens > 0


def test_transcription_by_a_task_of_ones_own() -> None:
    plain = loaded(trained_tasks=(("hear", "spoken"),))
    hear = {"summary": "Hear", "inputs": {"audio": "audio"}, "target": {"text": "label", "max_tokens": 70},
            "prompts": {"en": "In a long conversation {audio} was heard; it meant:"}}  # fmt: skip
    description = plain.description.model_copy(update={"tasks": {"hear": hear}})
    read, written, config = {}, {}, ServeConfig(limits=Limits(tokens=80))
    for name, own in {"own": replace(plain, description=description), "none": loaded(trained_tasks=())}.items():
        with (
            running(create_app(Engine(own, EngineConfig(max_model_len=512)), config, "tiny")) as address,
            openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client,
        ):
            found = client.audio.transcriptions.create(model="tiny", file=("a.wav", wav()))
            read[name], written[name] = found.usage.input_tokens, found.usage.output_tokens
    assert read["own"] > read["none"] + 10
    assert written == {"own": 70, "none": 80}, "the bound of its own task, or of the server"


def test_long_names_and_many_texts_are_refused_before_any_work(client: openai.OpenAI) -> None:
    for body in (
        {"columns": ["x" * 300], "rows": [{"mass": 1.0}]},
        {"rows": [{"mass": "d" * 300, "length": None}]},
    ):
        with pytest.raises(openai.BadRequestError, match="256"):
            client.post("/predict", body={"model": "tiny", **body}, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="characters"):
        ask(client, [{"type": "text", "text": "a" * 400}] * 3000)


def test_neutral_values_are_accepted(client: openai.OpenAI) -> None:
    more = {"top_k": -1, "top_logprobs": 0, "logprobs": False}
    assert ask(client, "draw the digit seven", extra_body=more).choices[0].logprobs is None
    body = {"model": "tiny", "input": "a", "encoding_format": None}
    assert len(client.post("/embeddings", body=body, cast_to=object)["data"][0]["embedding"]) == 16


@pytest.mark.parametrize("form", [None, "float"])
def test_embeddings(client: openai.OpenAI, form: str | None) -> None:
    more = {"encoding_format": form} if form else {}
    found = client.embeddings.create(model="tiny", input=["an apple", "an apple", "七"], **more)
    vectors = np.array([one.embedding for one in found.data])
    assert vectors.shape == (3, 16) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.array_equal(vectors[0], vectors[1]) and not np.allclose(vectors[0], vectors[2])
    images = client.embeddings.create(model="tiny", input=[IMAGE, AUDIO])
    assert len(images.data) == 2


def test_predict_and_rank(client: openai.OpenAI) -> None:
    rows = [{"mass": 3.5, "length": None}, {"mass": 9.0, "length": None}]
    found = client.post("/predict", body={"rows": rows}, cast_to=object)
    alone = [client.post("/predict", body={"rows": [row]}, cast_to=object)["usage"] for row in rows]
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert found["usage"][key] == sum(usage[key] for usage in alone)
    assert [sorted(row["columns"]) for row in found["data"]] == [["length"], ["length"]]
    series = {"name": "mass", "values": [1.0, None, 2.0]}
    ahead = client.post("/predict", body={"series": series, "ahead": 3}, cast_to=object)
    assert len(ahead["data"][0]["columns"]["mass"]["median"]) == 3
    body = {"query": "What is this?", "candidates": ["an apple", "seven", "an apple"]}
    ranked = client.post("/rank", body=body, cast_to=object)["data"]
    assert ranked[0]["score"] >= ranked[1]["score"] >= ranked[2]["score"]
    equal = [one["log_likelihood"] for one in ranked if one["candidate"] == "an apple"]
    assert equal[0] == pytest.approx(equal[1], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_completion_tokens": 100_000}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_what_cannot_be_is_one_sentence_with_its_field(
    client: openai.OpenAI, more: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "draw", **more)
    assert caught.value.param == param and "\n" not in caught.value.body["message"]
    assert caught.value.request_id
