"""`/v1/chat/completions`: all modalities in and out, whole or streamed."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import chain

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from openm6.base.errors import OpenM6Error
from openm6.serve.chat import (
    logprobs_of,
    message_of,
    refuse_unsupported,
    requests_of,
    wanted_modalities,
)
from openm6.serve.chat_schemas import ChatBody, Choice, Chunk, Completion, Delta, DeltaChoice
from openm6.serve.content import pictures_in
from openm6.serve.errors import DOCUMENTED, ErrorBody, ErrorDetail, error_of
from openm6.serve.guard import StrictRoute
from openm6.serve.replies import ask_all
from openm6.serve.requests import Answer, Request
from openm6.serve.schemas import chosen_seed, joules_of, usage_of
from openm6.serve.state import Server, ThisClient, ThisServer
from openm6.serve.teaching import teaching_of
from openm6.serve.ticket import Ticket

router = APIRouter(prefix="/v1/chat", tags=["chat"], route_class=StrictRoute, responses=DOCUMENTED)

EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}


@router.post("/completions", response_model=Completion, responses={200: {"content": EVENTS}})
async def complete(
    body: ChatBody, server: ThisServer, client: ThisClient, http: HTTPRequest
) -> Completion | StreamingResponse:
    """Answers a chat."""
    server.check_model(body.model)
    refuse_unsupported(body)
    seed = chosen_seed(body.seed)
    named = (pictures_in(turn.content, f"messages.{n}.content") for n, turn in enumerate(body.messages))
    await server.fetcher.bring(chain.from_iterable(named))
    choices = requests_of(body, server, client, seed)
    flat = [request for choice in choices for request in choice]
    if body.stream:
        tickets = await _ask(server, flat)
        return _Events(_Stream(server, body, choices, tickets, seed))
    answers = await ask_all(server, http, "chat", flat)
    return await asyncio.to_thread(_completion, server, body, choices, answers, seed)


async def _ask(server: Server, requests: list[Request]) -> list[Ticket]:
    """Tickets for all requests, or for none: a refusal must come before the first byte of a stream."""
    tickets: list[Ticket] = []
    try:
        for request in requests:
            tickets.append(await server.engine.ask(request))
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    return tickets


def _completion(
    server: Server, body: ChatBody, choices: list[list[Request]], answers: list[Answer], seed: int
) -> Completion:
    per_choice = len(choices[0])
    found = []
    for index, requests in enumerate(choices):
        own = answers[index * per_choice : (index + 1) * per_choice]
        found.append(
            Choice(
                index=index,
                message=message_of(body, server, requests, own),
                logprobs=logprobs_of(own[0].scored) if body.logprobs else None,
                finish_reason=own[0].finish,
            )
        )
    joules, source = joules_of(answers)
    flat = [request for requests in choices for request in requests]
    taught, note = teaching_of(flat, answers, server.engine.loaded.description)
    return Completion(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=server.name,
        choices=found,
        usage=usage_of(answers),
        seed=seed,
        joules=joules,
        joules_source=source,
        taught=taught,
        note=note,
    )


class _Events(StreamingResponse):
    """Server-sent events; whoever leaves gives the requests up, even before the first event."""

    def __init__(self, stream: _Stream) -> None:
        super().__init__(
            stream.events(), media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
        self.tickets = stream.tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for ticket in self.tickets:
                ticket.cancel()


@dataclass
class _Stream:
    """Server-sent events of an answer: texts as they grow, all else when it is there."""

    server: Server
    body: ChatBody
    choices: list[list[Request]]
    tickets: list[Ticket]
    seed: int

    def __post_init__(self) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    async def events(self) -> AsyncIterator[str]:
        """Chunks, then `[DONE]`; a failure on the way is an event, too, as the status is sent already."""
        try:
            for index in range(len(self.choices)):
                yield self._event([DeltaChoice(index=index, delta=Delta(role="assistant", content=""))])
            async for choice in self._growth():
                yield self._event([choice])
            answers = [ticket.result() for ticket in self.tickets]
            for answer in answers:
                self.server.metrics.add("chat", answer)
            for choice in await asyncio.to_thread(self._ends, answers):
                last = choice.index == len(self.choices) - 1
                yield self._event([choice], answers if last else None)
            if self.body.stream_options is not None and self.body.stream_options.include_usage:
                yield self._event([], answers, usage=True)
        except OpenM6Error as error:
            status, message, param, _ = error_of(error)
            kind = "server_error" if status >= 500 else "invalid_request_error"
            detail = ErrorDetail(message=message, type=kind, param=param, code=str(status))
            yield f"data: {ErrorBody(error=detail).model_dump_json()}\n\n"
        yield "data: [DONE]\n\n"

    async def _growth(self) -> AsyncIterator[DeltaChoice]:
        """What is new in the texts of all choices, as it comes."""
        per_choice = len(self.choices[0])
        if wanted_modalities(self.body)[0] != "text":
            await asyncio.gather(*(ticket.answer() for ticket in self.tickets))
            return
        news: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()

        async def follow(number: int, ticket: Ticket) -> None:
            async for text in ticket.growth():
                if number % per_choice == 0:
                    await news.put((number // per_choice, text))
            await news.put(None)

        tasks = [asyncio.create_task(follow(*pair)) for pair in enumerate(self.tickets)]
        shown = dict.fromkeys(range(len(self.choices)), 0)
        scored = dict.fromkeys(range(len(self.choices)), 0)
        left = len(tasks)
        try:
            while left:
                piece = await news.get()
                if piece is None:
                    left -= 1
                    continue
                index, text = piece
                yield self._delta(index, text, shown, scored)
        finally:
            for task in tasks:
                task.cancel()

    def _delta(self, index: int, text: str, shown: dict[int, int], scored: dict[int, int]) -> DeltaChoice:
        new, shown[index] = text[shown[index] :], len(text)
        logprobs = None
        if self.body.logprobs:
            tokens = self.tickets[index * len(self.choices[0])].scored
            logprobs = logprobs_of(tokens[scored[index] :])
            scored[index] = len(tokens)
        return DeltaChoice(index=index, delta=Delta(content=new), logprobs=logprobs)

    def _ends(self, answers: list[Answer]) -> list[DeltaChoice]:
        """The last piece of each choice: what is no text, and why it ended."""
        per_choice = len(self.choices[0])
        ends = []
        for index, requests in enumerate(self.choices):
            own = answers[index * per_choice : (index + 1) * per_choice]
            message = message_of(self.body, self.server, requests, own)
            delta = Delta(audio=message.audio, images=message.images, numbers=message.numbers)
            ends.append(DeltaChoice(index=index, delta=delta, finish_reason=own[0].finish))
        return ends

    def _event(
        self, choices: list[DeltaChoice], answers: list[Answer] | None = None, usage: bool = False
    ) -> str:
        joules, source = joules_of(answers or [])
        flat = [request for requests in self.choices for request in requests] if answers else []
        taught, note = teaching_of(flat, answers or [], self.server.engine.loaded.description)
        chunk = Chunk(
            id=self.id,
            created=self.created,
            model=self.server.name,
            choices=choices,
            usage=usage_of(answers) if usage and answers else None,
            seed=self.seed,
            joules=joules,
            joules_source=source,
            taught=taught,
            note=note,
        )
        return f"data: {chunk.model_dump_json(exclude_none=not usage)}\n\n"
