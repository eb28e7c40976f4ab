"""`/v1/chat/completions`: all modalities in and out, whole or streamed.

A body becomes one request for each choice and output modality; their answers become messages, or chunks of a stream.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from openm6.core.errors import OpenM6Error
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.interface import Part
from openm6.modalities.numbers import NumberSeries
from openm6.serve.content import audio_file, image_data_url, images_of, parts_of_messages
from openm6.serve.engine import cancel_all
from openm6.serve.errors import DOCUMENTED, BadRequestError, check_limit, failure_of
from openm6.serve.middleware import StrictRoute
from openm6.serve.requests import Answer, CodesRequest, NumbersRequest, Request, ScoredToken, TextRequest
from openm6.serve.routes.chat_schemas import (
    UNSUPPORTED,
    AnswerAudio,
    AnswerImage,
    AnswerMessage,
    AudioSettings,
    ChatBody,
    Choice,
    Chunk,
    Completion,
    DataURL,
    Delta,
    DeltaChoice,
    ImageSettings,
    Logprobs,
    NumbersSettings,
    Output,
    TokenAlternative,
    TokenLogprob,
)
from openm6.serve.schemas import chosen_seed, distribution_of, seed_of, usage_of, with_energy, with_teaching
from openm6.serve.server import Server, ThisCall
from openm6.serve.worker import RequestHandle

router = APIRouter(prefix="/v1/chat", tags=["chat"], route_class=StrictRoute, responses=DOCUMENTED)

EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}
DEFAULT_TOKENS = 64
AUDIO_SECONDS = 3600  # until OpenAI deletes an audio answer; ours is in the response, and nothing is stored


@router.post("/completions", response_model=Completion, responses={200: {"content": EVENTS}})
async def complete(body: ChatBody, call: ThisCall) -> Completion | StreamingResponse:
    """Answers a chat."""
    server = call.server
    server.check_model(body.model)
    refuse_unsupported(body)
    images = (images_of(turn.content, f"messages.{i}.content") for i, turn in enumerate(body.messages))
    await server.fetcher.fetch_all(chain.from_iterable(images))
    seed = chosen_seed(body.seed)
    reply = _Reply(server, body, await asyncio.to_thread(_requests, body, server, seed), seed)
    if body.stream:
        # A refusal must come before the first byte of a stream.
        return _Events(reply, await call.submit(reply.requests))
    answers = await call.answer("chat", reply.requests)
    return await asyncio.to_thread(reply.completion, answers)


def refuse_unsupported(body: ChatBody) -> None:
    """Raise BadRequestError if a field asks for something that is known and not offered."""
    for name, value in (body.model_extra or {}).items():
        neutral = UNSUPPORTED.get(name)
        if neutral is None or value is None or value in ([], {}, *neutral):
            continue
        instead = " 'text' alone is offered" if name == "response_format" else " leave it out"
        raise BadRequestError(f"{name} is not supported:{instead}", name)


def outputs_of(body: ChatBody) -> list[Output]:
    """Return each output modality once, in the order asked for; text by default."""
    return list(dict.fromkeys(body.modalities or ["text"]))


def _requests(body: ChatBody, server: Server, seed: int) -> list[Request]:
    """For each choice, one request for each output modality.

    Raises:
        BadRequestError: a field is out of bounds, or fields do not fit one another.
    """
    limits = server.limits
    check_limit("messages", len(body.messages), limits.messages, "messages")
    check_limit("n", body.n or 1, limits.answers)
    apart = server.loaded.modalities.prompt_attention == "block"  # an earlier turn can then be used again
    parts = parts_of_messages(body.messages, limits, apart)
    if not parts:
        raise BadRequestError("the messages are empty: add a text", "messages")
    return [
        _request(output, body, parts, seed_of(seed, index), limits.tokens)
        for index in range(body.n or 1)
        for output in outputs_of(body)
    ]


def _request(output: Output, body: ChatBody, parts: tuple[Part, ...], seed: int, max_tokens: int) -> Request:
    if output == "text":
        return _text_request(body, parts, seed, max_tokens)
    if output == "numbers":
        return _numbers_request(body.numbers or NumbersSettings(), parts)
    sampling = MaskedSampling(seed=seed)
    if body.draw is not None:
        sampling = MaskedSampling(seed=seed, steps=body.draw.steps, guidance=body.draw.guidance)
    return CodesRequest(parts=parts, modality="image" if output == "image" else "audio", sampling=sampling)


def _text_request(body: ChatBody, parts: tuple[Part, ...], seed: int, max_tokens: int) -> TextRequest:
    tokens = body.max_completion_tokens or body.max_tokens or min(DEFAULT_TOKENS, max_tokens)
    check_limit("max_completion_tokens" if body.max_completion_tokens else "max_tokens", tokens, max_tokens)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    check_limit("stop", len(stop), 4, "strings")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequestError("top_logprobs needs logprobs: set it to true", "top_logprobs")
    sampling = Sampling(
        temperature=body.temperature or 0.0,
        top_k=body.top_k,
        top_p=body.top_p,
        max_tokens=tokens,
        seed=seed,
    )
    top = (body.top_logprobs or 0) if body.logprobs else None
    return TextRequest(parts=parts, sampling=sampling, stop=tuple(stop), top=top)


def _numbers_request(settings: NumbersSettings, parts: tuple[Part, ...]) -> NumbersRequest:
    """A column that is asked for is taken out of the inputs: it must not be read."""
    series = [part.raw.name for part in parts if isinstance(part.raw, NumberSeries)]
    if settings.column is None and series:
        return NumbersRequest(parts=parts, series=series[-1], ahead=settings.ahead)
    column = settings.column or _missing_column(parts)
    inputs = tuple(part for part in (_without(part, column) for part in parts) if part.raw not in (None, {}))
    if not inputs:
        raise BadRequestError(
            "nothing is left to predict from: add inputs besides the column that is asked for", "messages"
        )
    return NumbersRequest(parts=inputs, columns=(column,))


def _missing_column(parts: tuple[Part, ...]) -> str:
    rows = [part.raw for part in parts if part.modality == "numbers" and isinstance(part.raw, dict)]
    missing = [name for row in rows for name, value in row.items() if value is None]
    if len(missing) != 1:
        raise BadRequestError(
            "the number to predict is not named: send numbers={'column': …}, or one value of null", "numbers"
        )
    return missing[0]


def _without(part: Part, column: str) -> Part:
    if part.modality != "numbers" or not isinstance(part.raw, dict):
        return part
    return replace(part, raw={name: value for name, value in part.raw.items() if name != column})


@dataclass
class _Reply:
    """The response to one body: `requests` are those of the first choice, then those of the second, and so on."""

    server: Server
    body: ChatBody
    requests: list[Request]
    seed: int
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def outputs(self) -> list[Output]:
        return outputs_of(self.body)

    @property
    def choices(self) -> int:
        return len(self.requests) // len(self.outputs)

    def of_choice(self, index: int, answers: Sequence[Answer]) -> Sequence[Answer]:
        """Return the answers of one choice."""
        count = len(self.outputs)
        return answers[index * count : (index + 1) * count]

    def completion(self, answers: list[Answer]) -> Completion:
        """Return the whole response; images and audio are decoded here."""
        choices = []
        for index in range(self.choices):
            own = self.of_choice(index, answers)
            logprobs = logprobs_of(own[0].tokens) if self.body.logprobs else None
            message = self.message(index, answers)
            choices.append(
                Choice(index=index, message=message, logprobs=logprobs, finish_reason=own[0].finish)
            )
        reply = Completion(
            id=self.id,
            created=self.created,
            model=self.server.name,
            choices=choices,
            usage=usage_of(answers),
            seed=self.seed,
        )
        with_energy(reply, answers)
        return with_teaching(reply, self.requests, answers, self.server.loaded.description)

    def message(self, index: int, answers: Sequence[Answer]) -> AnswerMessage:
        """Return the answers of one choice as one message."""
        message, loaded, body = AnswerMessage(), self.server.loaded, self.body
        for output, request, answer in zip(
            self.outputs, self.requests, self.of_choice(index, answers), strict=False
        ):
            if output == "text":
                message.content = answer.value
            elif output == "image":
                form = (body.image or ImageSettings()).format
                url = image_data_url(loaded.image.decode(answer.value), form)
                message.images = [AnswerImage(image_url=DataURL(url=url))]
            elif output == "audio":
                data = audio_file(loaded.audio.decode(answer.value), (body.audio or AudioSettings()).format)
                message.audio = AnswerAudio(
                    id=f"audio-{uuid.uuid4().hex}",
                    data=base64.b64encode(data).decode(),
                    expires_at=int(time.time()) + AUDIO_SECONDS,
                )
            else:
                assert isinstance(request, NumbersRequest)
                coverage = (body.numbers or NumbersSettings()).coverage
                message.numbers = {request.name: distribution_of(answer.value, coverage)}
        return message

    def chunk(
        self, choices: list[DeltaChoice], answers: list[Answer] | None = None, usage: bool = False
    ) -> str:
        """Return an event of a stream; `answers` are those whose energy it reports."""
        chunk = Chunk(
            id=self.id,
            created=self.created,
            model=self.server.name,
            choices=choices,
            usage=usage_of(answers) if usage and answers else None,
            seed=self.seed,
        )
        if answers:
            with_energy(chunk, answers)
            with_teaching(chunk, self.requests, answers, self.server.loaded.description)
        return f"data: {chunk.model_dump_json(exclude_none=not usage)}\n\n"

    def last_deltas(self, answers: list[Answer]) -> list[DeltaChoice]:
        """Return the last delta of each choice: what is not text, and why it ended."""
        found = []
        for index in range(self.choices):
            message = self.message(index, answers)
            delta = Delta(audio=message.audio, images=message.images, numbers=message.numbers)
            finish = self.of_choice(index, answers)[0].finish
            found.append(DeltaChoice(index=index, delta=delta, finish_reason=finish))
        return found


def logprobs_of(tokens: Sequence[ScoredToken]) -> Logprobs:
    """Return the scores of tokens in OpenAI's form."""
    return Logprobs(
        content=[
            TokenLogprob(
                token=token.text,
                logprob=token.logprob,
                bytes=list(token.text.encode()),
                top_logprobs=[
                    TokenAlternative(token=text, logprob=value, bytes=list(text.encode()))
                    for text, value in token.alternatives
                ],
            )
            for token in tokens
        ]
    )


class _Events(StreamingResponse):
    """Server-sent events; a client that disconnects cancels the requests, even before the first event."""

    def __init__(self, reply: _Reply, handles: list[RequestHandle]) -> None:
        headers = {"cache-control": "no-cache"}
        super().__init__(self._events(), media_type="text/event-stream", headers=headers)
        self.reply, self.handles = reply, handles

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            cancel_all(self.handles)

    async def _events(self) -> AsyncIterator[str]:
        """Yield chunks, then `[DONE]`; a failure on the way is an event, too, as the status is sent already."""
        reply = self.reply
        try:
            for index in range(reply.choices):
                yield reply.chunk([DeltaChoice(index=index, delta=Delta(role="assistant", content=""))])
            async for choice in self._deltas():
                yield reply.chunk([choice])
            answers = [await handle.answer() for handle in self.handles]
            for answer in answers:
                reply.server.metrics.add("chat", answer)
            for choice in await asyncio.to_thread(reply.last_deltas, answers):
                last = choice.index == reply.choices - 1
                yield reply.chunk([choice], answers if last else None)
            options = reply.body.stream_options
            if options is not None and options.include_usage:
                yield reply.chunk([], answers, usage=True)
        except OpenM6Error as error:
            failure = failure_of(error)
            yield f"data: {failure.body(code=str(failure.status)).model_dump_json()}\n\n"
        yield "data: [DONE]\n\n"

    async def _deltas(self) -> AsyncIterator[DeltaChoice]:
        """Yield what is new in the texts of all choices, as it is generated, until all requests are done."""
        per_choice = len(self.reply.outputs)
        if self.reply.outputs[0] != "text":
            await asyncio.gather(*(handle.answer() for handle in self.handles))
            return
        news: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()

        async def follow(index: int, handle: RequestHandle) -> None:
            async for text in handle.stream():
                if index % per_choice == 0:
                    await news.put((index // per_choice, text))
            await news.put(None)

        tasks = [asyncio.create_task(follow(*pair)) for pair in enumerate(self.handles)]
        sent = [0] * self.reply.choices  # characters
        scored = [0] * self.reply.choices  # tokens
        running = len(tasks)
        try:
            while running:
                item = await news.get()
                if item is None:
                    running -= 1
                    continue
                index, text = item
                logprobs = None
                if self.reply.body.logprobs:
                    tokens = self.handles[index * per_choice].tokens
                    logprobs = logprobs_of(tokens[scored[index] :])
                    scored[index] = len(tokens)
                new, sent[index] = text[sent[index] :], len(text)
                yield DeltaChoice(index=index, delta=Delta(content=new), logprobs=logprobs)
        finally:
            for task in tasks:
                task.cancel()
