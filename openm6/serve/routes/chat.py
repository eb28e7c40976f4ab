"""`/v1/chat/completions`: all modalities in and out, whole or streamed.

A body becomes one request for each choice and output modality; their answers become messages, or chunks of a stream.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from openm6.core.errors import OpenM6Error
from openm6.serve.content import audio_file, image_data_url
from openm6.serve.engine import cancel_all
from openm6.serve.errors import DOCUMENTED, failure_of
from openm6.serve.middleware import StrictRoute
from openm6.serve.requests import Answer, NumbersRequest, Request, ScoredToken
from openm6.serve.routes.chat_request import (
    AudioSettings,
    ChatBody,
    ImageSettings,
    NumbersSettings,
    chat_requests,
    refuse_unsupported,
)
from openm6.serve.schemas import CoveredReply, Distribution, TokenUsage, chosen_seed, distribution_of, usage_of
from openm6.serve.server import Server, ThisCall
from openm6.serve.worker import RequestHandle, follow

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
    numbers: dict[str, Distribution] | None = None


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


class ChatReply(CoveredReply):
    """What whole and streamed responses have in common; `seed` repeats the answer."""

    id: str
    created: int
    model: str
    seed: int


class Completion(ChatReply):
    """One answer for each choice."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[Choice]
    usage: TokenUsage


class Chunk(ChatReply):
    """A chunk of a streamed answer; the last one with choices holds `joules` and `trained`."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[DeltaChoice]
    usage: TokenUsage | None = None


@router.post("/completions", response_model=Completion, responses={200: {"content": EVENTS}})
async def complete(body: ChatBody, call: ThisCall) -> Completion | StreamingResponse:
    """Answers a chat."""
    server = call.server
    server.check_model(body.model)
    refuse_unsupported(body)
    await server.fetcher.fetch_all((f"messages.{i}.content", turn.content) for i, turn in enumerate(body.messages))
    seed = chosen_seed(body.seed)
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
        whole = Completion(**reply.head, choices=choices, usage=usage_of(answers))
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
                message.numbers = {request.name: distribution_of(value, coverage)}
        return found

    def chunk(self, choices: list[DeltaChoice], answers: list[Answer] | None = None, usage: bool = False) -> str:
        """Return an event of a stream; `answers` are those whose energy it reports."""
        chunk = Chunk(**self.head, choices=choices, usage=usage_of(answers) if usage and answers else None)
        if answers:
            chunk.with_coverage(self.requests, answers, self.server.loaded.description)
        return f"data: {chunk.model_dump_json(exclude_none=not usage)}\n\n"

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
                    if len(text) > sent[index]:
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
    """Return the scores of tokens in OpenAI's form."""

    def scored(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        TokenLogprob(**scored(token.text, token.logprob), top_logprobs=[scored(*one) for one in token.alternatives])
        for token in tokens
    ]
    return Logprobs(content=content)
