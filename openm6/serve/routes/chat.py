"""`/v1/chat/completions`: all modalities in and out, whole or streamed.

A body, as the official client sends it, becomes one request for each choice and output modality; their answers become
messages, or chunks of a stream.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import product
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from openm6.core.errors import OpenM6Error
from openm6.inference.sampling import Sampling
from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries
from openm6.serve import schemas
from openm6.serve.content import (
    AudioFormat,
    ColumnName,
    ImageFormat,
    Message,
    audio_file,
    image_data_url,
    parts_of_messages,
)
from openm6.serve.engine import cancel_all
from openm6.serve.errors import DOCUMENTED, BadRequestError, check_limit, failure_of
from openm6.serve.requests import Answer, CodesRequest, NumbersRequest, Request, ScoredToken, TextRequest
from openm6.serve.server import Server, StrictRoute, ThisCall
from openm6.serve.worker import RequestHandle, follow

# Fields of OpenAI's that would change the answer: the values that change nothing, besides null and empty ones.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": (),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
DEFAULT_TOKENS = 64
Output = Literal["text", "image", "audio", "numbers"]
Stop = Annotated[str, Field(min_length=1, max_length=64)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class AudioSettings(BaseModel):
    """`voice` is accepted and changes nothing."""

    format: AudioFormat = "wav"
    voice: str | None = None


class NumbersSettings(BaseModel):
    """What to predict: a `column`, or, if the messages hold a series, how many steps `ahead`."""

    column: ColumnName | None = None
    ahead: int = Field(default=8, ge=1, le=64)
    coverage: float = Field(default=0.8, gt=0, lt=1)


class ImageSettings(BaseModel):
    """The file format of an image in the answer."""

    format: ImageFormat = "png"


class DrawSettings(BaseModel):
    """Masked-parallel decoding of images and audio in the answer."""

    steps: schemas.Steps | None = None
    guidance: schemas.Guidance | None = None


class ChatBody(BaseModel):
    """OpenAI's fields; `modalities` may also hold `image` and `numbers`; top_k, repetition_penalty (both as in vLLM),
    numbers, image and draw are ours.

    `temperature` is 0 by default: a small model answers best by its likeliest words.
    Fields of OpenAI's that would change the answer and are not offered are refused, see `refuse_unsupported`.
    """

    model_config = ConfigDict(extra="allow")

    messages: list[Message] = Field(min_length=1, max_length=64)
    model: str
    modalities: list[Output] | None = Field(default=None, min_length=1, max_length=4)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)  # 0 and -1: all tokens, as in vLLM
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    n: int | None = Field(default=None, ge=1, le=8)
    seed: schemas.Seed = None
    stop: Stop | list[Stop] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    audio: AudioSettings | None = None
    image: ImageSettings | None = None
    numbers: NumbersSettings | None = None
    draw: DrawSettings | None = None

    @property
    def outputs(self) -> list[Output]:
        """Each output modality once, in the order of the body; text by default."""
        return list(dict.fromkeys(self.modalities or ["text"]))


def refuse_unsupported(body: ChatBody) -> None:
    """Raise BadRequestError if a field needs something that is known and not supported."""
    for name, value in (body.model_extra or {}).items():
        neutral = UNSUPPORTED.get(name)
        if neutral is None or value is None or value in ([], {}, *neutral):
            continue
        instead = " 'text' alone is offered" if name == "response_format" else " leave it out"
        raise BadRequestError(f"{name} is not supported:{instead}", name)


def chat_requests(body: ChatBody, server: Server, seed: int) -> list[Request]:
    """For each choice, one request for each output modality; raise BadRequestError if fields do not fit."""
    limits = server.limits
    check_limit("messages", len(body.messages), limits.messages, "messages")
    check_limit("n", body.n or 1, limits.answers)
    parts = parts_of_messages(body.messages, limits, server.loaded)
    if not parts:
        raise BadRequestError("the messages are empty: add a text", "messages")
    draw, found = body.draw or DrawSettings(), list[Request]()
    for index, output in product(range(body.n or 1), body.outputs):
        one = schemas.seed_of(seed, index)
        if output == "text":
            found.append(_text_request(body, parts, one, limits.tokens))
        elif output == "numbers":
            found.append(_numbers_request(body.numbers or NumbersSettings(), parts))
        else:
            sampling = schemas.masked_sampling(draw.steps, draw.guidance, one)
            found.append(CodesRequest(parts=parts, modality=output, sampling=sampling))
    return found


def _text_request(body: ChatBody, parts: tuple[Part, ...], seed: int, max_tokens: int) -> TextRequest:
    tokens = body.max_completion_tokens or body.max_tokens or min(DEFAULT_TOKENS, max_tokens)
    check_limit("max_completion_tokens" if body.max_completion_tokens else "max_tokens", tokens, max_tokens)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    check_limit("stop", len(stop), 4, "strings")
    if body.top_logprobs and not body.logprobs:
        raise BadRequestError("top_logprobs needs logprobs: set it to true", "top_logprobs")
    sampling = Sampling(
        temperature=body.temperature or 0.0, top_k=max(0, body.top_k or 0) or None, top_p=body.top_p,
        repetition_penalty=body.repetition_penalty or 1.0, max_tokens=tokens, seed=seed,
    )  # fmt: skip
    top = (body.top_logprobs or 0) if body.logprobs else None
    return TextRequest(parts=parts, sampling=sampling, stop=tuple(stop), top=top)


def _numbers_request(settings: NumbersSettings, parts: tuple[Part, ...]) -> NumbersRequest:
    """The predicted column is removed from the inputs."""
    series = [part.raw for part in parts if isinstance(part.raw, NumberSeries)]
    if settings.column is None and series:
        return NumbersRequest(parts=parts, series=series[-1], ahead=settings.ahead)
    rows = [part.raw for part in parts if isinstance(part.raw, dict)]
    missing = [name for row in rows for name, value in row.items() if value is None]
    if settings.column is None and len(missing) != 1:
        raise BadRequestError(
            "the number to predict is not named: send numbers={'column': …}, or one value of null", "numbers"
        )
    column = missing[0] if settings.column is None else settings.column
    inputs = []
    for part in parts:
        if isinstance(part.raw, dict):
            part = replace(part, raw={name: value for name, value in part.raw.items() if name != column})
        if part.raw != {}:
            inputs.append(part)
    if not inputs:
        raise BadRequestError(
            "nothing is left to predict from: add inputs besides the column that is asked for", "messages"
        )
    return NumbersRequest(parts=tuple(inputs), columns=(column,))


router = APIRouter(prefix="/v1/chat", tags=["chat"], route_class=StrictRoute, responses=DOCUMENTED)

EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}
AUDIO_SECONDS = 3600  # until OpenAI deletes an audio answer; ours is in the response, and nothing is stored


class AnswerAudio(BaseModel):
    """Audio in the answer, base64."""

    id: str
    data: str
    expires_at: int
    transcript: str = ""


class DataURL(BaseModel):
    url: str


class AnswerImage(BaseModel):
    """An image in the answer, as a data URL."""

    type: Literal["image_url"] = "image_url"
    image_url: DataURL


class Delta(BaseModel):
    """What is new in a chunk of a streamed answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    audio: AnswerAudio | None = None
    images: list[AnswerImage] | None = None
    numbers: dict[str, schemas.Distribution] | None = None


class AnswerMessage(Delta):
    """The answer: text in `content`, the rest in fields of its own."""

    role: Literal["assistant"] = "assistant"
    refusal: str | None = None


class TokenAlternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TokenAlternative):
    top_logprobs: list[TokenAlternative] = []


class Logprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"]


class DeltaChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatReply(schemas.CoveredReply):
    """What whole and streamed responses have in common; `seed` repeats the answer."""

    id: str
    created: int
    model: str
    seed: int


class Completion(ChatReply):
    """One answer for each choice."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[Choice]
    usage: schemas.TokenUsage


class Chunk(ChatReply):
    """A chunk of a streamed answer; the last one with choices holds `joules` and `trained`."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[DeltaChoice]
    usage: schemas.TokenUsage | None = None


@router.post("/completions", response_model=Completion, responses={200: {"content": EVENTS}})
async def complete(body: ChatBody, call: ThisCall) -> Completion | StreamingResponse:
    """Answers a chat."""
    server = call.server
    server.check_model(body.model)
    refuse_unsupported(body)
    await server.fetcher.fetch_all((f"messages.{i}.content", turn.content) for i, turn in enumerate(body.messages))
    seed = schemas.chosen_seed(body.seed)
    reply = _Reply(server, body, await asyncio.to_thread(chat_requests, body, server, seed), seed)
    if not body.stream:
        answers = await call.answer("chat", reply.requests)
        mains, messages = answers[reply.by_choice], await asyncio.to_thread(reply.messages, answers)
        choices = [
            Choice(
                index=index,
                message=message,
                logprobs=logprobs_of(main.tokens) if body.logprobs else None,
                finish_reason=main.finish,
            )
            for index, (message, main) in enumerate(zip(messages, mains, strict=True))
        ]
        whole = Completion(**reply.head, choices=choices, usage=schemas.usage_of(answers))
        return whole.with_coverage(reply.requests, answers, server.loaded.description)
    # A refusal must come before the first byte of a stream.
    return _Events(reply, await call.submit(reply.requests))


class _Reply:
    """The response to one body: `requests` are those of the first choice, then those of the second, and so on."""

    def __init__(self, server: Server, body: ChatBody, requests: list[Request], seed: int) -> None:
        self.server, self.body, self.requests = server, body, requests
        # As in every chunk of a stream.
        self.head: Any = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": server.name,
            "seed": seed,
        }
        # Of each choice the request for text, or the first one without text.
        outputs = body.outputs
        self.by_choice = slice(outputs.index("text") if "text" in outputs else 0, None, len(outputs))

    def messages(self, answers: Sequence[Answer]) -> list[AnswerMessage]:
        """Return the answers of each choice as one message; images and audio are decoded here."""
        loaded, body, found = self.server.loaded, self.body, []
        for number, (request, answer) in enumerate(zip(self.requests, answers, strict=True)):
            output, value = body.outputs[number % len(body.outputs)], answer.value
            if number % len(body.outputs) == 0:
                found.append(AnswerMessage())
            message = found[-1]
            if output == "text":
                message.content = value
            elif output == "image":
                url = image_data_url(loaded.image.decode(value), (body.image or ImageSettings()).format)
                message.images = [AnswerImage(image_url=DataURL(url=url))]
            elif output == "audio":
                data = audio_file(loaded.audio.decode(value), (body.audio or AudioSettings()).format)
                message.audio = AnswerAudio(
                    id=f"audio-{uuid.uuid4().hex}",
                    data=base64.b64encode(data).decode(),
                    expires_at=int(time.time()) + AUDIO_SECONDS,
                )
            else:
                assert isinstance(request, NumbersRequest)
                coverage = (body.numbers or NumbersSettings()).coverage
                message.numbers = {request.name: schemas.distribution_of(value, coverage)}
        return found

    def chunk(self, choices: list[DeltaChoice], answers: list[Answer] | None = None, usage: bool = False) -> str:
        """Return an event of a stream; `answers` are those whose energy it reports."""
        chunk = Chunk(**self.head, choices=choices, usage=schemas.usage_of(answers) if usage and answers else None)
        if answers:
            chunk.with_coverage(self.requests, answers, self.server.loaded.description)
        shown = chunk.model_dump(mode="json", exclude_none=not usage, exclude=None if answers else {"trained"})
        for own, choice in zip(shown["choices"], choices, strict=True):
            own["finish_reason"] = choice.finish_reason  # null until the last chunk, as OpenAI has it
        return f"data: {json.dumps(shown, ensure_ascii=False)}\n\n"

    async def events(self, handles: list[RequestHandle]) -> AsyncIterator[str]:
        """Yield chunks, then `[DONE]`; a failure on the way is an event, too, as the status is sent already."""
        mains = handles[self.by_choice]
        try:
            for index in range(len(mains)):
                yield self.chunk([DeltaChoice(index=index, delta=Delta(role="assistant", content=""))])
            async for choice in self._deltas(handles):
                yield self.chunk([choice])
            answers = [await handle.answer() for handle in handles]
            for answer in answers:
                self.server.metrics.add("chat", answer)
            for index, message in enumerate(await asyncio.to_thread(self.messages, answers)):
                delta = Delta(audio=message.audio, images=message.images, numbers=message.numbers)
                choice = DeltaChoice(index=index, delta=delta, finish_reason=answers[self.by_choice][index].finish)
                yield self.chunk([choice], answers if index == len(mains) - 1 else None)
            if self.body.stream_options is not None and self.body.stream_options.include_usage:
                yield self.chunk([], answers, usage=True)
        except OpenM6Error as error:
            failure = failure_of(error)
            yield f"data: {failure.body(code=str(failure.status)).model_dump_json()}\n\n"
        yield "data: [DONE]\n\n"

    async def _deltas(self, handles: list[RequestHandle]) -> AsyncIterator[DeltaChoice]:
        """Yield what is new in the texts of all choices, as it is generated, until all requests are done."""
        mains = handles[self.by_choice]
        sent, scored = [0] * len(mains), [0] * len(mains)  # characters, tokens
        async with aclosing(follow(handles)) as changes:
            async for _ in changes:
                for index, handle in enumerate(mains):
                    text, tokens = handle.text, handle.tokens
                    if len(text) > sent[index] or (self.body.logprobs and len(tokens) > scored[index]):
                        logprobs = logprobs_of(tokens[scored[index] :]) if self.body.logprobs else None
                        delta = Delta(content=text[sent[index] :])
                        sent[index], scored[index] = len(text), len(tokens)
                        yield DeltaChoice(index=index, delta=delta, logprobs=logprobs)


class _Events(StreamingResponse):
    """Server-sent events; however they end, even before the first one, requests that are not done are cancelled."""

    def __init__(self, reply: _Reply, handles: list[RequestHandle]) -> None:
        super().__init__(reply.events(handles), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.handles = handles

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            cancel_all(self.handles)


def logprobs_of(tokens: Sequence[ScoredToken]) -> Logprobs:
    def scored(token: ScoredToken) -> dict[str, Any]:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}

    content = [
        TokenLogprob(**scored(token), top_logprobs=[TokenAlternative(**scored(one)) for one in token.alternatives])
        for token in tokens
    ]
    return Logprobs(content=content)
