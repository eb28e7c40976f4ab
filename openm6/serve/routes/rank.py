"""`/v1/rank`: candidates in the order of their likelihood, for search and recommendation."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, Field

from openm6.serve.content import Content, joined, parts_of_content, pictures_in
from openm6.serve.errors import DOCUMENTED, BadRequestError
from openm6.serve.guard import StrictRoute
from openm6.serve.replies import ask_all
from openm6.serve.requests import RankRequest
from openm6.serve.schemas import Energy, TokenUsage, joules_of, usage_of
from openm6.serve.state import ThisClient, ThisServer

router = APIRouter(prefix="/v1", tags=["rank"], route_class=StrictRoute, responses=DOCUMENTED)

Candidate = Annotated[str, Field(min_length=1, max_length=4096)]


class Ranking(BaseModel):
    """`query` is a text or parts of a message. `normalise` divides by the number of tokens, so that length is free."""

    query: Content
    candidates: list[Candidate] = Field(min_length=1, max_length=256)
    model: str | None = None
    normalise: bool = True
    top: int | None = Field(default=None, ge=1)


class Ranked(BaseModel):
    """A candidate; log_likelihood is the sum over its tokens, in nats."""

    index: int
    candidate: str
    log_likelihood: float
    score: float


class Ranks(Energy):
    """The likeliest first."""

    object: Literal["list"] = "list"
    model: str
    data: list[Ranked]
    usage: TokenUsage


@router.post("/rank")
async def rank(body: Ranking, server: ThisServer, client: ThisClient, http: HTTPRequest) -> Ranks:
    """Orders candidates by how likely they follow the query."""
    server.check_model(body.model or "default")
    limits = server.config.limits
    if len(body.candidates) > limits.candidates:
        raise BadRequestError(f"candidates exceed {limits.candidates}: send fewer", "candidates")
    await server.fetcher.bring(pictures_in(body.query, "query"))
    parts = joined(parts_of_content(body.query, limits, "query"), limits, "query")
    request = RankRequest(
        parts=parts, client=client, seconds=limits.seconds, candidates=tuple(body.candidates)
    )
    answers = await ask_all(server, http, "rank", [request])
    found = []
    for index, (nats, length) in enumerate(answers[0].value):
        score = -nats / length if body.normalise else -nats
        found.append(Ranked(index=index, candidate=body.candidates[index], log_likelihood=-nats, score=score))
    found.sort(key=lambda ranked: (-ranked.score, ranked.index))
    joules, source = joules_of(answers)
    return Ranks(
        model=server.name,
        data=found[: body.top],
        usage=usage_of(answers),
        joules=joules,
        joules_source=source,
    )
