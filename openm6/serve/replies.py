"""Asking the engine from a route: several requests at once, given up together, counted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import Request as HTTPRequest

from openm6.serve.requests import Answer, Request
from openm6.serve.state import Server
from openm6.serve.ticket import StoppedError, Ticket

LOOK = 0.25  # seconds between looks at whether the client is still there


async def ask_all(server: Server, http: HTTPRequest, kind: str, requests: Sequence[Request]) -> list[Answer]:
    """The answers to several requests; all are given up if one fails or the client leaves.

    Raises:
        OpenM6Error: one of them is refused or fails.
    """
    tickets: list[Ticket] = []
    try:
        for request in requests:
            tickets.append(await server.engine.ask(request))
        answers = await _while_there(http, tickets)
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    for answer in answers:
        server.metrics.add(kind, answer)
    return answers


async def _while_there(http: HTTPRequest, tickets: list[Ticket]) -> list[Answer]:
    waiting = asyncio.gather(*(ticket.answer() for ticket in tickets))
    while True:
        done, _ = await asyncio.wait([waiting], timeout=LOOK)
        if done:
            return waiting.result()
        if await http.is_disconnected():
            waiting.cancel()
            raise StoppedError("the client has gone")
